"""A tape as ONNX, for ONNX Runtime and OpenVINO.

Float32, or int8 weights: for ONNX Runtime `DynamicQuantizeMatMul` (rows quantised as they come, int8 products), for
OpenVINO `DequantizeLinear` in front of a product, which it keeps as compressed weights. The denoising loop is
an ONNX `Loop`: unrolled, or a model of its own called once a step, was nowhere faster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from vla_infer.bench.onnx_file import Nodes, WeightFile, info, quantized, save
from vla_infer.bench.peers import Job
from vla_infer.bench.rendering import LOAD, ONCE, STEP, Renderer, Value, picture
from vla_infer.safetensors_io import to_float32
from vla_infer.tape import ACTIVATIONS, NORMS, Buffer, Op, Tape, Tensor

_UNSEEN = -1e30  # of a score; bfloat16 has it too

ReadWeight = Callable[[str], npt.NDArray[np.generic]]
Operands = dict[str, Value]


@dataclass(frozen=True)
class Dialect:
    """What a peer likes. contrib: ONNX Runtime's own fused operators; int8: weights in int8."""

    contrib: bool
    int8: bool


@dataclass(frozen=True)
class Exported:
    """A model on disk, with the names of what it takes and gives."""

    path: Path
    inputs: tuple[str, ...]
    output: str


@contextmanager
def exported(job: Job, dialect: Dialect) -> Iterator[Exported]:
    """The tape of a job as files that are there as long as the context is."""
    with tempfile.TemporaryDirectory(dir=job.scratch) as name:
        folder, geometry = Path(name), job.inputs(0)["geometry"]
        renderer = OnnxRenderer(job.tape, job.read, dialect, geometry=geometry, weights=WeightFile(folder))
        yield renderer.export(folder / "tape.onnx")


class OnnxRenderer(Renderer):
    """Values are names. Level LOAD is what a runtime folds into constants."""

    def __init__(
        self,
        tape: Tape,
        read: ReadWeight,
        dialect: Dialect,
        *,
        geometry: npt.NDArray[np.int32],
        weights: WeightFile,
    ) -> None:
        super().__init__(tape)
        self.dialect = dialect
        self.geometry = geometry
        self._weight = read
        self._file = weights
        self._main, self._body = Nodes(), Nodes()
        self._made: dict[object, Any] = {}
        self._inputs: list[Any] = []
        self._first: Value | None = None
        self._count = 0

    def export(self, path: Path) -> Exported:
        """Write the model."""
        result = self.walk()["actions"]
        t = self.tape.outputs["actions"]
        if self._first is not None:
            result = self._looped(result, (t.rows, t.cols))
        ends = (self._inputs, [info(result.handle, "f32", (t.rows, t.cols))])
        save(self._main.nodes, self._main.initializers.values(), ends, path)
        return Exported(path, tuple(i.name for i in self._inputs), result.handle)

    def _looped(self, result: Value, shape: tuple[int, int]) -> Value:
        assert self._first is not None
        body = helper.make_graph(
            [*self._body.nodes, helper.make_node("Identity", ["going"], ["going_on"])],
            "denoising_step",
            [info("step", "i64", ()), info("going", "bool", ()), info("x", "f32", shape)],
            [info("going_on", "bool", ()), info(result.handle, "f32", shape)],
        )
        count = self.array("steps", np.array(self.tape.steps, np.int64))
        going = self.array("true", np.ones((), np.bool_))
        names = [count.handle, going.handle, self._first.handle]
        self._main.nodes.append(helper.make_node("Loop", names, ["denoised"], body=body))
        return Value("denoised", ONCE, "f32")

    # -------------------------------------------------------------------- nodes
    def node(
        self, kind: str, *inputs: Value | None, dtype: str = "f32", outputs: int = 1, **attrs: Any
    ) -> Any:
        """One node at the highest level of its inputs, made once; a value, or a list of them for several outputs."""
        names = tuple("" if v is None else v.handle for v in inputs)
        key = (kind, names, outputs, tuple(sorted((k, str(v)) for k, v in attrs.items())))
        if key not in self._made:
            level = max(v.level for v in inputs if v is not None)
            self._count += 1
            outs = [f"{kind}_{self._count}_{i}" for i in range(outputs)]
            made = [Value(name, level, dtype) for name in outs]
            domain = "com.microsoft" if kind in _CONTRIB else ""
            place = self._body if level == STEP else self._main
            place.nodes.append(helper.make_node(kind, names, outs, outs[0], domain=domain, **attrs))
            self._made[key] = made if outputs > 1 else made[0]
        return self._made[key]

    def array(self, key: object, values: npt.NDArray[Any] | Callable[[], npt.NDArray[Any]]) -> Value:
        """A constant. `values` may be a function, called where the key is new."""
        if ("array", key) not in self._made:
            name = f"w{len(self._main.initializers)}"
            make = values if callable(values) else lambda: values
            self._main.initializers[name] = self._file.tensor(name, key, make)
            self._made["array", key] = Value(name, LOAD, "f32")
        value: Value = self._made["array", key]
        return value

    def ints(self, *values: int) -> Value:
        return self.array(("ints", values), np.array(values, np.int64))

    def number(self, value: float) -> Value:
        return self.array(("number", value), np.array(value, np.float32))

    def shaped(self, x: Value, *shape: int) -> Value:
        v: Value = self.node("Reshape", x, self.ints(*shape), dtype=x.dtype)
        return v

    def turned(self, x: Value, *order: int) -> Value:
        v: Value = self.node("Transpose", x, dtype=x.dtype, perm=list(order))
        return v

    # ------------------------------------------------------------------- values
    def input(self, name: str, t: Tensor) -> Value:
        if name == "geometry":
            return Value(None, LOAD, "i32")
        self._inputs.append(info(name, t.dtype, (t.rows, t.cols)))
        return Value(name, ONCE, t.dtype)

    def stored(self, buffer: Buffer) -> Value:
        if buffer.kind == "param":
            made = self.array(buffer.name, lambda: self._read(buffer.name).reshape(buffer.rows, buffer.cols))
        else:
            assert buffer.values is not None
            made = self.array((buffer.name, buffer.values.tobytes()), np.asarray(buffer.values))
        return Value(made.handle, LOAD, buffer.dtype)

    def _read(self, name: str) -> npt.NDArray[np.float32]:
        values = self._weight(name)
        return to_float32(values, "BF16") if values.dtype == np.uint16 else np.asarray(values, np.float32)

    def cut(self, value: Value, axis: int, start: int, stop: int) -> Value:
        ends = (self.ints(start), self.ints(stop), self.ints(axis))
        v: Value = self.node("Slice", value, *ends, dtype=value.dtype)
        return v

    def stack(self, values: list[Value]) -> Value:
        v: Value = self.node("Concat", *values, dtype=values[0].dtype, axis=0)
        return v

    def row_of_step(self, value: Value, first: int) -> Value:
        assert first == 0
        index = self.node("Reshape", Value("step", STEP, "i64"), self.ints(1), dtype="i64")
        v: Value = self.node("Gather", value, index, dtype=value.dtype, axis=0)
        return v

    def carried(self, value: Value) -> Value:
        self._first = value
        return Value("x", STEP, value.dtype)

    def cast(self, value: Value, dtype: str) -> Value:
        return Value(value.handle, value.level, dtype)  # float32 is all there is

    # --------------------------------------------------------------- operations
    def _matrices(self, op: Op) -> npt.NDArray[np.float32]:
        """The weights of a product under each other, (n, k)."""
        parts = []
        for w in op.weights:
            full = self._read(w.name)
            full = full.reshape(full.shape[0], -1)
            parts.append(full if w.cols is None else full[:, w.cols[0] : w.cols[1]])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def product(self, op: Op, x: Value, bias: Value | None) -> Value:
        """x W^T + bias."""
        quantize = self.dialect.int8 and op.kind != "euler" and x.level != LOAD
        made: dict[str, npt.NDArray[Any]] = {}

        def part(name: str) -> npt.NDArray[Any]:
            if not made:
                made["int8"], made["scale"] = quantized(self._matrices(op))
                made["turned"] = made["int8"].T
            return made[name]

        if not quantize:
            w = self.array(op.weights, lambda: self._matrices(op))
        elif self.dialect.contrib:
            turned = self.array((op.weights, "turned"), lambda: part("turned"))
            scale = self.array((op.weights, "scale"), lambda: part("scale"))
            y: Value = self.node("DynamicQuantizeMatMul", x, turned, scale)
            return y if bias is None else self._add(y, bias)
        else:
            whole = self.array((op.weights, "int8"), lambda: part("int8"))
            scale = self.array((op.weights, "scale"), lambda: part("scale"))
            w = self.node("DequantizeLinear", whole, scale, axis=0)
        given = (x, w) if bias is None else (x, w, bias)
        y = self.node("Gemm", *given, transB=1)
        return y

    def _add(self, a: Value, b: Value) -> Value:
        v: Value = self.node("Add", a, b)
        return v

    def _mul(self, a: Value, b: Value | float) -> Value:
        v: Value = self.node("Mul", a, b if isinstance(b, Value) else self.number(b))
        return v

    def _normed(self, op: Op, o: Operands, x: Value) -> Value:
        kind = op.attrs["norm"]
        if kind == NORMS["none"]:
            return x
        weight, bias, eps = o.get("norm_weight"), o.get("norm_bias"), float(op.attrs["eps"])
        if weight is not None and op.attrs["plus"]:
            weight = self._add(weight, self.number(op.attrs["plus"]))
        width = op.operands["h" if op.kind == "euler" else "x"].cols
        if weight is None:
            weight = self.array(("ones", width), np.ones(width, np.float32))
        weight = self.shaped(weight, width)
        if kind == NORMS["layer"]:
            given = (x, weight) if bias is None else (x, weight, self.shaped(bias, width))
            y: Value = self.node("LayerNormalization", *given, axis=-1, epsilon=eps)
            return y
        if self.dialect.contrib:
            y = self.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)
        else:
            mean = self.node("ReduceMean", self._mul(x, x), self.ints(-1), keepdims=1)
            root = self.node("Sqrt", self._add(mean, self.number(eps)))
            y = self._mul(self.node("Div", x, root), weight)
        return y if bias is None else self._add(y, bias)

    def _acted(self, op: Op, y: Value) -> Value:
        v: Value = y
        if op.attrs["act"] == ACTIVATIONS["gelu_tanh"]:
            v = self.node("Gelu", y, approximate="tanh")
        elif op.attrs["act"] == ACTIVATIONS["silu"] and self.dialect.contrib:
            v = self.node("QuickGelu", y, alpha=1.0)
        elif op.attrs["act"] == ACTIVATIONS["silu"]:
            v = self._mul(y, self.node("Sigmoid", y))
        return v

    def op_linear(self, op: Op, o: Operands) -> Operands:
        y = self.product(op, self._normed(op, o, o["x"]), o.get("bias"))
        if op.attrs["scale"] != 1.0:
            y = self._mul(y, op.attrs["scale"])
        y = self._acted(op, y)
        if "gate" in o:
            y = self._mul(y, o["gate"])
        if "residual" in o:
            out, rows = op.operands["out"], op.operands["residual"].rows
            if rows == out.rows:
                y = self._add(y, o["residual"])
            else:
                y = self._add(self.shaped(y, -1, rows, out.cols), o["residual"])
                y = self.shaped(y, out.rows, out.cols)
        return {"out": y}

    def _parts(self, y: Value, widths: list[int]) -> list[Value]:
        if len(widths) == 1:
            return [y]
        parts: list[Value] = self.node("Split", y, self.ints(*widths), outputs=len(widths), axis=1)
        return parts

    def op_gated_linear(self, op: Op, o: Operands) -> Operands:
        y = self.product(op, self._normed(op, o, o["x"]), None)
        gate, up = self._parts(y, [w.n for w in op.weights])
        return {"out": self._mul(self._acted(op, gate), up)}

    def op_qkv(self, op: Op, o: Operands) -> Operands:
        names = [n for n in "qkv" if n in op.operands]
        biases = [o[f"{n}_bias"] for n in names if f"{n}_bias" in o]
        bias = None
        if biases:
            bias = biases[0] if len(biases) == 1 else self.node("Concat", *biases, axis=1)
        y = self.product(op, self._normed(op, o, o["x"]), bias)
        parts = dict(zip(names, self._parts(y, [w.n for w in op.weights]), strict=True))
        if "rope" in o:
            rotated = self._rotated_contrib if self.dialect.contrib else self._rotated
            parts = {n: v if n == "v" else rotated(op, o, v, op.operands[n].cols) for n, v in parts.items()}
        return parts

    def _rotated_contrib(self, op: Op, o: Operands, x: Value, width: int) -> Value:
        d, rows = int(op.attrs["head_dim"]), op.operands["x"].rows
        positions = self.shaped(self.node("Cast", o["positions"], dtype="i64", to=7), 1, rows)
        cos, sin = self.cut(o["rope"], 1, 0, d // 2), self.cut(o["rope"], 1, d // 2, d)
        x = self.shaped(x, 1, rows, width)
        return self.shaped(self.node("RotaryEmbedding", x, positions, cos, sin), rows, width)

    def _rotated(self, op: Op, o: Operands, x: Value, width: int) -> Value:
        d, rows = int(op.attrs["head_dim"]), op.operands["x"].rows
        table = self.node("Gather", o["rope"], self.shaped(o["positions"], rows), axis=0)
        cos, sin = (self.shaped(self.cut(table, 1, a, a + d // 2), rows, 1, d // 2) for a in (0, d // 2))
        heads = self.shaped(x, rows, width // d, d)
        h1, h2 = (self.cut(heads, 2, a, a + d // 2) for a in (0, d // 2))
        low = self.node("Sub", self._mul(h1, cos), self._mul(h2, sin))
        high = self._add(self._mul(h2, cos), self._mul(h1, sin))
        return self.shaped(self.node("Concat", low, high, axis=2), rows, width)

    def op_attention(self, op: Op, o: Operands) -> Operands:
        d, batch = int(op.attrs["head_dim"]), int(op.attrs["batch"])
        q, k = op.operands["q"], op.operands["k"]
        heads, kv = q.cols // d, k.cols // d
        m, n, group = q.rows // batch, k.rows // batch, heads // kv
        if self.dialect.contrib and "q_block" not in o and group == 1:
            three = [self.shaped(o[name], batch, -1, q.cols) for name in ("q", "k", "v")]
            y = self.node("MultiHeadAttention", *three, num_heads=heads)
            return {"out": self.shaped(y, q.rows, q.cols)}
        # query heads that share a key head are further rows of it
        query = self.shaped(self._mul(o["q"], d**-0.5), batch, m, kv, group, d)
        query = self.shaped(self.turned(query, 0, 2, 3, 1, 4), batch, kv, group * m, d)
        keys = self.turned(self.shaped(o["k"], batch, n, kv, d), 0, 2, 3, 1)
        values = self.turned(self.shaped(o["v"], batch, n, kv, d), 0, 2, 1, 3)
        scores = self.node("MatMul", query, keys)
        if "q_block" in o:
            scores = self._add(self.shaped(scores, batch, kv, group, m, n), self._mask(o, n))
            scores = self.shaped(self.node("Softmax", scores, axis=-1), batch, kv, group * m, n)
        else:
            scores = self.node("Softmax", scores, axis=-1)
        y = self.shaped(self.node("MatMul", scores, values), batch, kv, group, m, d)
        return {"out": self.shaped(self.turned(y, 0, 3, 1, 2, 4), q.rows, q.cols)}

    def _mask(self, o: Operands, keys: int) -> Value:
        seen = self.node("LessOrEqual", self.shaped(o["k_block"], 1, keys), o["q_block"], dtype="bool")
        v: Value = self.node("Where", seen, self.number(0.0), self.number(_UNSEEN))
        return v

    def op_space_to_depth(self, op: Op, o: Operands) -> Operands:
        f, height, width = (int(op.attrs[n]) for n in ("factor", "height", "width"))
        out = op.operands["out"]
        x = self._normed(op, o, o["x"])
        x = self.shaped(x, -1, height // f, f, width // f, f, op.operands["x"].cols)
        return {"out": self.shaped(self.turned(x, 0, 1, 3, 2, 4, 5), out.rows, out.cols)}

    def op_embed(self, op: Op, o: Operands) -> Operands:
        tokens = self.shaped(o["tokens"], op.operands["tokens"].rows)
        y = self.node("Gather", o["table"], tokens, axis=0)
        return {"out": y if op.attrs["scale"] == 1.0 else self._mul(y, op.attrs["scale"])}

    def op_image_patches(self, op: Op, o: Operands) -> Operands:
        height, width, p = (int(op.attrs[n]) for n in ("height", "width", "patch"))
        h, wide, stride, new_h, new_w, top, left = picture(self.geometry)
        cameras, out = op.operands["frames"].rows, op.operands["out"]
        x = self.shaped(self.cut(o["frames"], 1, 0, h * stride), cameras, h, stride)
        x = self.turned(self.shaped(self.cut(x, 2, 0, 3 * wide), cameras, h, wide, 3), 0, 3, 1, 2)
        x = self.node("Cast", x, to=1)
        if (new_h, new_w) != (h, wide):
            size = self.ints(cameras, 3, new_h, new_w)
            x = self.node(
                "Resize", x, None, None, size, mode="linear", coordinate_transformation_mode="half_pixel"
            )
        x = self._add(self._mul(x, 1 / 127.5), self.number(-1.0))
        edges = self.ints(0, 0, top, left, 0, 0, height - top - new_h, width - left - new_w)
        x = self.node("Pad", x, edges, self.number(-1.0))
        x = self.turned(self.shaped(x, cameras, 3, height // p, p, width // p, p), 0, 2, 4, 1, 3, 5)
        return {"out": self.shaped(x, out.rows, out.cols)}

    def op_euler(self, op: Op, o: Operands) -> Operands:
        v = self.product(op, self._normed(op, o, o["h"]), o["bias"])
        ahead = self.node("Sub", o["x"], self._mul(o["time"], v))
        error = self._mul(self.node("Sub", o["previous"], ahead), o["weight"])
        v = self.node("Sub", v, self._mul(o["gain"], error))
        return {"x": self._add(o["x"], self._mul(v, op.attrs["dt"]))}


_CONTRIB = frozenset({"DynamicQuantizeMatMul", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding"})
