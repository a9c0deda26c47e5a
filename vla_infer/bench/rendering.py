"""A tape as a function of values, for the programs that the engine is compared with.

The tape writes into buffers, row ranges at a time; PyTorch's graphs and ONNX have values that never change. `Renderer`
keeps, for every buffer, which values its rows are now, and leaves to a peer how each operation is written.

Every value has a level: known at load, computed once a call, or anew in each denoising step. An operation belongs to
the highest level of what it reads, and equal operations are made once; so masks, rotary rows and the keys of the prefix
are outside the loop, as a programmer would have them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.errors import EngineError
from vla_infer.tape import Buffer, Op, Tape, Tensor

LOAD, ONCE, STEP = 0, 1, 2

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Value:
    """Something that a peer computes: its handle, when it is known, and its element type ("f32", "i32", "act"...)."""

    handle: Any
    level: int
    dtype: str = "act"


@dataclass(frozen=True)
class _Piece:
    """Rows [row, row + rows) of a buffer."""

    row: int
    rows: int
    value: Value


class Renderer(ABC):
    """Walks a tape. A subclass says how its peer writes each operation: a method `op_<kind>(op, operands)` that
    gives what the operation writes, by operand name, and those below. The loop's body is rendered once.

    Raises EngineError for what no tape of the models has: operations after the loop, or more than one value carried
    from step to step.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._pieces: dict[int, list[_Piece]] = {}

    # ------------------------------------------------------- what a peer gives
    @abstractmethod
    def input(self, name: str, t: Tensor) -> Value:
        """An input of the tape, level ONCE."""

    @abstractmethod
    def stored(self, buffer: Buffer) -> Value:
        """A parameter or a constant, level LOAD."""

    @abstractmethod
    def cut(self, value: Value, axis: int, start: int, stop: int) -> Value:
        """Rows (axis 0) or columns (1) of a value."""

    @abstractmethod
    def stack(self, values: list[Value]) -> Value:
        """Values above each other."""

    @abstractmethod
    def row_of_step(self, value: Value, first: int) -> Value:
        """Row `first` + step of a value, level STEP."""

    @abstractmethod
    def carried(self, value: Value) -> Value:
        """What a step starts from: `value` in the first, what the step before made of it in the others."""

    @abstractmethod
    def cast(self, value: Value, dtype: str) -> Value:
        """`value` in the type of a buffer."""

    # ------------------------------------------------------------------ walking
    def walk(self) -> dict[str, Value]:
        """Render every operation; the tape's outputs: that which is carried as one step leaves it."""
        for name, t in self.tape.inputs.items():
            self._pieces[t.buffer.id] = [_Piece(0, t.rows, self.input(name, t))]
        looped = [i for i, op in enumerate(self.tape.ops) if op.loop]
        first, last = (looped[0], looped[-1]) if looped else (len(self.tape.ops),) * 2
        if any(not op.loop for op in self.tape.ops[first:]):
            raise EngineError("bench: operations after the denoising loop cannot be rendered for a peer")
        for op in self.tape.ops[:first]:
            self._render(op)
        body = self.tape.ops[first : last + 1]
        if body:
            start = _carried(body)
            whole = Tensor(start, 0, 0, start.rows, start.cols)
            self._pieces[start.id] = [_Piece(0, start.rows, self.carried(self.read(whole)))]
            for op in body:
                self._render(op)
        return {name: self.read(t) for name, t in self.tape.outputs.items()}

    def read(self, t: Tensor) -> Value:
        """The value of a view, put together from the pieces that its buffer has."""
        if t.buffer.kind in ("param", "constant"):
            pieces = [_Piece(0, t.buffer.rows, self.stored(t.buffer))]
        else:
            pieces = self._pieces.get(t.buffer.id, [])
        if t.step:
            if len(pieces) != 1 or t.rows != 1:
                raise EngineError(f"bench: {t.buffer.name}: expected one row a step of a whole buffer")
            value = self.row_of_step(pieces[0].value, t.row)
        else:
            value = self._rows(t.buffer, pieces, t.row, t.row + t.rows)
        if (t.col, t.cols) != (0, t.buffer.cols):
            value = self.cut(value, 1, t.col, t.col + t.cols)
        return value

    def _rows(self, buffer: Buffer, pieces: list[_Piece], first: int, stop: int) -> Value:
        found, at = [], first
        for p in pieces:
            low, high = max(p.row, first), min(p.row + p.rows, stop)
            if low >= high:
                continue
            if low != at:
                break
            whole = (low, high) == (p.row, p.row + p.rows)
            found.append(p.value if whole else self.cut(p.value, 0, low - p.row, high - p.row))
            at = high
        if at != stop:
            raise EngineError(f"bench: {buffer.name}: rows {at} to {stop} are read before they are written")
        return found[0] if len(found) == 1 else self.stack(found)

    def _write(self, t: Tensor, value: Value) -> None:
        if (t.col, t.cols) != (0, t.buffer.cols):
            raise EngineError(f"bench: {t.buffer.name}: expected whole rows to be written")
        if value.dtype != t.dtype:
            value = self.cast(value, t.dtype)
        stop = t.row + t.rows
        kept = [_Piece(t.row, t.rows, value)]
        for p in self._pieces.get(t.buffer.id, []):
            for low, high in ((p.row, min(p.row + p.rows, t.row)), (max(p.row, stop), p.row + p.rows)):
                if low < high:
                    whole = (low, high) == (p.row, p.row + p.rows)
                    part = p.value if whole else self.cut(p.value, 0, low - p.row, high - p.row)
                    kept.append(_Piece(low, high - low, part))
        self._pieces[t.buffer.id] = sorted(kept, key=lambda p: p.row)

    def _render(self, op: Op) -> None:
        reads = op.reads
        operands = {name: self.read(t) for name, t in op.operands.items() if t in reads}
        results: Mapping[str, Value] = getattr(self, f"op_{op.kind}")(op, operands)
        for name, value in results.items():
            self._write(op.operands[name], value)


def _carried(body: list[Op]) -> Buffer:
    """The buffer that a step reads before it writes it."""
    written = {t.buffer.id for op in body for t in op.writes}
    fresh: set[int] = set()
    found: dict[int, Buffer] = {}
    for op in body:
        for t in op.reads:
            if t.buffer.id in written and t.buffer.id not in fresh:
                found[t.buffer.id] = t.buffer
        fresh |= {t.buffer.id for t in op.writes}
    if len(found) != 1:
        names = ", ".join(b.name for b in found.values()) or "none"
        raise EngineError(f"bench: expected one value carried from step to step, got {names}")
    return next(iter(found.values()))


def picture(geometry: npt.NDArray[np.int32]) -> tuple[int, ...]:
    """(height, width, row stride, resized height, resized width, top, left) that all cameras share: a peer's program
    is made for pictures of one size. Raises EngineError where they differ or one is missing."""
    rows = {tuple(int(v) for v in row) for row in geometry}
    if len(rows) != 1 or not next(iter(rows))[7]:
        raise EngineError("bench: peers need a picture of one size from every camera")
    return next(iter(rows))[:7]
