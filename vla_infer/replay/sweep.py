"""Sweep: the highest camera rate at which the node leaves out less than one observation in twenty."""

from __future__ import annotations

import time
from typing import Any

from vla_infer.errors import ReplayError

from .bag import Bag
from .live import LiveOptions, NodeProcess, play_buffered
from .observe import TopicMap

ALLOWED = 0.05  # share of observations that may be dropped
LOWEST, HIGHEST = 2.0, 120.0  # Hz
_RESOLUTION = 1.1  # the result is within this factor of the limit
_PAUSE = 0.3  # s between two trials, in which what is under way ends


def bisect(trial: Any, *, lowest: float = LOWEST, highest: float = HIGHEST) -> tuple[float | None, list[Any]]:
    """The highest rate for which `trial(rate)` is below ALLOWED, and every (rate, share) in order of trial.

    By bisection on a logarithmic scale, which assumes that a higher rate never drops less; None when even
    the lowest rate drops too much.
    """
    tried = []

    def holds(rate: float) -> bool:
        share = trial(rate)
        tried.append((rate, share))
        return bool(share < ALLOWED)

    if holds(highest):
        return highest, tried
    if not holds(lowest):
        return None, tried
    while highest / lowest > _RESOLUTION:
        middle = (lowest * highest) ** 0.5
        if holds(middle):
            lowest = middle
        else:
            highest = middle
    return lowest, tried


def sweep(player: Any, bag: Bag, topics: TopicMap, options: LiveOptions, node: NodeProcess) -> dict[str, Any]:
    """Play trials of `options.seconds` (4) each. `window`: ns, of the trial at the rate that was found."""
    from .player import at_rate

    seconds = options.seconds or 4.0
    windows: dict[float, tuple[int, int]] = {}

    def trial(rate: float) -> float:
        begun = time.time_ns()
        answered = len(player.answers)
        sent = _images(player)
        # A low rate needs time to show more than a few images.
        length = max(seconds, 20.0 / rate)
        play_buffered(player, at_rate(bag, topics, rate=rate, seconds=length), options, node, length)
        time.sleep(_PAUSE)
        windows[rate] = (begun, time.time_ns())
        number = _images(player) - sent
        if not number:
            raise ReplayError(f"{bag.path}: no image was sent at {rate:g} Hz")
        return max(0.0, 1.0 - (len(player.answers) - answered) / number)

    found, tried = bisect(trial)
    result: dict[str, Any] = {
        "highest_rate_hz": None if found is None else round(found, 3),
        "trials": [{"rate_hz": round(rate, 3), "dropped_share": round(share, 4)} for rate, share in tried],
        "published": player.count,
        "published_late": player.late,
    }
    return result | ({} if found is None else {"window": windows[found]})


def _images(player: Any) -> int:
    return min(len(sent.times) for sent in player.sent.values())
