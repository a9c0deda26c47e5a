"""The limits of every number of an action as arrays, from the contract: what the guard computes with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .contract import Contract

FloatArray = npt.NDArray[np.float64]
# Stands for "no limit". Finite, so that no formula meets inf - inf; beyond it a number means nothing.
UNLIMITED = 1e100
# A limit is kept with this margin, so that rounding of last + change never exceeds it.
_MARGIN = 1.0 - 1e-9


@dataclass(frozen=True, eq=False)
class LimitArrays:
    """One entry per number of an action, in ROS units; UNLIMITED where there is no limit.

    low, high: of the value (a position, or the magnitude of a velocity or effort); rate, second: largest
    change, and largest change of the change, from one control tick to the next; velocity, acceleration:
    the same two per second, as a chunk is checked; step: of the contract; position: bool, the number is
    a position.
    """

    names: tuple[str, ...]
    position: npt.NDArray[np.bool_]
    low: FloatArray
    high: FloatArray
    velocity: FloatArray
    acceleration: FloatArray
    step: FloatArray
    period: float  # s, of the control ticks

    @cached_property
    def rate(self) -> FloatArray:
        per_tick = np.where(self.position, self.velocity, self.acceleration) * self.period
        rate: FloatArray = np.where(per_tick < UNLIMITED * self.period, per_tick, UNLIMITED)
        return np.minimum(rate, self.step) * _MARGIN

    @cached_property
    def second(self) -> FloatArray:
        limited = self.position & (self.acceleration < UNLIMITED)
        second: FloatArray = np.where(limited, self.acceleration * self.period**2, UNLIMITED) * _MARGIN
        return second

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def unlimited(self) -> tuple[str, ...]:
        """Names of the numbers that have no limit at all."""
        free = (self.rate >= UNLIMITED * _MARGIN) & (self.high >= UNLIMITED)
        return tuple(name for name, is_free in zip(self.names, free, strict=True) if is_free)

    @property
    def loose(self) -> tuple[str, ...]:
        """Names of the positions whose change nothing bounds, and of the velocities and efforts unbounded."""
        free = np.where(self.position, self.rate >= UNLIMITED * _MARGIN, self.high >= UNLIMITED)
        return tuple(name for name, is_free in zip(self.names, free, strict=True) if is_free)


def limit_arrays(contract: Contract, period: float) -> LimitArrays:
    """The limits of `contract` for control ticks of `period` seconds."""
    rows = []
    for command in contract.commands:
        for limits in command.limits:
            is_position = command.interface == "position"
            bound = {"position": None, "velocity": limits.velocity, "effort": limits.effort}[
                command.interface
            ]
            low, high = limits.position or (-(bound or UNLIMITED), bound or UNLIMITED)
            rows.append(
                (
                    is_position,
                    low,
                    high,
                    limits.velocity or UNLIMITED,
                    limits.acceleration or UNLIMITED,
                    limits.step or UNLIMITED,
                )
            )
    columns = list(zip(*rows, strict=True))
    arrays = [np.array(column, dtype=np.float64) for column in columns[1:]]
    return LimitArrays(
        names=tuple(joint for command in contract.commands for joint in command.joints),
        position=np.array(columns[0], dtype=np.bool_),
        low=arrays[0],
        high=arrays[1],
        velocity=arrays[2],
        acceleration=arrays[3],
        step=arrays[4],
        period=period,
    )
