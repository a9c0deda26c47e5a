"""The runs that a report is of: the figures of each, whether others disturbed it, several reports made one."""

from __future__ import annotations

from typing import Any

from vla_infer.errors import ReplayError

LEAST = 5  # undisturbed runs of a side that a verdict on times needs; with 4 no interval reaches 99 %
WAITED = 5.0  # % of a run for which its threads waited for a processor
OTHERS = 25.0  # % of all processors that other programs used meanwhile
STOLEN = 2.0  # % of all processors that a host of virtual machines kept for itself


def figures(document: dict[str, Any]) -> dict[str, Any]:
    """What a comparison needs of one run, out of its report."""
    control, frames = document["control"], document["frames"]
    played, sent = (control["commands_played"], control["commands"]) if control else (0, 0)
    return {
        "date": document["date"],
        "latency_ms": document["latency_ms"],
        "shares": {
            "dropped": frames["dropped_share"],
            "deadline misses": control["deadline_misses"] / played if played else None,
            "commands held": control["commands_held"] / sent if sent else None,
        },
        "resources": document["resources"],
        "load": document["host"]["load"],
    }


def runs_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of every run of a report, disturbed ones too."""
    runs: list[dict[str, Any]] = document.get("runs") or [figures(document)]
    return runs


def disturbance(run: dict[str, Any], cores: int) -> str | None:
    """Who took processors from a run, None where nobody did as far as was measured."""
    measured = run["resources"]
    for name, limit, words in (
        ("others_percent", OTHERS, "other programs used {:.0f} % of the processors"),
        ("runqueue_wait_percent", WAITED, "its threads waited for a processor for {:.0f} % of the time"),
        ("steal_percent", STOLEN, "the host of this virtual machine kept {:.0f} % of the processors"),
    ):
        if (measured.get(name) or 0.0) > limit:
            return words.format(measured[name])
    # Reports of before know the load alone, which counts the runs themselves and the minute before them.
    if measured.get("others_percent") is None and run["load"] > cores:
        return f"the load before it was {run['load']:.1f} on {cores} processors"
    return None


def disturbance_of(document: dict[str, Any]) -> str | None:
    """As `disturbance`, of the run whose report it is."""
    return disturbance(figures(document), document["host"]["cores"])


def quiet(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a report that nobody disturbed."""
    cores = document["host"]["cores"]
    return [run for run in runs_of(document) if disturbance(run, cores) is None]


def described(document: dict[str, Any]) -> str:
    """What the runs of a report were, in a sentence; empty for a report of one run."""
    if "runs" not in document:
        return ""
    runs = runs_of(document)
    middles = [(run["latency_ms"].get("inference") or {}).get("p50") for run in runs]
    known = [middle for middle in middles if middle is not None]
    span = f"; inference p50 of the runs {min(known):.2f} to {max(known):.2f} ms" if known else ""
    return f"The middle one of {len(runs)} runs, {len(quiet(document))} of them undisturbed{span}."


def merge(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several runs: that of the run whose median inference is the median of all, with the figures of
    each as `runs`, in order. Raises ReplayError where they are not of one policy and one recording."""
    for place in (("bag", "sha256"), ("policy", "fingerprint"), ("contract", "sha256")):
        if len({document[place[0]][place[1]] for document in documents}) > 1:
            raise ReplayError(f"--repeat: the {place[0]} changed between the runs; let it be and run again")
    undisturbed = [document for document in documents if disturbance_of(document) is None] or documents
    ordered = sorted(undisturbed, key=lambda document: float(document["latency_ms"]["inference"]["p50"]))
    every = [run for document in documents for run in runs_of(document)]
    return {**ordered[(len(ordered) - 1) // 2], "runs": every}
