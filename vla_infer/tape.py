"""The tape: a forward pass recorded once, as a list of fused operations on named matrices.

A model file calls the methods of `Tape`; nothing is computed while it does. What comes out is data: buffers,
operations, one optional loop. The planner (`arena.py`) gives every buffer its place, and an executor runs it:
`reference.py` in PyTorch, or the C++ engine on a CPU or a GPU (`engine.py`).

Every tensor is a matrix (rows, columns), row-major. Types: "act" is the precision of the engine (float32 or
bfloat16), "f32", "i32" and "u8" are what they say. Operations compute in float32 inside whatever the type of
their operands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from vla_infer.errors import EngineError

# What each operation writes. Every other operand is read; `x` of euler is read and written.
WRITES: Mapping[str, tuple[str, ...]] = {
    "image_patches": ("out",),
    "linear": ("out",),
    "gated_linear": ("out",),
    "qkv": ("q", "k", "v"),
    "attention": ("out",),
    "space_to_depth": ("out",),
    "embed": ("out",),
    "euler": ("x",),
}


@dataclass(frozen=True)
class Buffer:
    """Storage of a tensor. kind: "input" (the caller writes it), "param" (a tensor of the checkpoint),
    "constant" (values given while recording), "table" (computed once at load) or "temp"."""

    id: int
    name: str
    rows: int
    cols: int
    dtype: str
    kind: str
    values: npt.NDArray[np.generic] | None = None


@dataclass(frozen=True)
class Tensor:
    """A view of a buffer: `rows` x `cols` from (row, col); in a loop it moves down `step` rows an iteration."""

    buffer: Buffer
    row: int
    col: int
    rows: int
    cols: int
    step: int = 0

    @property
    def dtype(self) -> str:
        return self.buffer.dtype

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, stride = rows.indices(self.rows)
        if stride != 1 or stop < start:
            raise EngineError(f"tape: {self.buffer.name}[{rows}]: expected a plain range of rows")
        return replace(self, row=self.row + start, rows=stop - start)

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns [start, stop)."""
        if not 0 <= start <= stop <= self.cols:
            raise EngineError(f"tape: {self.buffer.name}: columns {start}:{stop} of {self.cols}")
        return replace(self, col=self.col + start, cols=stop - start)

    def at(self, loop: Loop) -> Tensor:
        """The row that belongs to the current iteration of `loop`: (1, cols)."""
        if self.rows != loop.steps:
            raise EngineError(f"tape: {self.buffer.name}: {self.rows} rows for a loop of {loop.steps} steps")
        return replace(self, rows=1, step=1)


@dataclass(frozen=True)
class Weight:
    """A matrix (n, k) of the checkpoint that a product multiplies by: y = x W^T. `cols` picks columns of it.

    keep: stays in bfloat16 where others are 8-bit integers: little work, and an error that every step repeats.
    """

    name: str
    n: int
    k: int
    cols: tuple[int, int] | None = None
    keep: bool = False


@dataclass(frozen=True)
class Norm:
    """Normalisation of the rows of a product's left operand x (m, k), in float32:

    layer: (x - mean) / sqrt(var + eps);  rms: x / sqrt(mean(x^2) + eps);
    then * (weight + plus) + bias, where given. Gemma's RMS norm and adaptive norms have plus = 1.
    """

    kind: str
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    plus: float = 0.0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding by a table (positions, head_dim) of [cos | sin] halves; `positions` (rows, 1) i32."""

    table: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Loop:
    steps: int


@dataclass(frozen=True)
class Op:
    """One recorded operation. `loop` is true inside the loop, `at_load` when nothing of it depends on inputs;
    `stage` is what time spent in it is put down to."""

    kind: str
    operands: Mapping[str, Tensor]
    weights: tuple[Weight, ...]
    attrs: Mapping[str, float]
    loop: bool
    at_load: bool
    stage: str = ""

    @property
    def writes(self) -> tuple[Tensor, ...]:
        return tuple(self.operands[name] for name in WRITES[self.kind] if name in self.operands)

    @property
    def reads(self) -> tuple[Tensor, ...]:
        writes = WRITES[self.kind]
        return tuple(t for name, t in self.operands.items() if name not in writes or self.kind == "euler")


ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "silu": 2}
NORMS = {"none": 0, "layer": 1, "rms": 2}


@dataclass
class Tape:
    """Records operations. See the methods for each one's formula and shapes."""

    buffers: list[Buffer] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    stage: str = ""  # of the operations recorded from now on
    _in_loop: bool = False
    _params: dict[str, Tensor] = field(default_factory=dict)
    _tables: set[int] = field(default_factory=set)

    # ------------------------------------------------------------------ names
    def _buffer(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: str,
        kind: str,
        values: npt.NDArray[np.generic] | None = None,
    ) -> Tensor:
        rows, cols = shape
        if rows < 1 or cols < 1:
            raise EngineError(f"tape: {name}: expected positive sizes, got ({rows}, {cols})")
        buffer = Buffer(len(self.buffers), name, rows, cols, dtype, kind, values)
        self.buffers.append(buffer)
        return Tensor(buffer, 0, 0, rows, cols)

    def input(self, name: str, shape: tuple[int, int], dtype: str) -> Tensor:
        """A matrix that the caller fills before each run."""
        self.inputs[name] = self._buffer(name, shape, dtype, "input")
        return self.inputs[name]

    def output(self, name: str, tensor: Tensor) -> None:
        """Keep `tensor` until the end of the run, to be read under `name`."""
        self.outputs[name] = tensor

    def param(self, name: str, shape: tuple[int, int], dtype: str = "f32") -> Tensor:
        """A tensor of the checkpoint used as it is: a bias, a norm's weight, an embedding table."""
        if name not in self._params:
            self._params[name] = self._buffer(name, shape, dtype, "param")
        return self._params[name]

    def constant(self, name: str, values: npt.NDArray[np.generic], dtype: str = "f32") -> Tensor:
        """Values known while recording, a matrix (rows, cols)."""
        return self._buffer(name, (values.shape[0], values.shape[1]), dtype, "constant", values)

    def temp(self, name: str, shape: tuple[int, int], dtype: str = "act") -> Tensor:
        """Storage that several operations write parts of (through row ranges), such as a key cache."""
        return self._buffer(name, shape, dtype, "temp")

    @contextmanager
    def loop(self, steps: int) -> Iterator[Loop]:
        """Operations recorded inside run `steps` times; one loop a tape."""
        if self.steps:
            raise EngineError("tape: expected one loop, got a second")
        self.steps = steps
        self._in_loop = True
        try:
            yield Loop(steps)
        finally:
            self._in_loop = False

    def _record(
        self,
        kind: str,
        operands: Mapping[str, Tensor | None],
        weights: tuple[Weight, ...] = (),
        attrs: Mapping[str, float] | None = None,
    ) -> None:
        given = {name: t for name, t in operands.items() if t is not None}
        writes = WRITES[kind]
        constant = {"param", "constant"}
        fixed = (
            not self._in_loop
            and kind != "euler"
            and all(
                t.buffer.kind in constant or t.buffer.id in self._tables
                for name, t in given.items()
                if name not in writes
            )
        )
        op = Op(kind, given, weights, dict(attrs or {}), self._in_loop, fixed, self.stage)
        if fixed:
            self._tables.update(t.buffer.id for t in op.writes)
        self.ops.append(op)

    def is_table(self, buffer: Buffer) -> bool:
        """True when `buffer` is computed once at load."""
        return buffer.id in self._tables

    @staticmethod
    def _norm(norm: Norm | None, k: int) -> tuple[dict[str, Tensor | None], dict[str, float]]:
        if norm is None:
            return {}, {"norm": NORMS["none"]}
        for name, t in (("weight", norm.weight), ("bias", norm.bias)):
            if t is not None and (t.rows, t.cols) != (1, k):
                raise EngineError(f"tape: norm {name}: expected (1, {k}), got ({t.rows}, {t.cols})")
        operands = {"norm_weight": norm.weight, "norm_bias": norm.bias}
        return operands, {"norm": NORMS[norm.kind], "eps": norm.eps, "plus": norm.plus}

    def _out(self, out: Tensor | None, name: str, shape: tuple[int, int], dtype: str = "act") -> Tensor:
        if out is None:
            return self.temp(name, shape, dtype)
        if (out.rows, out.cols) != shape:
            raise EngineError(f"tape: {name}: out is ({out.rows}, {out.cols}), expected {shape}")
        return out

    @staticmethod
    def _inner(op: str, x: Tensor, *weights: Weight) -> None:
        for w in weights:
            if x.cols != w.k:
                raise EngineError(f"tape: {op} {w.name}: x has {x.cols} columns, the weight expects {w.k}")

    # ------------------------------------------------------------- operations
    def image_patches(self, frames: Tensor, geometry: Tensor, image: tuple[int, int], patch: int) -> Tensor:
        """uint8 pictures to normalised patches: resize (bilinear, half-pixel centres), pad, scale, cut.

        frames (cameras, bytes) u8: each row one picture, (h, w, 3) with a row stride. geometry (cameras, 8) i32:
        h, w, row stride in bytes, resized h, resized w, top pad, left pad, present (0 gives a black picture).
        image: (height, width) after padding. Out (cameras * patches, 3 * patch * patch), column = c, y, x;
        value = pixel / 127.5 - 1, padding = -1.
        """
        height, width = image
        if height % patch or width % patch:
            raise EngineError(f"tape: image {height}x{width} is no multiple of the patch size {patch}")
        if (geometry.rows, geometry.cols) != (frames.rows, 8):
            raise EngineError(f"tape: geometry: expected ({frames.rows}, 8)")
        patches = (height // patch) * (width // patch)
        out = self.temp("patches", (frames.rows * patches, 3 * patch * patch))
        attrs = {"height": height, "width": width, "patch": patch}
        self._record("image_patches", {"frames": frames, "geometry": geometry, "out": out}, (), attrs)
        return out

    def linear(
        self,
        x: Tensor,
        w: Weight,
        *,
        norm: Norm | None = None,
        bias: Tensor | None = None,
        act: str = "none",
        scale: float = 1.0,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """y = residual + gate * act(scale * (norm(x) W^T + bias)).

        x (m, k), W (n, k), bias and gate (1, n), y (m, n). residual (r, n) with m a multiple of r: row i is added
        to rows i, i + r, ...; it may be y itself.
        """
        self._inner("linear", x, w)
        for name, t in (("bias", bias), ("gate", gate)):
            if t is not None and (t.rows, t.cols) != (1, w.n):
                raise EngineError(
                    f"tape: linear {w.name}: {name} is ({t.rows}, {t.cols}), expected (1, {w.n})"
                )
        if residual is not None and (residual.cols != w.n or x.rows % residual.rows):
            raise EngineError(f"tape: linear {w.name}: residual is ({residual.rows}, {residual.cols})")
        y = self._out(out, w.name, (x.rows, w.n))
        norm_operands, attrs = self._norm(norm, w.k)
        operands = {"x": x, **norm_operands, "bias": bias, "residual": residual, "gate": gate, "out": y}
        attrs |= {"act": ACTIVATIONS[act], "scale": scale}
        self._record("linear", operands, (w,), attrs)
        return y

    def gated_linear(self, x: Tensor, gate: Weight, up: Weight, *, norm: Norm | None, act: str) -> Tensor:
        """y = act(norm(x) G^T) * (norm(x) U^T): x (m, k), G and U (n, k), y (m, n)."""
        self._inner("gated_linear", x, gate, up)
        y = self.temp(gate.name, (x.rows, gate.n))
        norm_operands, attrs = self._norm(norm, gate.k)
        attrs |= {"act": ACTIVATIONS[act]}
        self._record("gated_linear", {"x": x, **norm_operands, "out": y}, (gate, up), attrs)
        return y

    def qkv(
        self,
        x: Tensor,
        weights: Mapping[str, Weight],
        *,
        head_dim: int,
        norm: Norm | None = None,
        biases: Mapping[str, Tensor] | None = None,
        rope: Rope | None = None,
        into: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """q, k and v = norm(x) W^T + bias, then rotary embedding on the heads of q and k.

        weights: any of "q", "k", "v" -> (heads * head_dim, k). `into` gives the places to write (a key cache).
        Rotary, for a head h = [h1 | h2]: [h1 cos - h2 sin | h2 cos + h1 sin] (Su et al. 2021, half-split form).
        """
        names = [n for n in ("q", "k", "v") if n in weights]
        self._inner("qkv", x, *(weights[n] for n in names))
        outs: dict[str, Tensor] = {}
        operands: dict[str, Tensor | None] = {"x": x}
        for n in names:
            w = weights[n]
            if w.n % head_dim:
                raise EngineError(f"tape: qkv {w.name}: {w.n} rows are no multiple of head_dim {head_dim}")
            outs[n] = self._out((into or {}).get(n), w.name, (x.rows, w.n))
            operands[n] = outs[n]
            operands[f"{n}_bias"] = (biases or {}).get(n)
        norm_operands, attrs = self._norm(norm, x.cols)
        operands |= norm_operands
        attrs |= {"head_dim": head_dim}
        if rope is not None:
            if rope.table.cols != head_dim or (rope.positions.rows, rope.positions.cols) != (x.rows, 1):
                raise EngineError(f"tape: qkv {weights[names[0]].name}: rope does not fit {x.rows} rows")
            operands |= {"rope": rope.table, "positions": rope.positions}
        self._record("qkv", operands, tuple(weights[n] for n in names), attrs)
        return outs

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        head_dim: int,
        batch: int = 1,
        blocks: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """out = softmax(q k^T / sqrt(head_dim) + mask) v for each head, groups of query heads sharing a key head.

        q (batch * m, heads * d), k and v (batch * n, kv_heads * d), out as q. blocks: query blocks (m, 1) and key
        blocks (n, 1), i32: a query sees the keys whose block is not above its own (so a key in block 2**30 is
        seen by none); without them it sees all. A row that sees no key gives zeros.
        """
        heads, kv_heads = q.cols // head_dim, k.cols // head_dim
        if q.cols % head_dim or k.cols != v.cols or k.rows != v.rows or not kv_heads or heads % kv_heads:
            raise EngineError(f"tape: attention: q {q.cols}, k {k.cols}, v {v.cols}, head_dim {head_dim}")
        if q.rows % batch or k.rows % batch:
            raise EngineError(f"tape: attention: {q.rows} and {k.rows} rows in {batch} batches")
        operands: dict[str, Tensor | None] = {"q": q, "k": k, "v": v}
        if blocks is not None:
            operands |= {"q_block": blocks[0], "k_block": blocks[1]}
            if (blocks[0].rows, blocks[1].rows) != (q.rows // batch, k.rows // batch):
                raise EngineError(f"tape: attention: blocks of {blocks[0].rows} and {blocks[1].rows} rows")
        out = self.temp("attention", (q.rows, q.cols))
        operands["out"] = out
        self._record("attention", operands, (), {"head_dim": head_dim, "batch": batch})
        return out

    def space_to_depth(self, x: Tensor, factor: int, *, grid: tuple[int, int], norm: Norm | None) -> Tensor:
        """norm(x), then each factor x factor square of a (height, width) grid of rows becomes one row.

        x (batch * height * width, d), out (batch * height * width / factor^2, d * factor^2), columns in the order
        row in the square, column in the square, feature.
        """
        height, width = grid
        if x.rows % (height * width) or height % factor or width % factor:
            raise EngineError(f"tape: space_to_depth: {x.rows} rows, grid {grid}, factor {factor}")
        out = self.temp("space_to_depth", (x.rows // factor**2, x.cols * factor**2))
        norm_operands, attrs = self._norm(norm, x.cols)
        attrs |= {"factor": factor, "height": height, "width": width}
        self._record("space_to_depth", {"x": x, **norm_operands, "out": out}, (), attrs)
        return out

    def embed(self, tokens: Tensor, table: Tensor, *, scale: float, out: Tensor) -> Tensor:
        """out[i] = scale * table[tokens[i]]: tokens (m, 1) i32, table (vocabulary, d), out (m, d)."""
        y = self._out(out, "embed", (tokens.rows, table.cols))
        self._record("embed", {"tokens": tokens, "table": table, "out": y}, (), {"scale": scale})
        return y

    def euler(
        self,
        h: Tensor,
        w: Weight,
        x: Tensor,
        *,
        norm: Norm,
        bias: Tensor,
        dt: float,
        time: Tensor,
        guide: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """One step of flow matching, in place: v = norm(h) W^T + bias;  x += dt * v', where

        v' = v - gain * weight * (previous - (x - time * v))  is the guided velocity of real-time chunking
        (Black, Galliker, Levine 2025, with the Jacobian taken as the identity). h (m, k), W (n, k), x and
        previous (m, n) f32, weight (m, 1) f32 (0 = not guided), gain and time (1, 1) f32 of this step.
        guide = (previous, weight, gain).
        """
        self._inner("euler", h, w)
        previous, weight, gain = guide
        if (x.rows, x.cols) != (h.rows, w.n) or (previous.rows, previous.cols) != (x.rows, x.cols):
            raise EngineError(f"tape: euler {w.name}: x is ({x.rows}, {x.cols}), expected ({h.rows}, {w.n})")
        norm_operands, attrs = self._norm(norm, w.k)
        operands = {"h": h, **norm_operands, "bias": bias, "x": x, "previous": previous}
        operands |= {"weight": weight, "gain": gain, "time": time}
        self._record("euler", operands, (w,), attrs | {"dt": dt})
