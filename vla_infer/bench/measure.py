"""Times of calls: alone, and of two programs in turn, with what a ratio is worth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = (50, 95, 99, 100)
CONFIDENCE = 0.95
# Between two programs' calls: worker threads that spin for a while after their work have gone to sleep by then.
PAUSE = 0.02  # s

Call = Callable[[int], object]
Times = npt.NDArray[np.float64]


def timed(call: Call, i: int) -> float:
    """Seconds of call `i`."""
    start = time.perf_counter()
    call(i)
    return time.perf_counter() - start


def measure(call: Call, *, runs: int, warmup: int) -> Times:
    """Seconds of `runs` calls after `warmup` that do not count; the call gets its number."""
    for i in range(warmup):
        call(i)
    return np.array([timed(call, i) for i in range(runs)])


def in_turn(ours: Call, theirs: Call, *, pairs: int, warmup: int) -> tuple[Times, Times]:
    """Seconds of ours, theirs, ours, theirs, ...: `pairs` of each after `warmup` of each, on the same inputs."""
    mine, other = np.empty(pairs), np.empty(pairs)
    for i in range(-warmup, pairs):
        a = timed(ours, i)
        time.sleep(PAUSE)
        b = timed(theirs, i)
        time.sleep(PAUSE)
        if i >= 0:
            mine[i], other[i] = a, b
    return mine, other


def percentiles(times: Times) -> dict[str, float]:
    """p50, p95, p99 and max in milliseconds."""
    values = np.percentile(times, PERCENTILES) * 1e3
    return {
        ("max" if p == 100 else f"p{p}"): round(float(v), 4) for p, v in zip(PERCENTILES, values, strict=True)
    }


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of pairs, an interval around it, and the chance that the interval holds the true median
    if pairs are independent."""

    median: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def json(self) -> dict[str, Any]:
        return {
            "median": round(self.median, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "confidence": round(self.confidence, 4),
        }


def ratio(theirs: Times, ours: Times) -> Ratio:
    """How many times longer theirs took, pair by pair.

    The interval is between order statistics: the k-th lowest and k-th highest of n ratios hold the median with
    probability 1 - 2 P(B < k), B binomial (n, 1/2). The narrowest with at least `CONFIDENCE`, else all of them
    (fewer than 6 pairs cannot reach 95 %).
    """
    ratios = np.sort(theirs / ours)
    n = len(ratios)
    k, tail = 1, 0.5**n
    while k < n / 2:
        wider = tail + math.comb(n, k) * 0.5**n
        if 1 - 2 * wider < CONFIDENCE:
            break
        k, tail = k + 1, wider
    middle = float(np.median(ratios))
    return Ratio(middle, float(ratios[k - 1]), float(ratios[n - k]), max(0.0, 1 - 2 * tail))
