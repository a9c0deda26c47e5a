"""Where every buffer of a tape lies: lifetimes, then one offset each, so that what is not alive together shares
memory. Pure; both C++ executors use the result.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vla_infer.errors import EngineError
from vla_infer.tape import Buffer, Op, Tape

ALIGN = 256  # bytes: a cache line of a CPU, a memory transaction of a GPU


@dataclass(frozen=True)
class Lifetime:
    """A buffer is alive in operations [first, last] (indices into the tape, ends included)."""

    buffer: Buffer
    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """Offsets in bytes of the buffers of the arena and of the tables, and the sizes of both."""

    arena: dict[int, int]
    arena_bytes: int
    tables: dict[int, int]
    table_bytes: int


def align(size: int) -> int:
    return (size + ALIGN - 1) // ALIGN * ALIGN


def size_bytes(buffer: Buffer, act_bytes: int) -> int:
    return buffer.rows * buffer.cols * {"act": act_bytes, "f32": 4, "i32": 4, "u8": 1}[buffer.dtype]


def lifetimes(tape: Tape) -> list[Lifetime]:
    """When each input, temp and output is alive; inputs and outputs to the end.

    What the loop reads or writes and something outside it touches too, or what one iteration leaves for the next,
    lives through the whole loop.
    """
    ops = [op for op in tape.ops if not op.at_load]
    looped = [i for i, op in enumerate(ops) if op.loop]
    begin, end = (looped[0], looped[-1]) if looped else (0, -1)
    if looped and len(looped) != end - begin + 1:
        raise EngineError("tape: operations of the loop are not next to each other")
    written: dict[int, list[int]] = {}
    touched: dict[int, list[int]] = {}
    buffers: dict[int, Buffer] = {}
    for i, op in enumerate(ops):
        for t in (*op.reads, *op.writes):
            buffers[t.buffer.id] = t.buffer
            touched.setdefault(t.buffer.id, []).append(i)
        for t in op.writes:
            written.setdefault(t.buffer.id, []).append(i)
    kept = {t.buffer.id for t in tape.outputs.values()}
    given = {t.buffer.id: t.buffer for t in tape.inputs.values()}
    result = []
    for id_, buffer in {**given, **buffers}.items():
        if buffer.kind in ("param", "constant") or tape.is_table(buffer):
            continue
        at = touched.get(id_, [])
        first = -1 if id_ in given else min(at)
        # inputs stay: a program run again without filling them must find what was there
        last = len(ops) if id_ in kept or id_ in given else max(at)
        if id_ not in given and first not in written.get(id_, []):
            raise EngineError(f"tape: {buffer.name} is read before anything is written to it")
        inside = [i for i in at if begin <= i <= end]
        if inside and (first < begin or last > end or _carried(ops, id_, inside)):
            first, last = min(first, begin), max(last, end)
        result.append(Lifetime(buffer, first, last))
    return result


def _carried(ops: list[Op], id_: int, inside: list[int]) -> bool:
    """True where an iteration reads the buffer, or writes only a part of it, before writing it whole."""
    op = ops[inside[0]]
    return not any(
        t.buffer.id == id_ and (t.rows, t.cols) == (t.buffer.rows, t.buffer.cols) for t in op.writes
    )


def plan(tape: Tape, act_bytes: int, in_bytes: Collection[int] = ()) -> Layout:
    """Offsets for every buffer: the largest first, each at the lowest place free during its lifetime. in_bytes: ids
    of "act" buffers of the arena that hold a byte a value."""

    def bytes_of(buffer: Buffer) -> int:
        return size_bytes(buffer, 1 if buffer.id in in_bytes else act_bytes)

    placed: list[tuple[Lifetime, int, int]] = []
    order = sorted(lifetimes(tape), key=lambda life: (-bytes_of(life.buffer), life.buffer.id))
    for life in order:
        size = align(bytes_of(life.buffer))
        offset = 0
        taken = sorted(
            (at, at + length)
            for other, at, length in placed
            if other.first <= life.last and life.first <= other.last
        )
        for start, stop in taken:
            if offset + size <= start:
                break
            offset = max(offset, stop)
        placed.append((life, offset, size))
    tables: dict[int, int] = {}
    table_bytes = 0
    for op in tape.ops:
        for t in op.writes if op.at_load else ():
            if t.buffer.id not in tables:
                tables[t.buffer.id] = table_bytes
                table_bytes += align(size_bytes(t.buffer, act_bytes))
    return Layout(
        arena={life.buffer.id: offset for life, offset, _ in placed},
        arena_bytes=max((offset + size for _, offset, size in placed), default=0),
        tables=tables,
        table_bytes=table_bytes,
    )
