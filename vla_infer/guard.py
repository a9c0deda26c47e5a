"""The last word before the wire: finite, then limits, then rates. Pure; a NaN never passes.

A chunk is checked whole before its first action is played, and every command again before it is sent,
since blending, interpolation and ramps make new numbers. What happens is set kind by kind: clamp and
count, reject, or trip (`GuardOptions`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .chunk import Chunk
from .limits import UNLIMITED, LimitArrays
from .safety_options import GuardOptions, Response

FloatArray = npt.NDArray[np.float64]
_TOLERANCE = 1e-6  # relative: less than this beyond a limit is rounding, not a violation


@dataclass(frozen=True, eq=False)
class Checked:
    """What the guard makes of a command. values float64 (A,): what may be sent; None for nothing, where it
    is not known at what position a joint would stay.

    outcome: None when it passed, else the worst response it met with; reason: one line.
    """

    values: FloatArray | None
    outcome: Response | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class CheckedChunk:
    """chunk: what may be played, None when refused. outcome and reason as in Checked."""

    chunk: Chunk | None
    outcome: Response | None = None
    reason: str = ""


def braking_step(distance: FloatArray, second: FloatArray) -> FloatArray:
    """The largest step that still lets the motion stop within `distance`, losing `second` each tick.

    A step x is followed by x - a, x - 2a, … until zero (a = second). With n whole reductions their sum
    with x itself is (n + 1) x - a n (n + 1) / 2, so x = (distance + a n (n + 1) / 2) / (n + 1) with the
    largest n for which a n (n + 1) / 2 <= distance. All arrays (A,), distance >= 0, second > 0.
    """
    n = np.floor((np.sqrt(1.0 + 8.0 * distance / second) - 1.0) / 2.0)
    step: FloatArray = distance / (n + 1.0) + second * n / 2.0
    return step


class Guard:
    """Keeps a stream of commands within limits. One thread; `counts` by kind of violation."""

    def __init__(self, limits: LimitArrays, options: GuardOptions | None = None) -> None:
        self.limits = limits
        self.options = options or GuardOptions()
        self.counts: Counter[str] = Counter()
        self._last = np.zeros(limits.size)  # what was sent last
        self._known = ~limits.position  # of each number: is _last what the robot was told, or nothing yet
        self._change = np.zeros(limits.size)  # from the command before to the last
        self._target = np.zeros(limits.size)  # what was asked for last

    def start(self, measured: FloatArray) -> str:
        """Forget what was sent; the robot stands at `measured` (A,), NaN where that is not known.

        Returns why it must not move from there, empty when it may: a joint that stands outside its limits
        by more than one step would have to jump, or be driven through what the limits forbid.
        """
        limits = self.limits
        known = np.isfinite(measured)
        self._known = known | ~limits.position
        start = np.where(limits.position & known, np.where(known, measured, 0.0), 0.0)
        self._last = np.clip(start, limits.low, limits.high)
        self._target = self._last.copy()
        self._change = np.zeros(limits.size)
        beyond = np.abs(start - self._last) > np.minimum(limits.rate, 0.1)
        if (limits.position & known & beyond).any():
            joint = int(np.flatnonzero(limits.position & known & beyond)[0])
            return self._outside(joint, start[joint]) + "; move it inside by hand, or mend the limits"
        return ""

    def _outside(self, joint: int, value: float) -> str:
        low, high = self.limits.low[joint], self.limits.high[joint]
        return f"'{self.limits.names[joint]}' is at {value:.6g}, outside [{low:.6g}, {high:.6g}]"

    # ------------------------------------------------------------------ chunk
    def check(self, chunk: Chunk) -> CheckedChunk:
        """A whole chunk before its first action. Clamping here concerns values; changes from tick to tick
        are clamped when they are sent. No number of the result is beyond low and high."""
        limits, commands = self.limits, chunk.commands
        if commands.shape[1] != limits.size or not np.isfinite(commands).all():
            return self._refused("not_finite", f"chunk {chunk.sequence}: a number is not finite")
        slack = _TOLERANCE * (1.0 + np.maximum(np.abs(limits.low), np.abs(limits.high)))
        beyond = (commands < limits.low - slack) | (commands > limits.high + slack)
        if beyond.any():
            row, joint = (int(place[0]) for place in np.nonzero(beyond))
            reason = f"row {row}: {self._outside(joint, commands[row, joint])}"
            kind = "position" if limits.position[joint] else "velocity"
            if self._response(kind) is not Response.CLAMP:
                return self._refused(kind, f"chunk {chunk.sequence}: {reason}")
            self.counts[f"chunk_{kind}"] += 1
        clipped = np.clip(commands, limits.low, limits.high)
        for kind, excess in self._changes(clipped, chunk.period):
            if excess.any():
                row, joint = (int(place[0]) for place in np.nonzero(excess))
                if self._response(kind) is not Response.CLAMP:
                    name = limits.names[joint]
                    return self._refused(
                        kind, f"chunk {chunk.sequence}: row {row + 1}: '{name}' exceeds its {kind}"
                    )
                self.counts[f"chunk_{kind}"] += 1
        return CheckedChunk(replace(chunk, commands=clipped))

    def _changes(self, commands: FloatArray, period: float) -> list[tuple[str, npt.NDArray[np.bool_]]]:
        """(kind, bool (rows, A)) of the changes between rows that exceed a limit."""
        limits = self.limits
        first = np.abs(np.diff(commands, axis=0))
        second = np.abs(np.diff(commands, n=2, axis=0))
        wide = 1.0 + _TOLERANCE
        # A row lasts period / P ticks, over which its change is spread when the scheduler interpolates.
        ticks = max(1.0, period / limits.period)
        found = [("step", first > limits.step * ticks * wide)]
        position = limits.position
        found.append(("velocity", position & (first > limits.velocity * period * wide)))
        found.append(("acceleration", position & (second > limits.acceleration * period**2 * wide)))
        found.append(("acceleration", ~position & (first > limits.acceleration * period * wide)))
        return found

    def _response(self, kind: str) -> Response:
        response: Response = getattr(self.options, kind)
        return response

    def _refused(self, kind: str, reason: str) -> CheckedChunk:
        self.counts[f"chunk_{kind}"] += 1
        return CheckedChunk(None, self._response(kind), reason)

    # ---------------------------------------------------------------- command
    def command(self, target: FloatArray) -> Checked:
        """One command before the wire; what it returns is taken as sent.

        Rejected or tripped: the values are those sent last (zero for velocities and efforts).
        """
        limits = self.limits
        if target.shape != (limits.size,) or not np.isfinite(target).all():
            self.counts["not_finite"] += 1
            return self._stay(self.options.not_finite, "a command is not finite")
        values, kinds = self._within(target)
        outcome, reason = None, ""
        for kind, excess in kinds:
            if not excess.any():
                continue
            joint = int(np.flatnonzero(excess)[0])
            self.counts[kind] += 1
            response = self._response(kind)
            if outcome is None or _SEVERITY[response] > _SEVERITY[outcome]:
                outcome = response
                reason = f"'{limits.names[joint]}' exceeds its {kind}: {target[joint]:.6g} asked for"
        if outcome in (Response.REJECT, Response.TRIP):
            return self._stay(outcome, reason)
        self._change = np.where(self._known, values - self._last, 0.0)
        self._last, self._target = values, target
        self._known = np.ones(limits.size, dtype=np.bool_)
        return Checked(values, outcome, reason)

    def _within(self, target: FloatArray) -> tuple[FloatArray, list[tuple[str, npt.NDArray[np.bool_]]]]:
        """The nearest to `target` (A,) that keeps every limit from here on, and what had to give way."""
        limits = self.limits
        inside = np.clip(target, limits.low, limits.high)
        last = np.where(self._known, self._last, inside)
        change = np.where(self._known, self._change, 0.0)
        wanted = inside - last
        rate, second = limits.rate, limits.second
        # Braking is planned a little gentler than allowed: rounding then never asks for more than allowed.
        gentle = second * 0.999
        # Close the gap to a moving target without overshooting it: brake relative to the target's motion.
        moved = np.where(self._known, inside - np.clip(self._target, limits.low, limits.high), 0.0)
        gap = wanted - moved
        tracked = moved + np.copysign(np.minimum(np.abs(gap), braking_step(np.abs(gap), gentle)), gap)
        least = np.maximum(change - second, -rate)
        most = np.minimum(change + second, rate)
        # Never so fast towards a limit that it could not stop before it.
        least = np.maximum(least, -braking_step(np.maximum(last - limits.low, 0.0), gentle))
        most = np.minimum(most, braking_step(np.maximum(limits.high - last, 0.0), gentle))
        step = np.minimum(np.maximum(np.where(second < UNLIMITED * 0.5, tracked, wanted), least), most)
        values = np.clip(last + step, limits.low, limits.high)
        slack = _TOLERANCE * (1.0 + np.abs(last))
        short = np.abs(wanted - step) > slack
        over_rate = short & (np.abs(wanted) > rate)
        by_step = limits.step * (1.0 - 1e-9) <= rate
        position = limits.position
        out = np.abs(target - inside) > _TOLERANCE * (1.0 + np.abs(inside))
        return values, [
            ("position", out & position),
            ("velocity", (out & ~position) | (over_rate & ~by_step & position)),
            ("acceleration", (over_rate & ~by_step & ~position) | (short & ~over_rate)),
            ("step", over_rate & by_step),
        ]

    def _stay(self, outcome: Response, reason: str) -> Checked:
        if not self._known.all():
            return Checked(None, outcome, reason)
        values = np.where(self.limits.position, self._last, 0.0)
        self.sent(values)
        return Checked(values, outcome, reason)

    def sent(self, values: FloatArray) -> None:
        """Something was sent past the guard: a hold, which is always allowed. The motion stands."""
        self._last, self._target = values, values
        self._change = np.zeros(self.limits.size)

    @property
    def last(self) -> FloatArray | None:
        """What was sent last (A,), or where the robot was said to stand; None where a joint is unknown."""
        return self._last if self._known.all() else None

    def fork(self) -> Guard:
        """A guard in the same state, to look ahead with; its counts are its own."""
        twin = Guard(self.limits, self.options)
        twin._last, twin._known = self._last, self._known
        twin._change, twin._target = self._change, self._target
        return twin


_SEVERITY = {Response.CLAMP: 0, Response.REJECT: 1, Response.TRIP: 2}
