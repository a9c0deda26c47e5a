"""The op test table: for every operation a few small tapes of odd sizes, with random inputs.

A case is a function that records one operation on a tape and returns the inputs. It is run by the reference
executor in float64 and by the engine on every device that there is (test_ops.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vla_infer.models.layers import UNSEEN, rope_table
from vla_infer.tape import Norm, Rope, Tape, Tensor, Weight

Arrays = dict[str, npt.NDArray[np.generic]]


def bf16_exact(x: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """The nearest values that bfloat16 holds, so that rounding the operands is no part of the error."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


class Case:
    """Collects the tape, its inputs and its weights while an operation is recorded."""

    def __init__(self, seed: int) -> None:
        self.tape = Tape()
        self.random = np.random.default_rng(seed)
        self.inputs: Arrays = {}
        self.weights: Arrays = {}

    def normal(self, *shape: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
        return bf16_exact(self.random.standard_normal(shape) * scale)

    def x(self, rows: int, cols: int, *, name: str = "x", dtype: str = "act") -> Tensor:
        """An operand that depends on an input: inputs are f32, so an act operand is made by a product with 1."""
        self.inputs[name] = self.normal(rows, cols)
        given = self.tape.input(name, (rows, cols), "f32")
        if dtype == "f32":
            return given
        self.weights[f"one_{name}"] = np.eye(cols, dtype=np.float32)
        return self.tape.linear(given, Weight(f"one_{name}", cols, cols))

    def ints(self, name: str, values: npt.NDArray[np.integer]) -> Tensor:
        self.inputs[name] = np.asarray(values, np.int32).reshape(-1, 1)
        return self.tape.input(name, (self.inputs[name].shape[0], 1), "i32")

    def weight(self, name: str, n: int, k: int) -> Weight:
        self.weights[name] = self.normal(n, k, scale=k**-0.5)
        return Weight(name, n, k)

    def row(self, name: str, n: int) -> Tensor:
        self.weights[name] = self.normal(1, n)
        return self.tape.param(name, (1, n))

    def norm(self, kind: str, k: int, *, plus: float = 0.0, weight: bool = True) -> Norm:
        bias = self.row("norm_bias", k) if kind == "layer" else None
        return Norm(kind, 1e-5, self.row("norm_weight", k) if weight else None, bias, plus)


def linear_plain(c: Case) -> Tensor:
    return c.tape.linear(c.x(5, 37), c.weight("w", 33, 37))


def linear_all(c: Case) -> Tensor:
    w = c.weight("w", 70, 48)
    return c.tape.linear(
        c.x(26, 48),
        w,
        norm=c.norm("layer", 48),
        bias=c.row("b", 70),
        act="gelu_tanh",
        scale=1.5,
        residual=c.x(13, 70, name="r"),
        gate=c.row("g", 70),
    )


def linear_rms(c: Case) -> Tensor:
    return c.tape.linear(c.x(50, 144), c.weight("w", 96, 144), norm=c.norm("rms", 144, plus=1.0), act="silu")


def linear_part(c: Case) -> Tensor:
    """Columns of a weight, rows of an operand, and a place to write."""
    c.weights["w"] = c.normal(40, 96)
    out = c.tape.temp("whole", (20, 40))
    x = c.x(20, 48)
    c.tape.linear(x[3:11], Weight("w", 40, 48, (48, 96)), out=out[8:16])
    c.tape.linear(x[:8], Weight("w", 40, 48, (0, 48)), out=out[:8])
    c.tape.linear(x[:4], Weight("w", 40, 48, (0, 48)), out=out[16:])
    return out


def linear_many_rows(c: Case) -> Tensor:
    return c.tape.linear(c.x(401, 64), c.weight("w", 208, 64), bias=c.row("b", 208))


def gated(c: Case) -> Tensor:
    gate, up = c.weight("gate", 80, 56), c.weight("up", 80, 56)
    return c.tape.gated_linear(c.x(11, 56), gate, up, norm=c.norm("rms", 56), act="silu")


def gated_odd(c: Case) -> Tensor:
    gate, up = c.weight("gate", 101, 64), c.weight("up", 101, 64)
    return c.tape.gated_linear(c.x(3, 64), gate, up, norm=None, act="gelu_tanh")


def qkv_rope(c: Case) -> Tensor:
    d, rows = 64, 9
    weights = {"q": c.weight("q", 6 * d, 40), "k": c.weight("k", 2 * d, 40), "v": c.weight("v", 2 * d, 40)}
    table = c.tape.constant("rope", rope_table(32, d, 100.0))
    positions = c.ints(
        "positions", [-1, 32, 2**31 - 1, *c.random.integers(0, 32, rows - 3)]
    )  # out of range: row 0
    cache = c.tape.temp("cache", (2 * rows, 10 * d))
    into = {"k": cache.columns(0, 2 * d)[:rows], "v": cache.columns(2 * d, 4 * d)[rows:]}
    x = c.x(rows, 40)
    zero = c.weight("zero", 10 * d, 40)
    c.weights["zero"] = np.zeros_like(c.weights["zero"])
    c.tape.linear(x, zero, out=cache[:rows])
    c.tape.linear(x, zero, out=cache[rows:])
    into["q"] = cache.columns(4 * d, 10 * d)[:rows]
    c.tape.qkv(
        x, weights, head_dim=d, norm=c.norm("rms", 40), rope=Rope(table, positions), into=into,
        biases={"q": c.row("qb", 6 * d), "v": c.row("vb", 2 * d)},
    )  # fmt: skip
    return cache


def qkv_wide_head(c: Case) -> Tensor:
    table = c.tape.constant("rope", rope_table(600, 256, 10_000.0))
    rope = Rope(table, c.ints("positions", [600, -5, *c.random.integers(0, 600, 5)]))  # out of range: row 0
    return c.tape.qkv(c.x(7, 64), {"q": c.weight("q", 512, 64)}, head_dim=256, rope=rope)["q"]


def attention_plain(c: Case) -> Tensor:
    q, k, v = c.x(2 * 19, 144, name="q"), c.x(2 * 23, 144, name="k"), c.x(2 * 23, 144, name="v")
    return c.tape.attention(q, k, v, head_dim=72, batch=2)


def attention_blocks(c: Case) -> Tensor:
    """Grouped heads; blocks that hide keys; the first query sees none."""
    m, n, d = 14, 37, 64
    q_block = np.array([-1] + [0] * 5 + list(range(1, 9)))
    k_block = np.where(c.random.random(n) < 0.3, UNSEEN, c.random.integers(0, 6, n))
    blocks = c.ints("qb", q_block), c.ints("kb", k_block)
    q, k, v = c.x(m, 6 * d, name="q"), c.x(n, 2 * d, name="k"), c.x(n, 2 * d, name="v")
    return c.tape.attention(q, k, v, head_dim=d, blocks=blocks)


def attention_one_key_head(c: Case) -> Tensor:
    q, k, v = c.x(50, 8 * 256, name="q"), c.x(75, 256, name="k"), c.x(75, 256, name="v")
    return c.tape.attention(q, k, v, head_dim=256)


def space_to_depth(c: Case) -> Tensor:
    return c.tape.space_to_depth(c.x(2 * 6 * 4, 24), 2, grid=(6, 4), norm=c.norm("layer", 24))


def embed(c: Case) -> Tensor:
    c.weights["table"] = c.normal(50, 24)
    table = c.tape.param("table", (50, 24), "act")
    out = c.tape.temp("out", (7, 24))
    return c.tape.embed(
        c.ints("tokens", [50, -1, *c.random.integers(0, 50, 5)]), table, scale=24**0.5, out=out
    )


def image_patches(c: Case) -> Tensor:
    """Larger, smaller and equal pictures, a padded row stride, an absent camera; both ways to pad."""
    height, width, patch = 28, 42, 14
    rows = [(33, 50, 160, 27, 42, 1, 0, 1), (9, 20, 60, 18, 40, 5, 1, 1), (28, 42, 126, 28, 42, 0, 0, 1)]
    rows += [(28, 42, 126, 28, 42, 0, 0, 0)]
    c.inputs["frames"] = c.random.integers(0, 256, (4, 33 * 160), dtype=np.uint8)
    c.inputs["geometry"] = np.array(rows, np.int32)
    frames = c.tape.input("frames", (4, 33 * 160), "u8")
    geometry = c.tape.input("geometry", (4, 8), "i32")
    return c.tape.image_patches(frames, geometry, (height, width), patch)


def euler_loop(c: Case) -> Tensor:
    """Three guided steps, with norm tables and biases that move with the step."""
    rows, n, k, steps = 10, 32, 48, 3
    x = c.x(rows, n, name="actions", dtype="f32")
    guide = c.x(rows, n, name="previous", dtype="f32"), c.x(rows, 1, name="weight", dtype="f32")
    gain = c.x(steps, 1, name="gain", dtype="f32")
    time = c.tape.constant("time", np.linspace(1, 0.3, steps, dtype=np.float32)[:, None])
    table = c.tape.constant("table", c.normal(steps, 3 * k))
    w_in, w_out, bias = c.weight("in", k, n), c.weight("out", n, k), c.row("b", n)
    with c.tape.loop(steps) as step:
        row = table.at(step)
        h = c.tape.linear(x, w_in, bias=row.columns(2 * k, 3 * k), act="silu")
        norm = Norm("rms", 1e-6, row.columns(0, k), row.columns(k, 2 * k), 1.0)
        c.tape.euler(
            h, w_out, x, norm=norm, bias=bias, dt=-0.25, time=time.at(step), guide=(*guide, gain.at(step))
        )
    return x


def at_load(c: Case) -> Tensor:
    """A table computed once from constants, used in a loop's place."""
    times = c.tape.constant("times", c.normal(4, 24))
    table = c.tape.linear(times, c.weight("t", 30, 24), act="silu", out=c.tape.temp("tab", (4, 30), "f32"))
    return c.tape.linear(c.x(6, 30), c.weight("w", 30, 30), bias=table[2:3])


CASES: list[Callable[[Case], Tensor]] = [
    linear_plain, linear_all, linear_rms, linear_part, linear_many_rows, gated, gated_odd, qkv_rope,
    qkv_wide_head, attention_plain, attention_blocks, attention_one_key_head, space_to_depth, embed,
    image_patches, euler_loop, at_load,
]  # fmt: skip


def make(case: Callable[[Case], Tensor], seed: int) -> Case:
    c = Case(seed)
    c.tape.output("result", case(c))
    return c
