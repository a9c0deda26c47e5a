"""Several runs of a replay, each in a process of its own, and what is run again when they leave doubt."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vla_infer
from vla_infer.contract_parse import one_line
from vla_infer.errors import ReplayError

from . import report
from .compare import Comparison, Judging, compare
from .resources import machine
from .runs import LEAST, OTHERS, disturbance_of, merge, quiet

IN_TURN = 7  # runs of each side with --against-python: one odd run of each side leaves the verdict as it is
# What concerns the runs together, or where a run writes to.
_OF_ALL = (
    "bag", "json", "markdown", "html", "record", "against", "against_python", "repeat", "patience", "actions_only",
    "tolerance", "action_tolerance", "quiet",
)  # fmt: skip
Run = Callable[[], dict[str, Any]]
_ROOT = str(Path(vla_infer.__file__).resolve().parents[1])
# Python puts the working directory first, where another copy of the package may lie: each side gets its own.
_OURS = "import os, sys; p = sys.path[1:]; sys.path[:] = [r for r in [{root!r}] if r not in p] + p; "
_THEIRS = "import os, sys; sys.path[:] = [p for p in sys.path[1:] if os.path.realpath(p) != {root!r}]; "
_MAIN = "from vla_infer.cli import main; sys.exit(main(['replay', *sys.argv[1:]]))"


def judging(args: argparse.Namespace) -> Judging:
    return Judging(
        args.tolerance, args.action_tolerance, times=not args.actions_only, turns=bool(args.against_python)
    )


def default_number(args: argparse.Namespace, baseline: dict[str, Any] | None) -> int:
    """How many runs without --repeat: actions need one, times as many as were asked for of the baseline."""
    if args.actions_only or args.record:
        return 1
    if args.against_python:
        return IN_TURN
    if baseline is None or len(quiet(baseline)) < LEAST:
        return 1  # times cannot be judged
    return int(baseline["settings"].get("repeat") or 1)


def words(args: argparse.Namespace) -> list[str]:
    """The words of the command line that one run has in common with all of them."""
    found = [str(args.bag)]
    for name, value in vars(args).items():
        option = "--" + name.replace("_", "-")
        if name in _OF_ALL or value is None or value is False:
            continue
        if value is True:
            found.append(option)
        else:
            found += [f"{option}={one}" for one in (value if isinstance(value, list) else [value])]
    return found


def measure(
    args: argparse.Namespace, number: int, baseline: dict[str, Any] | None
) -> tuple[dict[str, Any], Comparison | None]:
    """`number` undisturbed runs, where that many can be had, of this side, and of the other with --against-python.

    Where the verdict hangs on a doubt, as many once more. The report of this side, and the verdict.
    """
    with tempfile.TemporaryDirectory(prefix="vla_replay_") as folder:
        ours, theirs = _Side(args, number, Path(folder)), None
        if args.against_python:
            theirs = _Side(args, number, Path(folder), other=args.against_python)
        sides = [side for side in (theirs, ours) if side is not None]
        patience = Patience(args)
        in_turn([side.run for side in sides], number, patience)
        document = ours.report()
        if theirs is not None:
            baseline = theirs.report()
        elif baseline is None and (good := len(quiet(document))) < min(number, LEAST):
            _say(
                args,
                f"only {good} of {len(ours.documents)} runs were undisturbed; as a baseline of times it needs {LEAST}",
            )
        verdict = compare(baseline, document, judging(args)) if baseline is not None else None
        if baseline is not None and verdict is not None and verdict.doubtful and not args.actions_only:
            first = len(ours.documents)
            _say(args, "in doubt, so it is measured again")
            in_turn([side.run for side in sides], number, patience)
            document = ours.report()
            baseline = theirs.report() if theirs is not None else baseline
            verdict = compare(baseline, document, judging(args), further=merge(ours.documents[first:]))
        if args.html:
            args.html.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ours.page_of(document), args.html)
        return document, verdict


def in_turn(sides: list[Run], number: int, wait: Callable[[], None]) -> None:
    """Run the sides one after another, again and again, until each has `number` undisturbed runs; at most twice as
    often. wait: called after a disturbed one."""
    good = [0] * len(sides)
    for _ in range(2 * number):
        for k, run in enumerate(sides):
            if disturbance_of(run()) is None:
                good[k] += 1
            else:
                wait()
        if min(good) >= number:
            return


class Patience:
    """Waits until others leave the processors alone, for `--patience` seconds in all."""

    def __init__(self, args: argparse.Namespace, *, interval: float = 2.0) -> None:
        self._args, self._left, self._interval = args, float(args.patience), interval

    def __call__(self) -> None:
        waited = 0.0
        while self._left > 0 and self._busy():
            waited += self._interval
        if waited:
            _say(
                self._args,
                f"waited {waited:.0f} s for others; {max(0.0, self._left):.0f} s of --patience left",
            )

    def _busy(self) -> bool:
        """Whether others used more than a run allows of the processors in the next `interval` seconds."""
        before = machine()[0]
        time.sleep(self._interval)
        self._left -= self._interval
        used = (machine()[0] - before) / (self._interval * len(os.sched_getaffinity(0)))
        return 100 * used > OTHERS


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"replay: {text}", file=sys.stderr, flush=True)


class _Side:
    """One side's runs, with the program that makes them."""

    def __init__(self, args: argparse.Namespace, number: int, folder: Path, *, other: str = "") -> None:
        self._args, self._number = args, number
        self._python = other or sys.executable
        self._program = (_THEIRS if other else _OURS).format(root=_ROOT) + _MAIN
        self._stem = str(folder / ("baseline" if other else "run"))
        self._label = " of the baseline" if other else ""
        self.documents: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """One run in a process of its own. Raises ReplayError with what it said where it failed."""
        number = len(self.documents) + 1
        stem = f"{self._stem}-{number}"
        outputs = [f"--json={stem}.json", "--quiet"] + ([f"--html={stem}.html"] if self._args.html else [])
        command = [self._python, "-c", self._program, *words(self._args), *outputs]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise ReplayError(
                f"--against-python {self._python}: {error.strerror}; expected a Python"
            ) from error
        if done.returncode:
            lines = (
                done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["it said nothing"]
            )
            said = one_line(lines[-1].removeprefix("vla-infer replay: "), limit=300)
            raise ReplayError(f"run {number}{self._label} ended with status {done.returncode}: {said}")
        document = report.read(Path(f"{stem}.json"))
        # What was asked for, rather than the words that a run of it got.
        document["settings"]["command"] = "vla-infer " + " ".join(sys.argv[1:])
        document["settings"]["repeat"] = self._number
        self.documents.append(document)
        disturbed = disturbance_of(document)
        middle = (document["latency_ms"].get("inference") or {}).get("p50", 0.0)
        note = f", disturbed: {disturbed}" if disturbed else ""
        _say(self._args, f"run {number}{self._label}: inference p50 {middle:.2f} ms{note}")
        return document

    def report(self) -> dict[str, Any]:
        return merge(self.documents)

    def page_of(self, document: dict[str, Any]) -> Path:
        """The page of the run that the report is of."""
        at = next(k for k, one in enumerate(self.documents) if one["trace"] is document["trace"])
        return Path(f"{self._stem}-{at + 1}.html")
