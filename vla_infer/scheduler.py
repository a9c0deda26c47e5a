"""Action chunks at policy rate in, one command per control tick out. Pure: the time is an argument.

Modes, by how a new chunk takes over from the one in use:

- latest: at the row that is due, so that what inference took is skipped;
- blend: by a weighted mean over the rows both have, from the old to the new;
- ensemble: the weighted mean of every recent chunk, time by time;
- rtc: as latest, and each inference is asked to continue what is left of the plan (`Scheduler.guidance`),
  so that there is little to jump over (real-time chunking, arXiv 2506.07339).

Only the control thread may call it, except `guidance`, `wants` and `started`, which the inference thread
calls: what they read is replaced whole, never changed.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from .chunk import Chunk
from .chunk_mixing import at, blend, ensemble, rows_at
from .delay import DelayEstimate, Trigger
from .safety_options import SchedulerOptions


class Verdict(str, Enum):
    """What became of a chunk."""

    ACCEPTED = "accepted"
    NOT_FINITE = "not finite"  # a NaN or an infinity anywhere in it
    OLDER = "older than the chunk in use"
    REPEATED = "from a frame already used"
    BEFORE_RESET = "observed before the last reset or hold"
    OLD_INSTRUCTION = "made for an instruction that was replaced"
    PAST = "over before it arrived"


@dataclass(frozen=True, eq=False)
class Command:
    """What to send now: values float64 (A,) in ROS units.

    held: nothing is due, the last values are repeated (velocities and efforts are zero). chunk and
    row say where the values come from, chunk being the plan after blending; None and 0 when held.
    """

    values: npt.NDArray[np.float64]
    held: bool
    chunk: Chunk | None
    row: int


@dataclass(frozen=True, eq=False)
class Guidance:
    """What an inference in mode rtc is to continue.

    previous: float32 (L, A) in policy units, row j being what is planned for the observation's instant
    plus j periods; delay: rows that will have been played when the new chunk arrives, 0 <= delay < L;
    horizon: rows of `previous` that have influence, delay <= horizon <= L.
    """

    previous: npt.NDArray[np.float32]
    delay: int
    horizon: int


class Scheduler:
    """Plays a plan made of the accepted chunks: what is due, never what is past, then holds.

    Nothing is sent before the first accepted chunk. Every chunk is taken or refused whole.
    """

    def __init__(
        self, *, zero_on_hold: npt.NDArray[np.bool_], options: SchedulerOptions | None = None
    ) -> None:
        self.options = options or SchedulerOptions()
        self.delay = DelayEstimate()
        self._trigger = Trigger(self.options)
        self._zero_on_hold = zero_on_hold
        self._plan: Chunk | None = None
        self._recent: deque[Chunk] = deque(maxlen=self.options.ensemble_size)
        self._last: npt.NDArray[np.float64] | None = None
        self._newest = -np.inf  # observed_at of the newest chunk ever accepted since the last reset
        self._frame = -1  # sequence of the newest frame that was used; a reset does not free it
        self._generation = 0  # of the instruction; chunks of an older one are refused
        self._refuse_before = -np.inf
        self._holding = False
        self.verdicts: Counter[Verdict] = Counter()

    def add(self, chunk: Chunk, now: float) -> Verdict:
        """Take a chunk into use from `now` on, or say why not."""
        verdict = self._judge(chunk, now)
        self.verdicts[verdict] += 1
        if verdict is Verdict.ACCEPTED:
            self._plan = self._join(chunk, now)
            self._newest = chunk.observed_at
            self._frame = chunk.sequence
            self._holding = False
        return verdict

    def _judge(self, chunk: Chunk, now: float) -> Verdict:
        if not np.isfinite(chunk.commands).all():
            return Verdict.NOT_FINITE
        if chunk.observed_at < self._refuse_before:
            return Verdict.BEFORE_RESET
        if chunk.generation < self._generation:
            return Verdict.OLD_INSTRUCTION
        if chunk.observed_at <= self._newest:
            return Verdict.OLDER
        if chunk.sequence <= self._frame:
            return Verdict.REPEATED
        if chunk.end <= now:
            return Verdict.PAST
        return Verdict.ACCEPTED

    def _join(self, chunk: Chunk, now: float) -> Chunk:
        """The plan that `chunk` makes together with what is planned already."""
        options, plan = self.options, self._plan
        if options.mode == "ensemble":
            while self._recent and self._recent[0].end <= now:
                self._recent.popleft()
            self._recent.append(chunk)
            return ensemble(self._recent, decay=options.ensemble_decay, linear=options.linear)
        if options.mode == "blend" and plan is not None and plan.end > now:
            return blend(plan, chunk, now, steps=options.blend_steps, linear=options.linear)
        return chunk

    def sample(self, now: float) -> Command | None:
        """The command for `now`; None before there was anything to hold."""
        plan = self._plan
        if plan is not None:
            row = plan.row_at(now)
            if row < plan.steps:
                self._last = at(plan, now, linear=self.options.linear)
                return Command(self._last, held=False, chunk=plan, row=row)
        if self._last is None:
            return None
        return Command(np.where(self._zero_on_hold, 0.0, self._last), held=True, chunk=None, row=0)

    def peek(self, now: float) -> npt.NDArray[np.float64] | None:
        """What the plan has for a later instant; None where it is over by then."""
        plan = self._plan
        if plan is None or plan.row_at(now) >= plan.steps:
            return None
        return at(plan, now, linear=self.options.linear)

    def hold(self, now: float) -> None:
        """Drop the plan and keep sending what was sent last, until a chunk observed after the first
        call arrives. To be called at every tick at which the observation is not to be trusted.
        """
        self._drop()
        if not self._holding:
            self._holding = True
            self._refuse_before = now

    def instruct(self, generation: int) -> None:
        """A new instruction is in force; chunks carry the generation of theirs, which only grows.

        With flush_on_instruction the plan is dropped and chunks of older generations are refused; else
        the plan goes on until a chunk of the new one replaces it.
        """
        if generation > self._generation and self.options.flush_on_instruction:
            self._generation = generation
            self._drop()

    def reset(self, now: float) -> None:
        """Forget everything, the last command too: what was observed before `now` has no effect any more."""
        self._drop()
        self._last = None
        self._newest = -np.inf
        self._holding = False
        self._refuse_before = now

    def _drop(self) -> None:
        self._plan = None
        self._recent.clear()

    def planned(self, now: float) -> float:
        """Seconds of the plan still to be played; 0 without one."""
        plan = self._plan
        return max(0.0, plan.end - now) if plan is not None else 0.0

    def started(self, now: float) -> None:
        """An inference starts at `now`."""
        self._trigger.started(now)

    def wants(self, now: float) -> bool:
        """Whether the next inference is wanted now, by the contract's trigger."""
        plan = self._plan
        if plan is None:
            return self._trigger.wants(now, left=0.0, period=0.0, delay=0.0)
        left = max(0.0, plan.end - now)
        return self._trigger.wants(now, left=left, period=plan.period, delay=self.delay.seconds)

    def guidance(self, observed_at: float) -> Guidance | None:
        """What an inference from an observation of `observed_at` is to continue.

        None outside mode rtc, without a plan, and where less is left of it than an inference takes.
        """
        plan = self._plan
        if self.options.mode != "rtc" or plan is None or observed_at < plan.observed_at:
            return None
        left = int((plan.due(plan.steps - 1) - observed_at) / plan.period + 1e-6) + 1
        delay = self.delay.steps(plan.period)
        if left <= delay:
            return None
        times = observed_at + np.arange(left, dtype=np.float64) * plan.period
        previous = rows_at(plan, plan.actions.astype(np.float64), times, linear=self.options.linear)
        horizon = min(self.options.rtc_horizon or left, left)
        return Guidance(previous.astype(np.float32), delay, max(horizon, delay))
