"""The tape: what its views are, what it computes once at load, and what it refuses to record."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from golden_runs import golden_model

from vla_infer.errors import EngineError
from vla_infer.tape import Norm, Rope, Tape, Tensor, Weight


def corner(t: Tensor) -> tuple[int, int, int, int, int]:
    return t.row, t.col, t.rows, t.cols, t.step


# ---------------------------------------------------------------------------------------------------- views
def test_views() -> None:
    t = Tape()
    x = t.input("x", (10, 6), "f32")
    assert corner(x[2:7]) == (2, 0, 5, 6, 0)
    assert corner(x[2:7][1:3]) == (3, 0, 2, 6, 0)
    assert corner(x[-3:]) == (7, 0, 3, 6, 0)
    assert corner(x.columns(2, 5)) == (0, 2, 10, 3, 0)
    assert corner(x.columns(2, 5).columns(1, 3)[4:5]) == (4, 3, 1, 2, 0)
    with t.loop(10) as step:
        assert corner(x.at(step)) == (0, 0, 1, 6, 1)
        assert corner(x.columns(1, 3).at(step)) == (0, 1, 1, 2, 1)
        assert corner(x.at(step).columns(1, 3)) == (0, 1, 1, 2, 1)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (lambda x: x[::2], "plain range of rows"),
        (lambda x: x[5:2], "plain range of rows"),
        (lambda x: x.columns(3, 7), "columns 3:7 of 6"),
        (lambda x: x.columns(4, 3), "columns 4:3 of 6"),
        (lambda x: x.columns(-1, 3), "columns -1:3 of 6"),
    ],
)
def test_bad_views(view: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        view(Tape().input("x", (10, 6), "f32"))


def test_a_row_for_each_step() -> None:
    t = Tape()
    x = t.input("x", (10, 6), "f32")
    with t.loop(4) as step, pytest.raises(EngineError, match="x: 10 rows for a loop of 4 steps"):
        x.at(step)
    with pytest.raises(EngineError, match="one loop"), t.loop(4):
        pass


# --------------------------------------------------------------------------------------------------- at load
def test_what_no_input_reaches_is_computed_at_load() -> None:
    t = Tape()
    w = Weight("w", 4, 4)
    table = t.linear(t.constant("c", np.ones((3, 4), np.float32)), w, bias=t.param("b", (1, 4)))
    more = t.linear(table, w, act="silu")
    after = t.linear(t.input("x", (3, 4), "f32"), w, residual=more)
    with t.loop(2):
        t.linear(more, w)
    assert [op.at_load for op in t.ops] == [True, True, False, False]
    assert [op.loop for op in t.ops] == [False, False, False, True]
    assert t.is_table(table.buffer)
    assert t.is_table(more.buffer)
    assert not t.is_table(after.buffer)


def test_the_time_costs_nothing_while_running() -> None:
    """π0.5: no product of the time embedding is left for the run; π0: the time half of the MLP neither."""
    for family, at_load in (("pi0", 1), ("pi05", 2 + 1 + 2 * 4)):
        tape = golden_model(family).tape(prompt=16)
        assert sum(op.at_load for op in tape.ops) == at_load
        names = {w.name for op in tape.ops if not op.at_load for w in op.weights}
        assert not any("dense" in name or ".time_mlp" in name for name in names)


def test_the_last_prefix_layer_gives_keys_and_values_only() -> None:
    for family, layer in (("smolvla", "text_model.layers.3."), ("pi05", "language_model.layers.3.")):
        tape = golden_model(family).tape(prompt=16)
        used = {w.name for op in tape.ops for w in op.weights}
        assert any(layer + "self_attn.k_proj" in name for name in used)
        assert not any(layer + part in name for name in used for part in ("self_attn.q_proj", "mlp."))


def test_pi0_state_goes_through_the_loop() -> None:
    """Projected once, its row stands before the actions' in the loop, of which the Euler step takes the actions'."""
    tape = golden_model("pi0").tape(prompt=16)
    horizon = golden_model("pi0").sizes.horizon
    state = next(op for op in tape.ops if any(w.name == "model.state_proj.weight" for w in op.weights))
    assert not state.loop
    row = next(iter(state.writes))
    assert row.rows == 1
    read = [op.operands["x"] for op in tape.ops if op.kind == "qkv" and op.loop]
    assert read[0].buffer is row.buffer
    assert {t.rows for t in read} == {1 + horizon}
    last = next(op.operands["h"] for op in tape.ops if op.kind == "euler")
    assert (last.row, last.rows) == (1, horizon)


def test_params_are_shared_by_name() -> None:
    t = Tape()
    assert t.param("p", (1, 4)) is t.param("p", (1, 4))


# --------------------------------------------------------------------------------------------------- refusals
def linear(t: Tape, **options: object) -> None:
    t.linear(t.input("x", (4, 8), "f32"), Weight("w", 6, 8), **options)  # type: ignore[arg-type]


def attention(t: Tape, heads: int, kv_heads: int, **options: object) -> None:
    q, k = t.temp("q", (6, heads), "act"), t.temp("k", (9, kv_heads), "act")
    t.attention(q, k, k, head_dim=4, **options)  # type: ignore[arg-type]


def blocks(t: Tape, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    return t.input("qb", (queries, 1), "i32"), t.input("kb", (keys, 1), "i32")


def rope(t: Tape, width: int, rows: int) -> None:
    table, positions = t.temp("rope", (9, width)), t.input("positions", (rows, 1), "i32")
    t.qkv(t.temp("x", (4, 8)), {"q": Weight("w", 8, 8)}, head_dim=4, rope=Rope(table, positions))


def pictures(t: Tape, size: tuple[int, int], geometry: tuple[int, int]) -> None:
    t.image_patches(t.input("f", (2, 99), "u8"), t.input("g", geometry, "i32"), size, 4)


def euler(t: Tape, rows: int, cols: int) -> None:
    x, previous = t.input("x", (rows, cols), "f32"), t.input("p", (5, 3), "f32")
    one = t.input("one", (1, 1), "f32")
    norm, bias = Norm("rms", 1e-6), t.param("b", (1, 3))
    t.euler(
        t.temp("h", (5, 8)),
        Weight("w", 3, 8),
        x,
        norm=norm,
        bias=bias,
        dt=-1,
        time=one,
        guide=(previous, one, one),
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda t: t.input("x", (0, 4), "f32"), r"x: expected positive sizes, got \(0, 4\)"),
        (lambda t: t.linear(t.temp("x", (4, 7)), Weight("w", 6, 8)), "linear w: x has 7 columns.* expects 8"),
        (lambda t: linear(t, bias=t.param("b", (1, 5))), r"linear w: bias is \(1, 5\), expected \(1, 6\)"),
        (lambda t: linear(t, gate=t.param("g", (4, 6))), r"linear w: gate is \(4, 6\), expected \(1, 6\)"),
        (lambda t: linear(t, residual=t.temp("r", (3, 6))), r"linear w: residual is \(3, 6\)"),
        (lambda t: linear(t, residual=t.temp("r", (4, 5))), r"linear w: residual is \(4, 5\)"),
        (lambda t: linear(t, out=t.temp("o", (5, 6))), r"w: out is \(5, 6\), expected \(4, 6\)"),
        (
            lambda t: linear(t, norm=Norm("rms", 1e-6, t.param("n", (1, 6)))),
            r"norm weight: expected \(1, 8\), got \(1, 6\)",
        ),
        (lambda t: t.qkv(t.temp("x", (4, 8)), {"q": Weight("w", 6, 8)}, head_dim=4), "6 rows.*head_dim 4"),
        (lambda t: rope(t, 6, 4), "rope does not fit 4 rows"),
        (lambda t: rope(t, 4, 5), "rope does not fit 4 rows"),
        (lambda t: attention(t, 12, 8), "attention: q 12, k 8"),
        (lambda t: attention(t, 10, 4), "attention: q 10"),
        (lambda t: attention(t, 8, 4, batch=2), "6 and 9 rows in 2 batches"),
        (lambda t: attention(t, 8, 4, blocks=blocks(t, 6, 8)), "blocks of 6 and 8 rows"),
        (lambda t: t.space_to_depth(t.temp("x", (15, 2)), 2, grid=(4, 4), norm=None), "15 rows"),
        (lambda t: t.space_to_depth(t.temp("x", (16, 2)), 3, grid=(4, 4), norm=None), "factor 3"),
        (lambda t: pictures(t, (10, 8), (2, 8)), "image 10x8 is no multiple of the patch size 4"),
        (lambda t: pictures(t, (8, 8), (1, 8)), r"geometry: expected \(2, 8\)"),
        (lambda t: euler(t, 5, 4), r"euler w: x is \(5, 4\), expected \(5, 3\)"),
        (lambda t: euler(t, 4, 3), r"euler w: x is \(4, 3\), expected \(5, 3\)"),
    ],
)
def test_refuses(record: Callable[[Tape], object], message: str) -> None:
    tape = Tape()
    with pytest.raises(EngineError, match=message):
        record(tape)
    assert tape.ops == []
