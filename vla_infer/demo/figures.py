"""What the demonstration shows, from command stamps and diagnostics to lines of text. No ROS in here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LATE_MS = 2.0  # a tick later than this counts as late
ALLOWED_LATE = 0.01  # share of ticks

Diagnostics = Mapping[
    str, Mapping[str, str]
]  # status name without the node's, such as "control" -> its values


@dataclass(frozen=True)
class Ticks:
    """Commands against the grid of the control rate: lateness (ms) of each, and grid times without one."""

    lateness: NDArray[np.float64]
    missed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Commands a second."""
        return (len(self.lateness) - 1) / self.seconds if self.seconds > 0 else 0.0

    @property
    def due(self) -> int:
        """Grid times in all."""
        return len(self.lateness) + self.missed

    @property
    def late(self) -> int:
        """Ticks that were late, and those that never came."""
        return int((self.lateness > LATE_MS).sum()) + self.missed

    @property
    def late_share(self) -> float:
        return self.late / max(1, self.due)


def ticks(stamps: Sequence[int], rate: float) -> Ticks:
    """Lateness of commands published at `stamps` (ns, ascending) by a timer of `rate` Hz.

    The grid's phase is not known from outside, and the publisher's clock is not the wall clock of the stamps: it is
    found anew every ten seconds, as the one that most commands keep.
    """
    if not stamps:
        return Ticks(np.empty(0), 0, 0.0)
    period = 1e3 / rate
    times = (np.asarray(stamps, np.int64) - stamps[0]) / 1e6  # ms
    parts = list(_windows(times))
    missed = sum(round((b[0] - a[-1]) / period) - 1 for a, b in pairwise(parts) if b[0] - a[-1] > period)
    late: list[NDArray[np.float64]] = []
    for part in parts:
        phase = _phase(part, period)
        slots = np.floor((part - phase + _EARLY_MS) / period)
        # Of several in one slot the first is on time and the others make up for slots that had none.
        _, first = np.unique(slots, return_index=True)
        late.append(np.maximum(0.0, (part - phase - slots * period)[first]))
        missed += int(slots[-1] - slots[0]) + 1 - len(first)
    return Ticks(np.concatenate(late), missed, float(times[-1]) / 1e3)


_EARLY_MS = 1.0  # how far before its grid time a command may be and still belong to it


def _windows(times: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """`times` (ms) in pieces of ten seconds."""
    window = times // 10_000
    for number in np.unique(window):
        yield times[window == number]


def _phase(times: NDArray[np.float64], period: float) -> float:
    """The grid's offset (ms): where the remainders lie most densely, at their early edge."""
    remainders = np.sort(times % period)
    half = (len(remainders) + 1) // 2
    around = np.concatenate([remainders, remainders + period])
    spans = around[half - 1 : half - 1 + len(remainders)] - around[: len(remainders)]
    return float(around[int(spans.argmin())])  # of all arcs that hold half of them, the shortest begins here


def progress(elapsed: float, duration: float, width: int = 20) -> str:
    """A bar such as `[#####...............]  5/20 s`; the seconds alone where there is no end (`duration` 0)."""
    if not duration:
        return f"{elapsed:4.0f} s"
    share = min(1.0, max(0.0, elapsed / duration))
    done = int(share * width)
    return f"[{'#' * done}{'.' * (width - done)}] {min(elapsed, duration):2.0f}/{duration:g} s"


def live_line(elapsed: float, duration: float, recent: Ticks, diagnostics: Diagnostics) -> str:
    """One line: progress, rate of the commands, rate and time of inference, age of the observations."""
    inference = diagnostics.get("inference", {})
    age = diagnostics.get("control", {}).get("observation age at publication p50 ms", "-")
    predict = inference.get("predict p50 ms", "-")
    return (
        f"{progress(elapsed, duration)}  commands {recent.rate:5.1f} Hz  late {recent.late_share:5.1%}"
        f"  inferences {inference.get('inferences', '0'):>5} ({predict} ms)  observation age {age} ms"
    )


def table(measured: Ticks, rate: float, diagnostics: Diagnostics) -> list[str]:
    """The closing table."""
    rows: list[tuple[str, str]] = [
        (
            "commands",
            f"{len(measured.lateness)} in {measured.seconds:.1f} s: {measured.rate:.2f} Hz of {rate:g} Hz",
        )
    ]
    control = diagnostics.get("control", {})
    observations = diagnostics.get("observations", {})
    inference = diagnostics.get("inference", {})
    rows += _ticks_of_the_node(control)
    if len(measured.lateness):
        p50, p95, p99, most = np.percentile(measured.lateness, [50, 95, 99, 100])
        rows.append(
            (
                "commands, seen outside",
                f"p50 {p50:.2f}   p95 {p95:.2f}   p99 {p99:.2f}   max {most:.2f} ms late",
            )
        )
        rows.append(
            (
                f"  more than {LATE_MS:g} ms late",
                f"{measured.late} of {measured.due} ({measured.late_share:.2%})",
            )
        )
    rows += _percentiles("image age at callback", "image age at callback", observations)
    rows += _percentiles("observation age", "observation age at publication", control)
    for key, value in observations.items():
        if key.startswith("received "):
            topic = key.removeprefix("received ")
            rejected = observations.get(f"rejected {topic}", "0")
            rows.append((topic, f"{value} received, {rejected} rejected"))
    rows.append(
        (
            "inference",
            f"{inference.get('inferences', '0')} done, {inference.get('inferences_failed', '0')} failed",
        )
    )
    rows += _percentiles("  one inference", "predict", inference)
    rows += _percentiles("  observation to chunk", "observation to chunk", inference)
    counted = ", ".join(
        f"{observations[key]} {name}"
        for key, name in (
            ("dropped_images", "images dropped"),
            ("ticks_stale", "ticks stale"),
            ("ticks_missing", "ticks without observation"),
        )
        if key in observations
    )
    played = f"{control.get('commands_played', '0')} played, {control.get('commands_held', '0')} held"
    rows.append(("counts", ", ".join(part for part in (played, counted) if part)))
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def successes(simulation: Mapping[str, str]) -> list[str]:
    """A row of how many episodes of a simulation succeeded, of its status's values; none without them."""
    try:
        done, tried = int(simulation["successes"]), int(simulation["episodes"])
    except (KeyError, ValueError):
        return []
    share = f" ({done / tried:.0%})" if tried else ""
    return [f"  succeeded  {done} of {tried} episodes{share}"]


def _ticks_of_the_node(control: Mapping[str, str]) -> list[tuple[str, str]]:
    """The control timer as the node itself saw it, and whether it kept what is asked of it."""
    try:
        due = int(control["ticks"]) + int(control["ticks_missed"])
        late = int(control["ticks_late"]) + int(control["ticks_missed"])
    except (KeyError, ValueError):
        return []
    share = late / max(1, due)
    verdict = "met" if share <= ALLOWED_LATE else "MISSED"
    return [
        *_percentiles("control ticks", "tick lateness", control),
        (
            f"  more than {LATE_MS:g} ms late",
            f"{late} of {due} ({share:.2%}, asked: at most {ALLOWED_LATE:.0%}): {verdict}",
        ),
    ]


def _percentiles(title: str, key: str, values: Mapping[str, str]) -> list[tuple[str, str]]:
    found = [
        (name, values[f"{key} {name} ms"])
        for name in ("p50", "p95", "p99", "max")
        if f"{key} {name} ms" in values
    ]
    return [(title, "   ".join(f"{name} {value}" for name, value in found) + " ms")] if found else []
