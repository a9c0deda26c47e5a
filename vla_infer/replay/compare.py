"""Two reports against each other: a ratio or an error with its interval for each metric, and a verdict.

Times are judged from several runs of each side, see `verdict`. Errors of actions are of one run: equal observations
give equal actions. Their intervals are 95 % ones of a bootstrap over observations, of the open-loop error of a
moving-block one (Künsch 1989), as observations that follow each other are not independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.errors import ReplayError

from .markdown import table
from .report import load_actions
from .runs import LEAST, disturbance, quiet, runs_of
from .trace import FloatArray
from .verdict import LEVEL, NOTICEABLE, TAIL_LEVEL, Finding, judge_ratio, judge_share

RESAMPLES = 1000
SHARE_TOLERANCE = 0.02  # absolute, of drops, misses and holds
# Times, and what each is a part of.
TIMES = {
    "inference": "inference",
    "engine": "inference",
    "preprocess": "inference",
    "capture_to_command": "capture_to_command",
    "capture_to_first_command": "capture_to_command",
}
# A percentile is compared only where a run has enough samples beyond it: percentile, level, fewest samples.
QUANTILES = (("p50", LEVEL, 20), ("p95", TAIL_LEVEL, 100), ("p99", TAIL_LEVEL, 500))
DECISIVE = ("inference p50 ms", "capture_to_command p50 ms")  # without these there is no verdict on times


@dataclass(frozen=True)
class Judging:
    """tolerance: relative, of times; action_tolerance: of actions; times: whether these are judged at all;
    turns: both sides ran in turn, so that the machine was the same for both."""

    tolerance: float = 0.10
    action_tolerance: float = 0.005
    times: bool = True
    turns: bool = False


@dataclass(frozen=True)
class Comparison:
    """undecided: why there is no verdict on times, empty where there is one."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    undecided: str = ""

    @property
    def worse(self) -> bool:
        return any(finding.verdict == "worse" for finding in self.findings)

    @property
    def status(self) -> int:
        """Exit status: 1 it got worse, 3 no verdict on times, 0 neither."""
        return 1 if self.worse else 3 if self.undecided else 0

    @property
    def doubtful(self) -> bool:
        """Whether the verdict hangs on a finding that further runs may change."""
        measured = [f for f in self.findings if f.kind != "error"]
        if any(f.verdict == "worse" and f.clear for f in measured):
            return False
        return any(f.verdict == "worse" or (f.verdict == "unsure" and f.name in DECISIVE) for f in measured)

    @property
    def summary(self) -> str:
        bad = [f"{f.name} ({_text(f)})" for f in self.findings if f.verdict == "worse"]
        if bad:
            return f"worse: {', '.join(bad)}"
        if self.undecided:
            return f"no verdict on times: {self.undecided}; nothing else got worse"
        doubts = [f"{f.name} ({_text(f)}, {_interval(f)})" for f in self.findings if f.verdict == "unsure"]
        return "no regression" + (f"; unsure: {', '.join(doubts)}" if doubts else "")


def compare(
    baseline: dict[str, Any], run: dict[str, Any], judging: Judging, *, further: dict[str, Any] | None = None
) -> Comparison:
    """Set a run against a baseline. further: those of the runs that were made because the first left doubt; what is
    worse has to be so among these too.

    Raises ReplayError where they are not of the same bag and mode.
    """
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
    notes: list[str] = []
    if run["policy"]["fingerprint"] != baseline["policy"]["fingerprint"]:
        notes.append("The policies differ, so differing actions are to be expected.")
    findings: list[Finding] = []
    undecided = ""
    if judging.times and not _comparable(baseline, run):
        notes.append("Another processor, GPU, engine device, contract or --seconds: times are not compared.")
    elif judging.times:
        findings, undecided, said = _timed(baseline, run, judging, further)
        notes += said
    findings += _actions(baseline, run, judging.action_tolerance)
    findings += _open_loop(baseline, run, judging.tolerance)
    return Comparison(tuple(findings), tuple(notes), undecided)


def _comparable(baseline: dict[str, Any], run: dict[str, Any]) -> bool:
    if baseline["contract"]["sha256"] != run["contract"]["sha256"]:
        return False
    if baseline["settings"].get("seconds") != run["settings"].get("seconds"):
        return False
    return all(baseline["host"][key] == run["host"][key] for key in ("processor", "cores", "gpu")) and (
        baseline["policy"]["device"] == run["policy"]["device"]
    )


# --------------------------------------------------------------------- times
def _timed(
    baseline: dict[str, Any], run: dict[str, Any], judging: Judging, further: dict[str, Any] | None
) -> tuple[list[Finding], str, list[str]]:
    """Findings on times and shares, why they are no verdict, and what was left out."""
    findings = _over_runs(baseline, run, judging.tolerance)
    if further is not None:
        again = {f.name: f.verdict for f in _over_runs(baseline, further, judging.tolerance)}
        findings = [
            replace(f, verdict="unsure") if f.verdict == "worse" and again.get(f.name) != "worse" else f
            for f in findings
        ]
    notes = [
        note
        for side, document in (("baseline", baseline), ("this", run))
        for note in _left_out(side, document)
    ]
    undecided = _too_few(baseline, run) or (
        "" if judging.turns else _other_clock(baseline, run, judging.tolerance)
    )
    if undecided:
        # What the machine may have done is no verdict, whichever way it points.
        findings = [replace(f, verdict="not judged", clear=False) for f in findings]
    else:
        wide = [f for f in findings if f.verdict == "unsure" and f.name in DECISIVE]
        undecided = "; ".join(f"{f.name} changed by {_text(f)}, {_interval(f)}" for f in wide)
    return findings, undecided, notes


def _over_runs(baseline: dict[str, Any], run: dict[str, Any], tolerance: float) -> list[Finding]:
    old, new = quiet(baseline), quiet(run)
    findings = []
    for name, of in TIMES.items():
        for label, level, least in QUANTILES:
            before, after = (_values(runs, name, label, least) for runs in (old, new))
            whole = _values(old, of, "p50", 1)
            if before and after and whole:
                found = judge_ratio(
                    f"{name} {label} ms", before, after,
                    tolerance=tolerance, whole=float(np.median(whole)), level=level,
                )  # fmt: skip
                findings.append(found)
    for name in ("dropped", "deadline misses", "commands held"):
        before, after = (
            [r["shares"][name] for r in runs if r["shares"].get(name) is not None] for runs in (old, new)
        )
        if before and after:
            findings.append(judge_share(name, before, after, tolerance=SHARE_TOLERANCE))
    return findings


def _values(runs: list[dict[str, Any]], name: str, label: str, least: int) -> list[float]:
    """A percentile of every run that has at least so many samples, ms."""
    summaries = [run["latency_ms"].get(name) for run in runs]
    return [float(s[label]) for s in summaries if s is not None and s["count"] >= least]


def _left_out(side: str, document: dict[str, Any]) -> list[str]:
    runs = runs_of(document)
    reasons = [reason for run in runs if (reason := disturbance(run, document["host"]["cores"]))]
    if not reasons:
        return []
    return [f"Left out as disturbed, {side} side: {len(reasons)} of {len(runs)} runs ({reasons[0]})."]


def _too_few(baseline: dict[str, Any], run: dict[str, Any]) -> str:
    """Why the undisturbed runs of the two sides are too few, empty where they are enough."""
    for side, document in (("the baseline", baseline), ("this report", run)):
        every, good = len(runs_of(document)), len(quiet(document))
        if every < LEAST:
            return f"{side} is of {every} run{'s' * (every > 1)}, {LEAST} are needed; give --repeat 7 for it"
        if good < LEAST:
            said = f"disturbed: {good} of {every} runs of {side} were not, {LEAST} are needed"
            return f"{said}; repeat on a quiet machine"
    return ""


def _other_clock(baseline: dict[str, Any], run: dict[str, Any], tolerance: float) -> str:
    """Whether the processor itself was faster or slower by half the tolerance, by what hashing takes."""
    if baseline["software"].get("python") != run["software"].get("python"):
        return ""  # another interpreter may have another SHA-256
    sides = [[r["resources"].get("yardstick_ms") for r in quiet(d)] for d in (baseline, run)]
    known = [[value for value in side if value] for side in sides]
    if not all(known):
        return ""
    ratio = float(np.median(known[1]) / np.median(known[0]))
    if abs(math.log(ratio)) <= math.log1p(tolerance / 2):
        return ""
    return f"the processor itself takes ×{ratio:.2f} for the same hashing, so it is clocked otherwise than it was"


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
    """How a percentile of `new` relates to that of `old`, both of one run; lower is better."""
    random = np.random.default_rng(0)
    before, after = float(np.percentile(old, percent)), float(np.percentile(new, percent))
    ratios = _percentiles(new, percent, random) / np.maximum(_percentiles(old, percent, random), 1e-9)
    low, high = interval(ratios)
    value = after / max(before, 1e-9)
    verdict = "same"
    clear = low > 1 + tolerance
    if abs(after - before) >= NOTICEABLE:
        if clear:
            verdict = "worse"
        elif high < 1 / (1 + tolerance):
            verdict = "better"
        elif value > 1 + tolerance:
            verdict = "unsure"
    return Finding(name, "ratio", before, after, value, low, high, verdict, clear)


def _percentiles(values: FloatArray, percent: float, random: np.random.Generator) -> FloatArray:
    found: FloatArray = np.percentile(resampled(values, random), percent, axis=1)
    return found


# ------------------------------------------------------------------- actions
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
    head = ["metric", "baseline", "this run", "change", "interval", "verdict"]
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
