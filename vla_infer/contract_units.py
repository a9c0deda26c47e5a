"""Units and limits of a contract: how a policy's numbers and a robot's relate, joint by joint."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .contract_parse import Section, nearest, one_line

_NAMED = {"rad": 1.0, "deg": 180.0 / math.pi, "m": 1.0, "mm": 1000.0}
# What a scale may be: beyond this a contract says something other than a change of units.
_LOW, _HIGH = 1e-6, 1e6

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Units:
    """policy = scale × ros + offset, one pair per joint. Rates of change are scaled without the offset."""

    scale: tuple[float, ...]
    offset: tuple[float, ...]

    def to_policy(self, values: FloatArray) -> FloatArray:
        """ROS values (..., joints) in the policy's units."""
        result: FloatArray = values * np.asarray(self.scale) + np.asarray(self.offset)
        return result

    def to_ros(self, values: FloatArray) -> FloatArray:
        """Policy values (..., joints) in ROS units."""
        result: FloatArray = (values - np.asarray(self.offset)) / np.asarray(self.scale)
        return result


@dataclass(frozen=True)
class Limits:
    """Limits of one joint in ROS units; None where the contract gives none.

    `position` is (low, high); the others are magnitudes, `step` being the largest change from one command
    to the next.
    """

    position: tuple[float, float] | None = None
    velocity: float | None = None
    acceleration: float | None = None
    step: float | None = None
    effort: float | None = None


def parse_units(section: Section, joints: tuple[str, ...], *, interface: str = "position") -> Units:
    """`units` for every joint of a block, with exceptions by name in `joint_units`."""
    pairs = {joint: (1.0, 0.0) for joint in joints}
    if section.has("units"):
        common = _pair(section, "units", section.values["units"])
        pairs = dict.fromkeys(joints, common)
    if section.has("joint_units"):
        table = section.section("joint_units")
        for joint in table.members():
            if joint not in pairs:
                raise table.error(joint, f"not one of the joints; {nearest(joint, joints)}")
            pairs[joint] = _pair(table, joint, table.values[joint])
    if interface != "position":
        for joint, (_, offset) in pairs.items():
            if offset != 0.0:
                raise section.error(
                    "units", f"'{joint}' has an offset, which a {interface} cannot have; give its scale alone"
                )
    return Units(tuple(pairs[joint][0] for joint in joints), tuple(pairs[joint][1] for joint in joints))


def _pair(section: Section, key: str, value: object) -> tuple[float, float]:
    """(scale, offset) of one unit: a name, {scale, offset}, or {ros: [a, b], policy: [c, d]}."""
    if isinstance(value, str):
        if value not in _NAMED:
            raise section.error(key, f"unknown unit '{value}'; {nearest(value, _NAMED)}")
        return _NAMED[value], 0.0
    if not isinstance(value, dict):
        expected = "a unit (rad, deg, m, mm), {scale, offset} or {ros: [low, high], policy: [low, high]}"
        raise section.error(key, f"expected {expected}, got {one_line(value)}")
    block = Section(value, file=section.file, where=section.place(key))
    if block.has("ros") or block.has("policy"):
        low, high = block.interval("ros")
        ends = _ends(block, "policy")
        scale = (ends[1] - ends[0]) / (high - low)
        offset = ends[0] - scale * low
    else:
        scale = block.number("scale", -_HIGH, _HIGH)
        offset = block.number("offset", -1e9, 1e9, default=0.0)
    block.done()
    if not _LOW <= abs(scale) <= _HIGH:
        raise section.error(
            key, f"expected a scale between {_LOW:g} and {_HIGH:g} in magnitude, got {scale:g}"
        )
    return scale, offset


def _ends(block: Section, key: str) -> tuple[float, float]:
    """Two different numbers in either order: a policy's axis may run against the robot's."""
    value = block.values.get(key) if block.has(key) else None
    if not isinstance(value, list) or len(value) != 2:
        raise block.error(key, f"expected [at ros low, at ros high], got {one_line(value)}")
    first, second = (block.as_number(key, item, -1e9, 1e9) for item in value)
    if first == second:
        raise block.error(key, f"expected two different numbers, got {first:g} twice")
    return first, second


def parse_limits(section: Section, joints: tuple[str, ...], *, interface: str) -> tuple[Limits, ...]:
    """The `limits` block of a command: joint name → position, velocity, acceleration, step."""
    found: dict[str, Limits] = {}
    if section.has("limits"):
        table = section.section("limits")
        for joint in table.members():
            if joint not in joints:
                raise table.error(joint, f"not one of the joints; {nearest(joint, joints)}")
            block = table.section(joint)
            if interface != "position" and block.has("position"):
                raise block.error("position", f"a {interface} command has no position to limit; remove it")
            for key in ("velocity", "acceleration"):
                if interface == "effort" and block.has(key):
                    raise block.error(key, "an effort command is limited by effort and step; remove it")
            if interface != "effort" and block.has("effort"):
                raise block.error("effort", f"a {interface} command has no effort to limit; remove it")
            found[joint] = Limits(
                position=block.interval("position") if block.has("position") else None,
                velocity=_magnitude(block, "velocity"),
                acceleration=_magnitude(block, "acceleration"),
                step=_magnitude(block, "step"),
                effort=_magnitude(block, "effort"),
            )
            block.done()
    return tuple(found.get(joint, Limits()) for joint in joints)


def _magnitude(block: Section, key: str) -> float | None:
    return block.number(key, 1e-6, 1e6) if block.has(key) else None
