"""The planner: what is alive together never shares memory, and what is not does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_infer.arena import ALIGN, lifetimes, plan, size_bytes
from vla_infer.errors import EngineError
from vla_infer.tape import Tape, Weight


def chain(widths: list[int], *, looped: tuple[int, int], readers: list[int]) -> Tape:
    """Products in a row, some of them in a loop; each also adds the output of an earlier one (`readers`)."""
    t = Tape()
    made = [t.input("x", (4, widths[0]), "f32")]
    begin, end = looped

    def step(i: int) -> None:
        source = made[-1]
        w = Weight(f"w{i}", widths[i], source.cols)
        other = made[readers[i] % len(made)]
        fits = other.cols == widths[i]
        made.append(t.linear(source, w, residual=other if fits else None))

    for i in range(1, begin):
        step(i)
    if end > begin:
        with t.loop(3):
            for i in range(begin, end):
                step(i)
    for i in range(end, len(widths)):
        step(i)
    t.output("y", made[-1])
    return t


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_live_buffers_never_overlap(data: st.DataObject) -> None:
    n = data.draw(st.integers(4, 14))
    widths = data.draw(st.lists(st.sampled_from([8, 16, 300]), min_size=n, max_size=n))
    begin = data.draw(st.integers(1, n - 1))
    end = data.draw(st.integers(begin, n))
    readers = data.draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))
    tape = chain(widths, looped=(begin, end), readers=readers)
    alive = lifetimes(tape)
    acts = [life.buffer.id for life in alive if life.buffer.dtype == "act"]
    in_bytes = data.draw(st.sets(st.sampled_from(acts))) if acts else set()
    layout = plan(tape, 4, in_bytes)
    assert {life.buffer.id for life in alive} == set(layout.arena)
    spans = []
    for life in alive:
        start = layout.arena[life.buffer.id]
        spans.append((life, start, start + size_bytes(life.buffer, 1 if life.buffer.id in in_bytes else 4)))
    for i, (a, a0, a1) in enumerate(spans):
        assert a0 % ALIGN == 0
        assert a1 <= layout.arena_bytes
        for b, b0, b1 in spans[:i]:
            if a.first <= b.last and b.first <= a.last:
                assert a1 <= b0 or b1 <= a0, f"{a} and {b}"


def test_memory_is_shared() -> None:
    """A long chain needs room for two activations, not for all of them."""
    tape = chain([1024] * 40, looped=(40, 40), readers=list(range(-1, 39)))
    activation = 4 * 1024 * 4
    assert plan(tape, 4).arena_bytes <= 5 * activation


def test_what_a_loop_reads_from_outside_lives_through_it() -> None:
    t = Tape()
    x = t.input("x", (4, 8), "f32")
    h = t.linear(x, Weight("a", 8, 8))
    with t.loop(2):
        y = t.linear(h, Weight("b", 8, 8))
        t.linear(y, Weight("c", 8, 8))
    t.output("y", y)
    by_name = {life.buffer.name: life for life in lifetimes(t)}
    assert by_name["a"].last == by_name["y" if "y" in by_name else "c"].last  # both end with the loop


def test_read_before_write_is_refused() -> None:
    t = Tape()
    t.output("y", t.linear(t.temp("never", (4, 8)), Weight("a", 8, 8)))
    with pytest.raises(EngineError, match="never is read before"):
        plan(t, 4)


def test_loop_in_pieces_is_refused() -> None:
    t = Tape()
    x = t.input("x", (4, 8), "f32")
    with t.loop(2):
        y = t.linear(x, Weight("a", 8, 8))
    with pytest.raises(EngineError, match="one loop"), t.loop(2):
        pass
    t.output("y", y)


def test_tables_are_not_in_the_arena() -> None:
    t = Tape()
    c = t.constant("c", np.ones((3, 8), np.float32))
    table = t.linear(c, Weight("a", 8, 8))
    x = t.input("x", (3, 8), "f32")
    t.output("y", t.linear(x, Weight("b", 8, 8), residual=table))
    layout = plan(t, 4)
    assert table.buffer.id in layout.tables
    assert table.buffer.id not in layout.arena
    assert layout.table_bytes == ALIGN
