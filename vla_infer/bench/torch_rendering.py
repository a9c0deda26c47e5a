"""A tape as PyTorch is at its best with it: two graphs of PyTorch's own operators, what is done once a call and what
is done in each denoising step. q, k and v are one product, gate and up another; attention is
`scaled_dot_product_attention`; nothing leaves the policy's precision but the actions themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import fx

from vla_infer.bench.rendering import LOAD, ONCE, STEP, Renderer, Value, picture
from vla_infer.reference import DTYPES, to_torch
from vla_infer.tape import ACTIVATIONS, NORMS, Buffer, Op, Tape, Tensor

ReadWeight = Callable[[str], npt.NDArray[np.generic]]
Operands = dict[str, Value]


class TorchRenderer(Renderer):
    """Values are tensors at load, nodes of a graph after. precision: "fp32" or "bf16"."""

    def __init__(
        self,
        tape: Tape,
        read: ReadWeight,
        precision: str,
        *,
        geometry: npt.NDArray[np.int32],
        device: str = "cpu",
    ) -> None:
        super().__init__(tape)
        self.act = DTYPES[precision]
        self.device = device
        self.geometry = geometry
        self._weight = read
        self._graphs = {ONCE: fx.Graph(), STEP: fx.Graph()}
        self._roots = {ONCE: torch.nn.Module(), STEP: torch.nn.Module()}
        self._made: dict[object, Value] = {}
        self._places: dict[tuple[int, Value], fx.Node] = {}
        self._crossing: list[Value] = []  # once a call, read in the steps
        self._tables: list[Value] = []  # tables of which a step reads its row
        self._first: Value | None = None
        result = self.walk()["actions"]
        self.once, self.step = self._modules(result)

    def _dtype(self, name: str) -> torch.dtype:
        return {"act": self.act, "f32": torch.float32, "i32": torch.int32, "u8": torch.uint8}[name]

    # ------------------------------------------------------------------ graphs
    def _modules(self, result: Value) -> tuple[fx.GraphModule, fx.GraphModule]:
        once = [self._first, *self._crossing, *(v for v in self._tables if v.level == ONCE)]
        self._graphs[ONCE].output(tuple(self._at(v, ONCE) for v in once if v is not None))
        self._graphs[STEP].output(self._at(result, STEP))
        modules = [fx.GraphModule(self._roots[level], self._graphs[level]).eval() for level in (ONCE, STEP)]
        return modules[0], modules[1]

    def run(
        self,
        inputs: dict[str, torch.Tensor],
        once: Callable[..., Any] | None = None,
        step: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """Inputs to actions. `once` and `step` may be compiled forms of the two graphs."""
        given = (inputs[name] for name in self.tape.inputs if name != "geometry")
        first, *rest = (self.once if once is None else once)(*given)
        crossing, tables = rest[: len(self._crossing)], iter(rest[len(self._crossing) :])
        rows = [
            list(next(tables).split(1)) if v.level == ONCE else self._split[i]
            for i, v in enumerate(self._tables)
        ]
        x: torch.Tensor = first
        step = self.step if step is None else step
        for i in range(self.tape.steps):
            x = step(x, *crossing, *(table[i] for table in rows))
        return x

    def _at(self, value: Value, level: int) -> Any:
        """What a graph of `level` calls `value`."""
        if value.level == level or level == LOAD:
            return value.handle
        if (level, value) not in self._places:
            graph = self._graphs[level]
            if value.level == LOAD:
                name = f"c{len(self._places)}"
                self._roots[level].register_buffer(name, value.handle)
                node = graph.get_attr(name)
            else:
                node = self._new_place(f"once{len(self._crossing)}", after=self._crossing)
                self._crossing.append(value)
            self._places[level, value] = node
        return self._places[level, value]

    def _new_place(self, name: str, *, after: list[Value]) -> fx.Node:
        """A placeholder of the steps' graph, behind those of `after`: x, what crosses, then rows of tables."""
        graph = self._graphs[STEP]
        assert self._first is not None
        ahead = self._places[STEP, after[-1]] if after else self._x
        with graph.inserting_after(ahead):
            return graph.placeholder(name)

    def call(self, function: Callable[..., Any], *args: Any, dtype: str = "act", **options: Any) -> Value:
        """function(*args), at the highest level of the values among them; made once."""
        key = (function, tuple(_key(a) for a in args), tuple(sorted(options.items(), key=lambda o: o[0])))
        if key not in self._made:
            values = [a for a in (*args, *options.values()) if isinstance(a, Value)]
            values += [v for a in args if isinstance(a, tuple) for v in a if isinstance(v, Value)]
            level = max(v.level for v in values)

            def here(a: Any) -> Any:
                if isinstance(a, tuple):
                    return tuple(here(v) for v in a)
                return self._at(a, level) if isinstance(a, Value) else a

            given, named = tuple(here(a) for a in args), {k: here(a) for k, a in options.items()}
            if level == LOAD:
                with torch.no_grad():
                    handle = function(*given, **named)
            else:
                handle = self._graphs[level].call_function(function, given, named)
            self._made[key] = Value(handle, level, dtype)
        return self._made[key]

    # ------------------------------------------------------------------ values
    def input(self, name: str, t: Tensor) -> Value:
        if name == "geometry":
            return Value(None, LOAD, "i32")
        return Value(self._graphs[ONCE].placeholder(name), ONCE, t.dtype)

    def stored(self, buffer: Buffer) -> Value:
        if ("stored", buffer.id) not in self._made:
            values = self._weight(buffer.name) if buffer.kind == "param" else buffer.values
            assert values is not None
            tensor = to_torch(np.asarray(values)).reshape(buffer.rows, buffer.cols)
            tensor = tensor.to(self.device, self._dtype(buffer.dtype))
            self._made["stored", buffer.id] = Value(tensor, LOAD, buffer.dtype)
        return self._made["stored", buffer.id]

    def cut(self, value: Value, axis: int, start: int, stop: int) -> Value:
        return self.call(torch.narrow, value, axis, start, stop - start, dtype=value.dtype)

    def stack(self, values: list[Value]) -> Value:
        return self.call(torch.cat, tuple(values), dtype=values[0].dtype)

    def row_of_step(self, value: Value, first: int) -> Value:
        assert first == 0
        key = ("row", value)
        if key not in self._made:
            node = self._new_row()
            self._tables.append(value)
            self._made[key] = Value(node, STEP, value.dtype)
            self._places[STEP, self._made[key]] = node
        return self._made[key]

    def _new_row(self) -> fx.Node:
        graph = self._graphs[STEP]
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            return graph.placeholder(f"row{len(self._tables)}")

    @property
    def _split(self) -> dict[int, list[torch.Tensor]]:
        if not hasattr(self, "_split_rows"):
            self._split_rows = {
                i: [row.clone() for row in v.handle.split(1)]
                for i, v in enumerate(self._tables)
                if v.level == LOAD
            }
        return self._split_rows

    def carried(self, value: Value) -> Value:
        self._first = value
        self._x = self._graphs[STEP].placeholder("x")
        return Value(self._x, STEP, value.dtype)

    def cast(self, value: Value, dtype: str) -> Value:
        if self._dtype(value.dtype) == self._dtype(dtype):
            return Value(value.handle, value.level, dtype)
        return self.call(_to, value, self._dtype(dtype), dtype=dtype)

    def _act(self, value: Value) -> Value:
        return value if self._dtype(value.dtype) == self.act else self.cast(value, "act")

    # -------------------------------------------------------------- operations
    def _weights(self, op: Op) -> Value:
        """The matrices of a product under each other, (sum of n, k)."""
        key = ("weights", op.weights)
        if key not in self._made:
            parts = []
            for w in op.weights:
                full = to_torch(self._weight(w.name))
                full = full.reshape(full.shape[0], -1)
                parts.append(full if w.cols is None else full[:, w.cols[0] : w.cols[1]])
            tensor = torch.cat([p.to(self.device, self.act) for p in parts]).contiguous()
            self._made[key] = Value(tensor, LOAD)
        return self._made[key]

    def _flat(self, value: Value) -> Value:
        return self.call(torch.flatten, self._act(value))

    def _normed(self, op: Op, o: Operands, x: Value) -> Value:
        kind = op.attrs["norm"]
        x = self._act(x)
        if kind == NORMS["none"]:
            return x
        k = op.operands["h" if op.kind == "euler" else "x"].cols
        weight = self._flat(o["norm_weight"]) if "norm_weight" in o else None
        if weight is not None and op.attrs["plus"]:
            weight = self.call(operator.add, weight, op.attrs["plus"])
        bias = self._flat(o["norm_bias"]) if "norm_bias" in o else None
        if kind == NORMS["layer"]:
            return self.call(F.layer_norm, x, (k,), weight, bias, op.attrs["eps"])
        y = self.call(F.rms_norm, x, (k,), weight, op.attrs["eps"])
        return y if bias is None else self.call(operator.add, y, bias)

    def _acted(self, op: Op, y: Value) -> Value:
        if op.attrs["act"] == ACTIVATIONS["gelu_tanh"]:
            return self.call(F.gelu, y, approximate="tanh")
        return self.call(F.silu, y) if op.attrs["act"] == ACTIVATIONS["silu"] else y

    def op_linear(self, op: Op, o: Operands) -> Operands:
        bias = self._flat(o["bias"]) if "bias" in o else None
        y = self.call(F.linear, self._normed(op, o, o["x"]), self._weights(op), bias)
        if op.attrs["scale"] != 1.0:
            y = self.call(operator.mul, y, op.attrs["scale"])
        y = self._acted(op, y)
        if "gate" in o:
            y = self.call(operator.mul, y, self._act(o["gate"]))
        if "residual" in o:
            out, rows = op.operands["out"], op.operands["residual"].rows
            residual = self._act(o["residual"])
            if rows == out.rows:
                y = self.call(operator.add, y, residual)
            else:
                y = self.call(torch.reshape, y, (-1, rows, out.cols))
                y = self.call(torch.reshape, self.call(operator.add, y, residual), (out.rows, out.cols))
        return {"out": y}

    def op_gated_linear(self, op: Op, o: Operands) -> Operands:
        y = self.call(F.linear, self._normed(op, o, o["x"]), self._weights(op))
        n = op.weights[0].n
        gate, up = self.cut(y, 1, 0, n), self.cut(y, 1, n, 2 * n)
        return {"out": self.call(operator.mul, self._acted(op, gate), up)}

    def op_qkv(self, op: Op, o: Operands) -> Operands:
        names = [n for n in "qkv" if n in op.operands]
        widths = [w.n for w in op.weights]
        biases = tuple(self._flat(o[f"{n}_bias"]) for n in names if f"{n}_bias" in o)
        bias = self.call(torch.cat, biases) if biases else None
        y = self.call(F.linear, self._normed(op, o, o["x"]), self._weights(op), bias)
        ends = np.cumsum([0, *widths]).tolist()
        parts = {n: (y, ends[i], ends[i + 1]) for i, n in enumerate(names)}
        turned = sum(w for n, w in zip(names, widths, strict=True) if n != "v")
        if "rope" in o and turned:
            x = self.cut(y, 1, 0, turned) if turned != ends[-1] else y
            x = self._rotated(op, o, x, turned)
            parts |= {n: (x, *parts[n][1:]) for n in names if n != "v"}
        return {n: self.cut(v, 1, a, b) if (a, b) != (0, ends[-1]) else v for n, (v, a, b) in parts.items()}

    def _rotated(self, op: Op, o: Operands, x: Value, width: int) -> Value:
        """[h1 cos - h2 sin | h2 cos + h1 sin] of all heads of q and k together."""
        d = int(op.attrs["head_dim"])
        rows = op.operands["x"].rows
        positions = self.call(torch.flatten, o["positions"], dtype="i32")
        table = self.call(F.embedding, positions, self._act(o["rope"]))
        cos, sin = (self.call(torch.unsqueeze, self.cut(table, 1, a, a + d // 2), 1) for a in (0, d // 2))
        heads = self.call(torch.reshape, x, (rows, width // d, d))
        h1, h2 = (self.call(torch.narrow, heads, 2, a, d // 2) for a in (0, d // 2))
        mul = operator.mul
        low = self.call(operator.sub, self.call(mul, h1, cos), self.call(mul, h2, sin))
        high = self.call(operator.add, self.call(mul, h2, cos), self.call(mul, h1, sin))
        return self.call(torch.reshape, self.call(torch.cat, (low, high), dim=-1), (rows, width))

    def op_attention(self, op: Op, o: Operands) -> Operands:
        d, batch = int(op.attrs["head_dim"]), int(op.attrs["batch"])
        q_view, k_view = op.operands["q"], op.operands["k"]

        def heads(name: str) -> Value:
            t = op.operands[name]
            x = self.call(torch.reshape, o[name], (batch, t.rows // batch, t.cols // d, d))
            return self.call(torch.transpose, x, 1, 2)

        options: dict[str, Any] = {"enable_gqa": q_view.cols != k_view.cols}
        if "q_block" in o:
            columns = self.call(torch.reshape, o["k_block"], (1, k_view.rows // batch), dtype="i32")
            seen = self.call(torch.le, columns, o["q_block"], dtype="bool")
            none = torch.zeros((), dtype=self.act, device=self.device)
            zero, unseen = (Value(none + v, LOAD) for v in (0.0, float("-inf")))
            options["attn_mask"] = self._mask(seen, zero, unseen)
        y = self.call(F.scaled_dot_product_attention, heads("q"), heads("k"), heads("v"), **options)
        y = self.call(torch.reshape, self.call(torch.transpose, y, 1, 2), (q_view.rows, q_view.cols))
        return {"out": y}

    def _mask(self, seen: Value, zero: Value, unseen: Value) -> Value:
        key = ("mask", seen)
        if key not in self._made:
            self._made[key] = self.call(torch.where, seen, zero, unseen)
        return self._made[key]

    def op_space_to_depth(self, op: Op, o: Operands) -> Operands:
        f, height, width = (int(op.attrs[n]) for n in ("factor", "height", "width"))
        out = op.operands["out"]
        x = self._normed(op, o, o["x"])
        x = self.call(torch.reshape, x, (-1, height // f, f, width // f, f, op.operands["x"].cols))
        return {"out": self.call(torch.reshape, self.call(torch.transpose, x, 2, 3), (out.rows, out.cols))}

    def op_embed(self, op: Op, o: Operands) -> Operands:
        tokens = self.call(torch.flatten, o["tokens"], dtype="i32")
        y = self.call(F.embedding, tokens, self._act(o["table"]))
        return {"out": y if op.attrs["scale"] == 1.0 else self.call(operator.mul, y, op.attrs["scale"])}

    def op_image_patches(self, op: Op, o: Operands) -> Operands:
        height, width, p = (int(op.attrs[n]) for n in ("height", "width", "patch"))
        h, wide, stride, new_h, new_w, top, left = picture(self.geometry)
        out = op.operands["out"]
        x = self.call(torch.narrow, o["frames"], 1, 0, h * stride, dtype="u8")
        x = self.call(torch.reshape, x, (-1, h, stride), dtype="u8")
        x = self.call(torch.narrow, x, 2, 0, 3 * wide, dtype="u8")
        x = self.call(torch.reshape, x, (-1, h, wide, 3), dtype="u8")
        x = self.call(torch.permute, x, (0, 3, 1, 2), dtype="u8")
        x = self.call(_to, x, torch.float32, dtype="f32")
        if (new_h, new_w) != (h, wide):
            x = self.call(F.interpolate, x, (new_h, new_w), mode="bilinear", align_corners=False, dtype="f32")
        x = self.call(operator.sub, self.call(operator.mul, x, 1 / 127.5, dtype="f32"), 1.0, dtype="f32")
        edges = (left, width - left - new_w, top, height - top - new_h)
        x = self._act(self.call(F.pad, x, edges, value=-1.0, dtype="f32"))
        x = self.call(torch.reshape, x, (-1, 3, height // p, p, width // p, p))
        x = self.call(torch.permute, x, (0, 2, 4, 1, 3, 5))
        return {"out": self.call(torch.reshape, x, (out.rows, out.cols))}

    def op_euler(self, op: Op, o: Operands) -> Operands:
        add, sub, mul = operator.add, operator.sub, operator.mul
        full = {"dtype": "f32"}
        h = self.cast(self._normed(op, o, o["h"]), "f32")
        w, bias = self.cast(self._weights(op), "f32"), self.call(torch.flatten, o["bias"], **full)
        v = self.call(F.linear, h, w, bias, **full)
        ahead = self.call(sub, o["x"], self.call(mul, o["time"], v, **full), **full)
        error = self.call(mul, self.call(sub, o["previous"], ahead, **full), o["weight"], **full)
        v = self.call(sub, v, self.call(mul, o["gain"], error, **full), **full)
        return {"x": self.call(add, o["x"], self.call(mul, v, op.attrs["dt"], **full), **full)}


def _key(argument: Any) -> object:
    return tuple(_key(a) for a in argument) if isinstance(argument, tuple) else argument


def _to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype)
