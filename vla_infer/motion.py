"""From chunks to what is sent: scheduler, ramp, guard and failsafe in their order. Pure: time is an argument.

The node calls `take` for each chunk and `tick` at control rate, from one thread; nothing here waits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .chunk import Chunk
from .contract import Contract
from .failsafe import Failsafe, Flag, Level, State
from .guard import Guard
from .limits import limit_arrays
from .safety_options import Response
from .scheduler import Command, Scheduler, Verdict

FloatArray = npt.NDArray[np.float64]

#: Every published trajectory ends within this many seconds. A node that is killed must not move the robot for more than
#: 200 ms; 10 ms of them are for the message's way.
TRAJECTORY_END = 0.19


@dataclass(frozen=True, eq=False)
class Outgoing:
    """One control tick. values: float64 (A,) to send in ROS units, None to send nothing.

    held: the last position is repeated, velocities and efforts go or are at zero. chunk, row: what is
    played, None and 0 when held. state: the failsafe's.
    """

    values: FloatArray | None
    held: bool
    chunk: Chunk | None
    row: int
    state: State


class Motion:
    """The only way from a chunk to the wire."""

    def __init__(self, contract: Contract, period: float) -> None:
        self.contract = contract
        self.period = period
        self._limits = limit_arrays(contract, period)
        self._position = self._limits.position
        self.scheduler = Scheduler(zero_on_hold=~self._position, options=contract.scheduler)
        self.guard = Guard(self._limits, contract.guard)
        self.failsafe = Failsafe(contract.failsafe)
        self.counts: Counter[str] = Counter()
        self._options = contract.failsafe
        self._sent: FloatArray | None = None  # the last values sent
        self._held_since = -np.inf
        self._held_from: FloatArray | None = None  # what was sent when the hold began
        self._resumed_at = -np.inf
        self._moving = False
        self._warnings: dict[Flag, str] = {}  # of chunks and commands since the last tick

    @property
    def unlimited(self) -> tuple[str, ...]:
        """Names of the joints that have no limit at all."""
        return self._limits.unlimited

    def start(self, now: float) -> None:
        """An operator activates the node: forget what was sent before."""
        self.scheduler.reset(now)
        self.failsafe.activate()
        self._warnings.clear()
        self._sent = None
        self._moving = False
        self._held_since, self._held_from = -np.inf, None
        self.stand(np.full(self._limits.size, np.nan))

    @property
    def unsent(self) -> bool:
        """Whether nothing was sent since the start, so that where the robot stands is the robot's to say."""
        return self._sent is None

    def stand(self, measured: FloatArray) -> None:
        """Before anything is sent: the robot stands at `measured` (A,), NaN where that is not known and for
        velocities and efforts. It is from there that the first motion is limited and ramped."""
        problem = self.guard.start(measured)
        if problem:
            self.failsafe.latch(Flag.UNSAFE_START, problem)

    def take(self, chunk: Chunk, now: float) -> tuple[Verdict | None, str]:
        """A chunk arrives. The scheduler's verdict, None when the guard refused; and why, for a log."""
        checked = self.guard.check(chunk)
        if checked.chunk is None:
            if checked.outcome is Response.TRIP:
                self.failsafe.latch(Flag.TRIPPED, checked.reason)
            self._warnings[Flag.CHUNK_REFUSED] = checked.reason
            return None, checked.reason
        verdict = self.scheduler.add(checked.chunk, now)
        if verdict is Verdict.ACCEPTED:
            return verdict, ""
        self._warnings[Flag.CHUNK_REFUSED] = verdict.value
        return verdict, verdict.value

    def tick(self, now: float, raised: Mapping[Flag, str], frames: int) -> Outgoing:
        """One control tick: what to send and why. raised, frames: as for `Failsafe.assess`."""
        flags = {**self._warnings, **raised}
        self._warnings.clear()
        state = self.failsafe.assess(flags, frames)
        if state.drops_plan:
            self.scheduler.hold(now)
        command = None
        if state.level < Level.HOLD:
            command = self.scheduler.sample(now)
            if command is None or command.held:
                flags[Flag.NO_PLAN] = ""
                state = self.failsafe.assess(flags, frames)
        if command is None or state.level >= Level.HOLD:
            return self._hold(now, state)
        return self._play(command, now, state)

    def _play(self, command: Command, now: float, state: State) -> Outgoing:
        if not self._moving:
            self._moving, self._resumed_at = True, now
        checked = self.guard.command(self._ramped(command.values, now))
        if checked.outcome is not None:
            self.counts[checked.outcome.value] += 1
        if checked.outcome is Response.TRIP:
            self.failsafe.latch(Flag.TRIPPED, checked.reason)
            return self._hold(now, self.failsafe.assess({}, 0))
        if checked.values is None:
            return Outgoing(None, held=True, chunk=None, row=0, state=state)
        self._sent = checked.values
        if checked.outcome is Response.REJECT:
            self._warnings[Flag.COMMAND_REFUSED] = checked.reason
            return Outgoing(self._sent, held=True, chunk=None, row=0, state=state)
        if checked.outcome is Response.CLAMP:
            self._warnings[Flag.CLAMPED] = checked.reason
        return Outgoing(self._sent, held=False, chunk=command.chunk, row=command.row, state=state)

    def _ramped(self, values: FloatArray, now: float) -> FloatArray:
        """After a hold: from where it stood to the plan, by a weight that grows to 1 over resume_ramp."""
        ramp, stood = self._options.resume_ramp, self._held_position()
        elapsed = now - self._resumed_at
        if stood is None or elapsed >= ramp or elapsed < 0.0:
            return values
        # A tick's worth at the first tick: full weight is reached after the ramp, not one tick later.
        part = min(1.0, (elapsed + self.period) / ramp)
        return stood * (1.0 - part) + values * part

    def _held_position(self) -> FloatArray | None:
        """Where the last hold left the robot: positions, and zero for velocities and efforts."""
        stood = self._held_from if self._held_from is not None else self.guard.last
        return None if stood is None else np.where(self._position, stood, 0.0)

    def _hold(self, now: float, state: State) -> Outgoing:
        if self._moving or self._held_from is None:
            self._moving = False
            self._held_since, self._held_from = now, self._sent
        if self._held_from is None:
            return Outgoing(None, held=True, chunk=None, row=0, state=state)
        ramp = self._options.hold_ramp
        left = 1.0 - (now - self._held_since + self.period) / ramp if ramp > 0.0 else 0.0
        if state.flag is Flag.EMERGENCY_STOP or not 0.0 < left < 1.0:
            left = 0.0
        values = np.where(self._position, self._held_from, self._held_from * left)
        self.guard.sent(values)
        self._sent = values
        return Outgoing(values, held=True, chunk=None, row=0, state=state)

    def still(self, now: float) -> FloatArray | None:
        """What to send last of all: the position sent last, zero velocity and effort; None if nothing was."""
        self.scheduler.hold(now)
        if self._sent is None:
            return None
        self._sent = np.where(self._position, self._sent, 0.0)
        self.guard.sent(self._sent)
        return self._sent

    @property
    def at_rest(self) -> bool:
        """Whether the last values sent keep every joint where it is."""
        return self._sent is None or (not self._moving and not self._sent[~self._position].any())

    def preview(self, now: float, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What the next ticks will send if nothing changes: values (T, A), times (T,) in seconds from now.

        The first row is `values`, just decided, one period ahead; the last is due at TRAJECTORY_END at
        the latest. Within the same limits as everything that is sent.
        """
        ahead, rows = self.guard.fork(), [values]
        for tick in range(1, max(1, int(TRAJECTORY_END / self.period + 1e-6))):
            planned = self.scheduler.peek(now + tick * self.period)
            if planned is None:
                break
            checked = ahead.command(self._ramped(planned, now + tick * self.period))
            if checked.values is None or checked.outcome in (Response.REJECT, Response.TRIP):
                break
            rows.append(checked.values)
        return np.array(rows), np.arange(1, len(rows) + 1, dtype=np.float64) * self.period


def measured_positions(contract: Contract, states: Sequence[npt.NDArray[np.float32] | None]) -> FloatArray:
    """Where the robot stands, in ROS units: (A,) of the joints that a command moves and a state names.

    states: the newest vector of each source in policy units, None before the first. NaN for velocities
    and efforts, and for a joint that no source or more than one names. Where two arms have the same joint
    names, the first command is that of the first source and so on.
    """
    found = []
    for index, command in enumerate(contract.commands):
        for joint in command.joints:
            sources = [
                number
                for number, source in enumerate(contract.states)
                if joint in source.joints and "position" in source.fields
            ]
            if len(sources) > 1 and len(contract.states) == len(contract.commands) and index in sources:
                sources = [index]
            value = math.nan
            vector = states[sources[0]] if len(sources) == 1 else None
            if vector is not None and command.interface == "position":
                source = contract.states[sources[0]]
                start = source.fields.index("position") * len(source.joints)
                positions = source.units.to_ros(vector[start : start + len(source.joints)].astype(np.float64))
                value = float(positions[source.joints.index(joint)])
            found.append(value)
    return np.array(found)
