"""What the joint plots show: one channel for each joint and quantity of a contract, in the policy's units. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..codecs import JointSample, Setpoint
from ..contract import CommandSink, Contract, StateSource
from ..contract_units import Units

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Channel:
    """One plot. unit: of its numbers, empty where a contract's scale has no name; limits: position, if any."""

    name: str
    quantity: str  # position, velocity or effort
    unit: str
    limits: tuple[float, float] | None


class Channels:
    """Where in a sample (C,) each number of a message belongs; C channels, joints of the command first."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._at: dict[tuple[str, str], int] = {}
        self.all: list[Channel] = []
        for sink in contract.commands:
            for index, joint in enumerate(sink.joints):
                self._add(joint, sink.interface, sink.units, index, sink.limits[index].position)
        for source in contract.states:
            for quantity in source.fields:
                for index, joint in enumerate(source.joints):
                    self._add(joint, quantity, source.units, index, None)

    def _add(
        self, joint: str, quantity: str, units: Units, index: int, limits: tuple[float, float] | None
    ) -> None:
        if (joint, quantity) in self._at:
            return
        self._at[joint, quantity] = len(self.all)
        shown: tuple[float, float] | None = None
        if limits is not None:
            low, high = sorted(_scaled(np.array(limits), units, index, quantity).tolist())
            shown = low, high
        self.all.append(Channel(joint, quantity, _unit(units, index, quantity), shown))

    def measured(self, source: StateSource, sample: JointSample, row: FloatArray) -> None:
        """Put what `sample` has of `source`'s joints in `row` (C,), policy units."""
        there = {name: index for index, name in enumerate(sample.names)}
        for quantity in source.fields:
            values = getattr(sample, quantity)
            for index, joint in enumerate(source.joints):
                if values is not None and joint in there:
                    row[self._at[joint, quantity]] = _scaled(
                        values[there[joint]], source.units, index, quantity
                    )

    def commanded(self, sink: CommandSink, setpoint: Setpoint, row: FloatArray) -> None:
        """Put what `setpoint` asks of `sink`'s joints now in `row` (C,), policy units."""
        names = setpoint.names or sink.joints  # a Float64MultiArray has no names: the contract's order
        now = dict(zip(names, setpoint.values[0].tolist(), strict=False))
        for index, joint in enumerate(sink.joints):
            if joint in now:
                row[self._at[joint, sink.interface]] = _scaled(
                    np.float64(now[joint]), sink.units, index, sink.interface
                )


class Row:
    """The present number of each channel: the newest, unless it is older than `stale` seconds."""

    def __init__(self, size: int, *, stale: float) -> None:
        self._values = np.full(size, np.nan)
        self._at = np.full(size, -np.inf)  # s, when each came
        self._stale = stale

    def take(self, fill: Callable[[FloatArray], None], now: float) -> None:
        """`fill` puts what is new in a row (C,) of NaN; what it leaves stays as it was."""
        row = np.full(len(self._values), np.nan)
        fill(row)
        new = np.isfinite(row)
        self._values[new], self._at[new] = row[new], now

    def present(self, now: float) -> list[float | None]:
        fresh = now - self._at <= self._stale
        return [float(v) if ok else None for v, ok in zip(self._values, fresh, strict=True)]


def _scaled(values: npt.ArrayLike, units: Units, index: int, quantity: str) -> FloatArray:
    offset = units.offset[index] if quantity == "position" else 0.0
    result: FloatArray = np.asarray(values, np.float64) * units.scale[index] + offset
    return result


def _unit(units: Units, index: int, quantity: str) -> str:
    named = {1000.0: "mm", 180.0 / math.pi: "°"} if units.offset[index] == 0.0 else {}
    unit = named.get(units.scale[index], "")
    return f"{unit}/s" if unit and quantity == "velocity" else unit if quantity != "effort" else ""
