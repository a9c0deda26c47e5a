"""Joint limits out of a URDF, and nothing else of it. No external entity, no document type, bounded size."""

from __future__ import annotations

import math
import xml.parsers.expat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .contract_parse import one_line
from .contract_units import Limits
from .errors import ContractError

_MAX_BYTES = 16 << 20
_MAX_JOINTS = 10_000


class _Reader:
    """Collects <joint name><limit .../></joint>; a URDF has its joints right below <robot>."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._path: list[str] = []
        self._joint = ""
        self._type = ""
        self.limits: dict[str, Limits] = {}

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._path.append(tag)
        if len(self._path) > 100:
            raise ContractError(f"{self._file}: elements nested more than 100 deep, which no URDF is")
        if self._path == ["robot", "joint"]:
            self._joint, self._type = attributes.get("name", ""), attributes.get("type", "")
            if len(self.limits) >= _MAX_JOINTS:
                raise ContractError(f"{self._file}: more than {_MAX_JOINTS} joints")
        elif self._path == ["robot", "joint", "limit"]:
            self.limits[self._joint] = self._limit(attributes)
        elif len(self._path) == 1 and tag != "robot":
            raise ContractError(f"{self._file}: the root element is <{tag:.40}>, expected <robot> of a URDF")

    def end(self, tag: str) -> None:
        self._path.pop()

    def doctype(self, *_: Any) -> None:
        raise ContractError(f"{self._file}: has a document type, which a URDF does not need; remove it")

    def _limit(self, attributes: Mapping[str, str]) -> Limits:
        position = None
        if self._type in ("revolute", "prismatic"):
            low, high = self._number(attributes, "lower"), self._number(attributes, "upper")
            # Equal ends are what generators write where they know no limit.
            if low > high:
                raise ContractError(
                    f"{self._file}: joint '{self._joint}': lower {low:g} is above upper {high:g}; mend the URDF"
                )
            position = (low, high) if low < high else None
        velocity, effort = self._number(attributes, "velocity"), self._number(attributes, "effort")
        return Limits(position=position, velocity=_magnitude(velocity), effort=_magnitude(effort))

    def _number(self, attributes: Mapping[str, str], key: str) -> float:
        text = attributes.get(key, "0")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ContractError(
                f"{self._file}: joint '{self._joint}': limit {key}: expected a number, got {one_line(text)}"
            )
        return value


def _magnitude(value: float) -> float | None:
    """Zero and less mean that no limit was filled in."""
    return value if 0.0 < value <= 1e6 else None


def read_urdf_limits(path: Path) -> dict[str, Limits]:
    """Limits by joint name. A xacro has to be expanded first. Raises ContractError, on one line."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ContractError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, which no URDF is")
        data = path.read_bytes()
    except OSError as error:
        raise ContractError(f"{path}: cannot be read ({error.strerror}); give the path of a URDF") from error
    return parse_urdf_limits(data, file=path.name)


def parse_urdf_limits(data: bytes, *, file: str) -> dict[str, Limits]:
    """Limits by joint name of a URDF document; `file` names it in errors."""
    reader = _Reader(file)
    parser = xml.parsers.expat.ParserCreate()
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.StartDoctypeDeclHandler = reader.doctype
    isfinal = True
    try:
        parser.Parse(data, isfinal)
    except (xml.parsers.expat.ExpatError, ValueError, LookupError) as error:
        problem = " ".join(str(error).split())
        raise ContractError(
            f"{file}: is not valid XML ({problem}); expand a xacro to a URDF first"
        ) from error
    return reader.limits


def tighten(ours: Limits, theirs: Limits) -> Limits:
    """The narrower of both, limit by limit. Raises ValueError where no position satisfies both."""
    position = ours.position or theirs.position
    if ours.position and theirs.position:
        position = max(ours.position[0], theirs.position[0]), min(ours.position[1], theirs.position[1])
        if position[0] >= position[1]:
            raise ValueError("position limits do not overlap")

    def least(first: float | None, second: float | None) -> float | None:
        given = [value for value in (first, second) if value is not None]
        return min(given, default=None)

    return replace(
        ours,
        position=position,
        velocity=least(ours.velocity, theirs.velocity),
        effort=least(ours.effort, theirs.effort),
    )
