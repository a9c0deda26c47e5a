"""Two reports against each other: a ratio or an error with its interval for each metric, and a verdict.

Intervals are 95 % ones of a moving-block bootstrap (Künsch 1989): latencies that follow each other are not
independent, and blocks keep what they have in common. A metric is worse only when its whole interval lies
beyond the tolerance, so that noise does not fail a run; `unsure` says that more samples are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.errors import ReplayError

from .markdown import table
from .report import load_actions
from .trace import FloatArray

RESAMPLES = 1000
NOTICEABLE = 0.05  # ms: a difference below this is never worse, whatever its ratio
WAITED = 5.0  # % of a run for which its threads waited for a processor: above, others disturbed it
SHARE_TOLERANCE = 0.02  # absolute, of drops, misses and holds
TIMES = ("inference", "engine", "preprocess", "capture_to_command", "capture_to_first_command")
# A percentile is compared only where enough samples lie beyond it.
QUANTILES = (("p50", 50.0, 20), ("p95", 95.0, 200), ("p99", 99.0, 1000))


@dataclass(frozen=True)
class Finding:
    """One metric. value: the ratio to the baseline, or a difference or an error as `kind` says; low, high:
    its interval; verdict: same, better, worse, unsure or not compared."""

    name: str
    kind: str
    baseline: float | None
    run: float | None
    value: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def worse(self) -> bool:
        return any(finding.verdict == "worse" for finding in self.findings)

    @property
    def summary(self) -> str:
        bad = [f"{f.name} ({_text(f)})" for f in self.findings if f.verdict == "worse"]
        return f"worse: {', '.join(bad)}" if bad else "no regression"


def compare(
    baseline: dict[str, Any], run: dict[str, Any], *, tolerance: float, action_tolerance: float
) -> Comparison:
    """Set a run against a baseline. Raises ReplayError where they are not of the same bag and mode."""
    for name, ours, theirs in (
        ("bag", run["bag"]["sha256"], baseline["bag"]["sha256"]),
        ("mode", run["mode"], baseline["mode"]),
        ("--every-frame", run["settings"].get("every_frame"), baseline["settings"].get("every_frame")),
    ):
        if ours != theirs:
            raise ReplayError(
                f"--against: the baseline is of another {name} ({str(theirs)[:12]}, this run {str(ours)[:12]}); "
                "make a baseline with the same"
            )
    notes = []
    if run["policy"]["fingerprint"] != baseline["policy"]["fingerprint"]:
        notes.append("The policies differ, so differing actions are to be expected.")
    timed = _same_machine(baseline, run)
    if not timed:
        notes.append("Another processor, GPU, engine device or contract: times are not compared.")
    findings = _times(baseline, run, tolerance) if timed else []
    if timed and _busy(baseline, run):
        findings, doubted = _doubt(findings)
        if doubted:
            notes.append(
                "Other processes took processor time from one of the runs: slower times are unsure, not worse. "
                "Repeat on a quiet machine."
            )
    findings += _shares(baseline, run) if timed else []
    findings += _actions(baseline, run, action_tolerance)
    findings += _open_loop(baseline, run, tolerance)
    return Comparison(tuple(findings), tuple(notes))


def _same_machine(baseline: dict[str, Any], run: dict[str, Any]) -> bool:
    if baseline["contract"]["sha256"] != run["contract"]["sha256"]:
        return False
    return all(baseline["host"][key] == run["host"][key] for key in ("processor", "cores", "gpu")) and (
        baseline["policy"]["device"] == run["policy"]["device"]
    )


def _busy(*documents: dict[str, Any]) -> bool:
    return any(
        document["host"]["load"] > document["host"]["cores"]
        or (document["resources"].get("runqueue_wait_percent") or 0.0) > WAITED
        for document in documents
    )


def _doubt(findings: list[Finding]) -> tuple[list[Finding], bool]:
    """Times by the clock, on a machine that others used too: a slowdown cannot be told from theirs."""
    kept = [replace(f, verdict="unsure") if f.verdict == "worse" else f for f in findings]
    return kept, kept != findings


# ----------------------------------------------------------------- bootstrap
def resampled(values: FloatArray, random: np.random.Generator, *, rounds: int = RESAMPLES) -> FloatArray:
    """(rounds, n) moving-block resamples of n values; blocks are about the square root of n long."""
    size = values.size
    length = max(1, round(size**0.5))
    blocks = -(-size // length)
    starts = random.integers(0, size - length + 1, (rounds, blocks))
    index = (starts[:, :, None] + np.arange(length)).reshape(rounds, -1)[:, :size]
    picked: FloatArray = values[index]
    return picked


def interval(values: npt.ArrayLike) -> tuple[float, float]:
    """The middle 95 % of bootstrap values."""
    low, high = np.percentile(np.asarray(values, np.float64), [2.5, 97.5])
    return float(low), float(high)


def ratio_finding(name: str, old: FloatArray, new: FloatArray, percent: float, tolerance: float) -> Finding:
    """How a percentile of `new` relates to that of `old`; lower is better."""
    random = np.random.default_rng(0)
    before, after = float(np.percentile(old, percent)), float(np.percentile(new, percent))
    ratios = _percentiles(new, percent, random) / np.maximum(_percentiles(old, percent, random), 1e-9)
    low, high = interval(ratios)
    value = after / max(before, 1e-9)
    verdict = "same"
    if abs(after - before) >= NOTICEABLE:
        if low > 1 + tolerance:
            verdict = "worse"
        elif high < 1 / (1 + tolerance):
            verdict = "better"
        elif value > 1 + tolerance:
            verdict = "unsure"
    return Finding(name, "ratio", before, after, value, low, high, verdict)


def _percentiles(values: FloatArray, percent: float, random: np.random.Generator) -> FloatArray:
    found: FloatArray = np.percentile(resampled(values, random), percent, axis=1)
    return found


# ------------------------------------------------------------------- metrics
def _times(baseline: dict[str, Any], run: dict[str, Any], tolerance: float) -> list[Finding]:
    findings = []
    for name in TIMES:
        old, new = (np.array(d["samples"].get(name, []), np.float64) for d in (baseline, run))
        for label, percent, least in QUANTILES:
            if min(old.size, new.size) >= least:
                findings.append(ratio_finding(f"{name} {label} ms", old, new, percent, tolerance))
    return findings


def _shares(baseline: dict[str, Any], run: dict[str, Any]) -> list[Finding]:
    """Drops, deadline misses and holds: shares of what there was, compared by their difference."""
    findings = []
    for name, (old_hits, old_all), (new_hits, new_all) in (
        ("dropped", _dropped(baseline), _dropped(run)),
        ("deadline misses", _missed(baseline), _missed(run)),
        ("commands held", _held(baseline), _held(run)),
    ):
        if not old_all or not new_all:
            continue
        old, new = old_hits / old_all, new_hits / new_all
        # Normal interval of a difference of two shares, with half a hit added so that 0 has a width too.
        spread = 1.96 * np.sqrt(_variance(old_hits, old_all) + _variance(new_hits, new_all))
        low, high = new - old - spread, new - old + spread
        verdict = "worse" if low > SHARE_TOLERANCE else "better" if high < -SHARE_TOLERANCE else "same"
        if verdict == "same" and new - old > SHARE_TOLERANCE:
            verdict = "unsure"
        findings.append(Finding(name, "difference", old, new, new - old, float(low), float(high), verdict))
    return findings


def _variance(hits: int, number: int) -> float:
    share = (hits + 0.5) / (number + 1)
    return share * (1 - share) / number


def _dropped(document: dict[str, Any]) -> tuple[int, int]:
    frames = document["frames"]
    return frames["dropped"], min(frames["images_sent"].values(), default=0)


def _missed(document: dict[str, Any]) -> tuple[int, int]:
    control = document["control"]
    return (control["deadline_misses"], control["commands_played"]) if control else (0, 0)


def _held(document: dict[str, Any]) -> tuple[int, int]:
    control = document["control"]
    return (control["commands_held"], control["commands"]) if control else (0, 0)


def _actions(baseline: dict[str, Any], run: dict[str, Any], tolerance: float) -> list[Finding]:
    """Relative L2 error of the actions of equal observations, over all and for the worst joint."""
    old, new = load_actions(baseline), load_actions(run)
    keys = sorted(old.keys() & new.keys())
    if not keys or baseline["actions"]["shape"][1:] != run["actions"]["shape"][1:]:
        return [Finding("actions", "error", None, None, None, None, None, "not compared")]
    before = np.stack([old[key] for key in keys]).astype(np.float64)
    after = np.stack([new[key] for key in keys]).astype(np.float64)
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        same = np.array_equal(before, after, equal_nan=True)
        verdict = "same" if same else "worse"
        return [Finding("actions that are not finite", "error", None, None, None, None, None, verdict)]
    squares = ((after - before) ** 2).sum(axis=1)  # (chunks, A)
    scale = (before**2).sum(axis=1)
    findings = [_error("actions, relative error", squares.sum(axis=1), scale.sum(axis=1), tolerance)]
    joints = [
        _error(f"actions of {name}, relative error", squares[:, j], scale[:, j], tolerance)
        for j, name in enumerate(run["contract"]["joints"])
    ]
    findings.append(max(joints, key=lambda finding: finding.value or 0.0))
    largest = float(np.abs(after - before).max())
    findings.append(
        Finding("actions, largest difference", "error", 0.0, largest, largest, None, None, "same")
    )
    return findings


def _error(name: str, squares: FloatArray, scale: FloatArray, tolerance: float) -> Finding:
    random = np.random.default_rng(0)
    index = random.integers(0, squares.size, (RESAMPLES, squares.size))
    drawn = np.sqrt(squares[index].sum(axis=1) / np.maximum(scale[index].sum(axis=1), 1e-12))
    low, high = interval(drawn)
    value = float(np.sqrt(squares.sum() / max(float(scale.sum()), 1e-12)))
    verdict = "worse" if low > tolerance else "unsure" if value > tolerance else "same"
    return Finding(name, "error", 0.0, value, value, low, high, verdict)


def _open_loop(baseline: dict[str, Any], run: dict[str, Any], tolerance: float) -> list[Finding]:
    old, new = (np.array(d["samples"].get("open_loop_error", []), np.float64) for d in (baseline, run))
    if min(old.size, new.size) < 20:
        return []
    return [ratio_finding("open-loop error p50", old, new, 50.0, tolerance)]


# -------------------------------------------------------------- presentation
def markdown(comparison: Comparison) -> str:
    rows = [
        [
            f.name,
            _number(f.baseline),
            _number(f.run),
            _text(f),
            _interval(f),
            f"**{f.verdict}**" if f.verdict == "worse" else f.verdict,
        ]
        for f in comparison.findings
    ]
    head = ["metric", "baseline", "this run", "change", "95 % interval", "verdict"]
    parts = [f"### Against the baseline: {comparison.summary}", table(head, rows), *comparison.notes]
    return "\n\n".join(parts) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _text(finding: Finding) -> str:
    if finding.value is None:
        return "–"
    if finding.kind == "ratio":
        return f"×{finding.value:.3f}"
    if finding.kind == "difference":
        return f"{100 * finding.value:+.2f} %"
    return f"{finding.value:.3g}"


def _interval(finding: Finding) -> str:
    if finding.low is None or finding.high is None:
        return "–"
    if finding.kind == "difference":
        return f"{100 * finding.low:+.2f} to {100 * finding.high:+.2f} %"
    return f"{finding.low:.3g} to {finding.high:.3g}"
