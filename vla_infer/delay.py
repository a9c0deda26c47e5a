"""How long an observation takes to become a chunk, and when the next inference is wanted. Pure."""

from __future__ import annotations

import math

from .safety_options import SchedulerOptions

_KEPT = 8


class DelayEstimate:
    """The longest of the last eight delays: safe against jitter, and a spike is forgotten after eight.

    One thread adds, any thread reads.
    """

    def __init__(self) -> None:
        self._kept: tuple[float, ...] = ()
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Note one delay in seconds; what is no duration is ignored."""
        if not math.isfinite(seconds) or seconds < 0.0:
            return
        self._kept = (*self._kept[1 - _KEPT :], seconds)
        self.seconds = max(self._kept)

    def steps(self, period: float) -> int:
        """Rows of `period` seconds that are played while an inference is under way, rounded up."""
        return math.ceil(self.seconds / period - 1e-6)


class Trigger:
    """Whether to infer now: always, at a rate, or when little of the plan is left."""

    def __init__(self, options: SchedulerOptions) -> None:
        self._options = options
        self._started = -math.inf

    def started(self, now: float) -> None:
        """An inference starts at `now`."""
        self._started = now

    def wants(self, now: float, *, left: float, period: float, delay: float) -> bool:
        """left: seconds of the plan still to be played, 0 without one; delay: the estimate in seconds."""
        if self._options.trigger == "rate":
            # Also after the clock was set back.
            return not 0.0 <= now - self._started < 1.0 / self._options.trigger_rate - 1e-6
        if self._options.trigger == "horizon":
            return left <= self._options.horizon_left * period + delay
        return True


class InferenceWatchdog:
    """After how long an inference that has not returned counts as hanging.

    The contract's inference_timeout; where that is 0, the larger of `least` and five times the slowest of
    the last inferences, and a minute for the first one, of which nothing is known.
    """

    FIRST, TIMES = 60.0, 5.0
    #: least, in seconds, for a GPU, whose driver can hang, and for a CPU, which other work may take away.
    GPU, CPU = 1.0, 10.0

    def __init__(self, timeout: float, *, least: float = GPU) -> None:
        self._timeout = timeout
        self._least = least
        self._durations = DelayEstimate()

    def add(self, seconds: float) -> None:
        """Note how long an inference took."""
        self._durations.add(seconds)

    @property
    def limit(self) -> float:
        """Seconds."""
        if self._timeout > 0.0:
            return self._timeout
        slowest = self._durations.seconds
        return max(self._least, self.TIMES * slowest) if slowest > 0.0 else self.FIRST
