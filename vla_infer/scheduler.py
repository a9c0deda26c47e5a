"""Action chunks in, one command per control tick out. Pure: the time is an argument; one thread only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from .chunk import Chunk


class Verdict(str, Enum):
    """What became of a chunk."""

    ACCEPTED = "accepted"
    NOT_FINITE = "not finite"  # a NaN or an infinity anywhere in it
    OLDER = "older than the chunk in use"
    BEFORE_RESET = "observed before the last reset or hold"
    PAST = "over before it arrived"


@dataclass(frozen=True, eq=False)
class Command:
    """What to send now: values float64 (A,) in ROS units.

    held: nothing is due, the last values are repeated (velocities and efforts are zero). chunk and
    row say where the values come from; None and 0 when held.
    """

    values: npt.NDArray[np.float64]
    held: bool
    chunk: Chunk | None
    row: int


class Scheduler:
    """Plays the newest chunk: each row while it is due, never one that is past, then holds.

    Nothing is sent before the first accepted chunk. Every chunk is taken or refused whole.
    """

    def __init__(self, *, zero_on_hold: npt.NDArray[np.bool_]) -> None:
        self._zero_on_hold = zero_on_hold
        self._chunk: Chunk | None = None
        self._last: npt.NDArray[np.float64] | None = None
        self._newest = -np.inf  # observed_at of the newest chunk ever accepted since the last reset
        self._refuse_before = -np.inf
        self._holding = False
        self.verdicts: Counter[Verdict] = Counter()

    def add(self, chunk: Chunk, now: float) -> Verdict:
        """Take a chunk into use from `now` on, or say why not."""
        verdict = self._judge(chunk, now)
        self.verdicts[verdict] += 1
        if verdict is Verdict.ACCEPTED:
            self._chunk = chunk
            self._newest = chunk.observed_at
            self._holding = False
        return verdict

    def _judge(self, chunk: Chunk, now: float) -> Verdict:
        if not np.isfinite(chunk.commands).all():
            return Verdict.NOT_FINITE
        if chunk.observed_at < self._refuse_before:
            return Verdict.BEFORE_RESET
        if chunk.observed_at <= self._newest:
            return Verdict.OLDER
        if chunk.end <= now:
            return Verdict.PAST
        return Verdict.ACCEPTED

    def sample(self, now: float) -> Command | None:
        """The command for `now`; None before there was anything to hold."""
        chunk = self._chunk
        if chunk is not None:
            row = chunk.row_at(now)
            if row < chunk.steps:
                self._last = chunk.commands[row]
                return Command(self._last, held=False, chunk=chunk, row=row)
        if self._last is None:
            return None
        return Command(np.where(self._zero_on_hold, 0.0, self._last), held=True, chunk=None, row=0)

    def hold(self, now: float) -> None:
        """Drop the chunk in use and keep sending what was sent last, until a chunk observed after the
        first call arrives. To be called at every tick at which the observation is not to be trusted.
        """
        self._chunk = None
        if not self._holding:
            self._holding = True
            self._refuse_before = now

    def reset(self, now: float) -> None:
        """Forget everything, the last command too: what was observed before `now` has no effect any more."""
        self._chunk = None
        self._last = None
        self._newest = -np.inf
        self._holding = False
        self._refuse_before = now
