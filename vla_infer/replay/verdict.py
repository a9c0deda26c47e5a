"""Whether times got worse, from several runs of each side.

Two runs of the same program differ by more than the spread within one tells: processor frequency, the placement of
pages and neighbours in the caches change from process to process. So a run is one value here, whatever the number
of its samples. The ratio of the sides is the median of the ratios of every run to every run of the baseline (Hodges
and Lehmann 1963), its interval the one of the Mann-Whitney test (Bauer 1972): both assume nothing about how times
are distributed, and one odd run among several moves neither much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

LEVEL = 0.95  # of a median's interval
TAIL_LEVEL = 0.99  # of that of p95 and above: a run has few samples there, and its value is often odd
NOTICEABLE = 0.05  # ms: a difference below this is never worse, whatever its ratio
PART = 0.25  # of the tolerance: by how much a part has to change the whole for its change to count


@dataclass(frozen=True)
class Finding:
    """One metric. value: the ratio to the baseline, or a difference or an error as `kind` says; low, high:
    its interval, None where there are too few runs for one; verdict: same, better, worse, unsure, not judged or not
    compared. clear: the whole interval lies beyond the tolerance."""

    name: str
    kind: str
    baseline: float | None
    run: float | None
    value: float | None
    low: float | None
    high: float | None
    verdict: str
    clear: bool = False


@cache
def left_out(old: int, new: int, level: float = LEVEL) -> int | None:
    """How many of the smallest, and of the largest, of the old × new pairs lie outside the interval.

    None where even all pairs together do not reach the level: below 4 runs of each side for LEVEL, below 5 for
    TAIL_LEVEL. The number of pairs below a value follows the Mann-Whitney statistic, whose counts are the
    coefficients of the Gaussian binomial.
    """
    counts = [1]
    for i in range(1, old + 1):
        counts = _times_one_minus(counts, new + i)
        counts = _over_one_minus(counts, i)
    allowed = (1 - level) / 2 * sum(counts)
    below, total = -1, 0
    while total + counts[below + 1] <= allowed:
        below += 1
        total += counts[below]
    return below if below >= 0 else None


def _times_one_minus(counts: list[int], power: int) -> list[int]:
    """The coefficients of a polynomial in q times (1 - q^power)."""
    longer = [*counts, *[0] * power]
    return [value - (longer[k - power] if k >= power else 0) for k, value in enumerate(longer)]


def _over_one_minus(counts: list[int], power: int) -> list[int]:
    """The coefficients of a polynomial in q that (1 - q^power) divides, divided by it."""
    result: list[int] = []
    for k, value in enumerate(counts):
        result.append(value + (result[k - power] if k >= power else 0))
    return result[: len(counts) - power]


def shift(pairs: npt.NDArray[np.float64], level: float = LEVEL) -> tuple[float, float | None, float | None]:
    """Estimate and interval of what each of (old, new) pairs, ratios or differences, says of the two sides."""
    outside = left_out(*pairs.shape, level)
    ordered = np.sort(pairs, axis=None)
    value = float(np.median(ordered))
    if outside is None:
        return value, None, None
    return value, float(ordered[outside]), float(ordered[-1 - outside])


def judge_ratio(
    name: str,
    old: Sequence[float],
    new: Sequence[float],
    *,
    tolerance: float,
    whole: float,
    level: float = LEVEL,
) -> Finding:
    """A time of every run (ms) against that of every run of the baseline; lower is better.

    whole: ms that this is a part of, in the baseline. A change counts that is more than NOTICEABLE and more than
    PART of the tolerance of the whole. What counts is worse (better) when the ratio is beyond the tolerance and the
    interval on that side of 1; unsure when only the ratio is, or when the interval reaches twice as far.
    """
    before = np.maximum(np.asarray(old, np.float64), 1e-9)
    value, low, high = shift(np.asarray(new, np.float64)[None, :] / before[:, None], level)
    middle = float(np.median(before))
    least = max(NOTICEABLE, PART * tolerance * whole) / middle  # as a ratio
    verdict, clear = "same", False
    if low is None or high is None:
        verdict = "not judged"
    elif value > 1 + tolerance and value - 1 >= least:
        verdict = "worse" if low > 1 else "unsure"
        clear = low > 1 + tolerance
    elif value < 1 / (1 + tolerance) and 1 - value >= least and high < 1:
        verdict = "better"
    elif high > (1 + tolerance) ** 2 and high - 1 >= least:
        verdict = "unsure"
    return Finding(name, "ratio", middle, float(np.median(new)), value, low, high, verdict, clear)


def judge_share(name: str, old: Sequence[float], new: Sequence[float], *, tolerance: float) -> Finding:
    """A share of every run against that of every run of the baseline, by their difference."""
    before, after = np.asarray(old, np.float64), np.asarray(new, np.float64)
    value, low, high = shift(after[None, :] - before[:, None])
    verdict, clear = "same", False
    if low is None or high is None:
        verdict = "not judged"
    elif value > tolerance:
        verdict = "worse" if low > 0 else "unsure"
        clear = low > tolerance
    elif value < -tolerance and high < 0:
        verdict = "better"
    elif high > 2 * tolerance:
        verdict = "unsure"
    ends = float(np.median(before)), float(np.median(after))
    return Finding(name, "difference", *ends, value, low, high, verdict, clear)
