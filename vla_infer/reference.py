"""The reference executor: every operation of the tape in a few lines of PyTorch.

Slow, obviously right, differentiable: the yardstick of the other executors, and what trains the demonstration
policy. In float32 or float64 it computes what the formulas say; in bfloat16 it is what PyTorch itself makes of them,
which is the error the engine is measured against. In fp8 it is bfloat16 with the operands of some products rounded
to E4M3 (`vla_infer/fp8.py`).

Every operation works on the last two dimensions, the tape's rows and columns, and broadcasts over those before
them: inputs (batch, rows, cols) run a batch, and inputs (draws, batch, rows, cols) beside others of (batch, rows,
cols) run what depends on them alone once for each draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor as Torch

from vla_infer.errors import EngineError
from vla_infer.fp8 import E4M3_MAX, Scales, in_fp8, key, scale_of
from vla_infer.tape import ACTIVATIONS, NORMS, Op, Tape, Tensor, Weight

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_ACT: dict[int, Callable[[Torch], Torch]] = {
    ACTIVATIONS["none"]: lambda x: x,
    ACTIVATIONS["gelu_tanh"]: lambda x: F.gelu(x, approximate="tanh"),
    ACTIVATIONS["silu"]: F.silu,
}

ReadWeight = Callable[[str], npt.NDArray[np.generic]]


def to_torch(values: npt.NDArray[np.generic]) -> Torch:
    """A NumPy array as a tensor; uint16 holds bfloat16 bits."""
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(values))


def _rows(table: Torch, numbers: Torch) -> Torch:
    """Rows of `table` (n, d) for `numbers` (..., rows, 1); out of range: row 0."""
    i = numbers.squeeze(-1).long()
    return table[torch.where((i >= 0) & (i < table.shape[-2]), i, 0)]


def to_e4m3(x: Torch, scale: float | Torch) -> Torch:
    """x / scale to the nearest E4M3, clipped (which PyTorch does or not, by version); NaN stays NaN."""
    return (x.to(torch.float32) / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


class ReferenceExecutor:
    """Runs one tape. `read` gives a checkpoint tensor by name; precision: "fp32", "fp64", "bf16" or "fp8", which
    needs `scales`; device: as torch names it; like: an executor of the same policy, precision and device, whose
    weights this one shares.

    scales: what is in fp8 and how, None for nothing; in "fp64" with scales, all else is exact. observe: called with
    each product and its left operand after its norm, every time that it is computed. Both may be set between runs.
    """

    def __init__(
        self,
        tape: Tape,
        read: ReadWeight,
        precision: str = "fp32",
        *,
        device: str = "cpu",
        scales: Scales | None = None,
        like: ReferenceExecutor | None = None,
    ) -> None:
        if precision not in DTYPES:
            raise EngineError(f"reference: precision: expected one of {', '.join(DTYPES)}, got {precision!r}")
        if precision == "fp8" and scales is None:
            raise EngineError("reference: precision 'fp8' needs scales: see vla_infer.fp8.policy_scales")
        self.tape = tape
        self.scales = scales
        self.observe: Callable[[Op, Torch], None] | None = None
        self.device = device
        self.act = DTYPES[precision]
        # Numbers that the engine keeps in float32 stay so in bfloat16, as PyTorch's autocast would have them.
        self.full = torch.float64 if precision == "fp64" else torch.float32
        self.weights: dict[str, Torch] = {}
        self.eights: dict[
            Weight, tuple[Torch, Torch]
        ] = {}  # E4M3 and scales (n, 1), made when they are needed
        self.memory: dict[int, Torch] = {}
        for buffer in tape.buffers:
            if buffer.kind == "constant":
                assert buffer.values is not None
                self.memory[buffer.id] = to_torch(buffer.values).to(device, self._dtype(buffer.dtype))
        held = {}
        if like is not None:
            params = {b.name: like.memory[b.id] for b in like.tape.buffers if b.kind == "param"}
            held = like.weights | params
        with torch.no_grad():
            self.bind(lambda name: held[name] if name in held else to_torch(read(name)))
        if like is not None:
            self.eights = like.eights

    def bind(self, tensor: Callable[[str], Torch]) -> None:
        """Take the checkpoint's tensors from `tensor(name)` from now on, and compute anew what depends on them
        alone. Gradients flow into them where torch has them enabled."""
        self.eights = {}
        for name in {w.name: None for op in self.tape.ops for w in op.weights}:
            self.weights[name] = tensor(name).flatten(1).to(self.device, self.act)
        for buffer in self.tape.buffers:
            if buffer.kind == "param":
                values = tensor(buffer.name).reshape(buffer.rows, buffer.cols)
                self.memory[buffer.id] = values.to(self.device, self._dtype(buffer.dtype))
        for op in self.tape.ops:
            if op.at_load:
                self._run(op, 0)

    def _dtype(self, name: str) -> torch.dtype:
        return {"act": self.act, "f32": self.full, "i32": torch.int32, "u8": torch.uint8}[name]

    def _get(self, t: Tensor, step: int) -> Torch:
        row = t.row + step * t.step
        return self.memory[t.buffer.id][..., row : row + t.rows, t.col : t.col + t.cols]

    def _put(self, t: Tensor, value: Torch) -> None:
        """Write a view. Parts of a buffer are written on a copy, so that autograd's saved tensors stay whole."""
        buffer = t.buffer
        value = value.to(self._dtype(buffer.dtype))
        if (t.rows, t.cols) == (buffer.rows, buffer.cols):
            self.memory[buffer.id] = value
            return
        old = self.memory.get(buffer.id)
        if old is None:
            old = torch.zeros(buffer.rows, buffer.cols, dtype=value.dtype, device=self.device)
        lead = max(old.shape[:-2], value.shape[:-2], key=len)
        new = old.expand(*lead, buffer.rows, buffer.cols).clone()
        new[..., t.row : t.row + t.rows, t.col : t.col + t.cols] = value
        self.memory[buffer.id] = new

    def run(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        """Fill the inputs, run everything, return the outputs as float32 (float64) arrays."""
        with torch.no_grad():
            outputs = self.forward({name: to_torch(np.asarray(v)) for name, v in inputs.items()})
        return {name: t.to("cpu", self.full).numpy().copy() for name, t in outputs.items()}

    def forward(self, inputs: Mapping[str, Torch]) -> dict[str, Torch]:
        """As `run`, on tensors, with gradients where torch has them enabled. What an earlier run left is dropped."""
        for buffer in self.tape.buffers:
            if buffer.kind == "temp" and not self.tape.is_table(buffer):
                self.memory.pop(buffer.id, None)
        for name, t in self.tape.inputs.items():
            if name not in inputs:
                raise EngineError(f"reference: input {name!r} is missing")
            values = inputs[name]
            if values.shape[-2:] != (t.rows, t.cols):
                values = values.reshape(t.rows, t.cols)
            # Geometry is read on the host: from the device it would have to be waited for.
            device = "cpu" if name == "geometry" else self.device
            self.memory[t.buffer.id] = values.to(device, self._dtype(t.dtype))
        body = [op for op in self.tape.ops if not op.at_load]
        first = next((i for i, op in enumerate(body) if op.loop), len(body))
        last = len(body) - next((i for i, op in enumerate(reversed(body)) if op.loop), len(body))
        for op in body[:first]:
            self._run(op, 0)
        for step in range(self.tape.steps):
            for op in body[first:last]:
                self._run(op, step)
        for op in body[max(first, last) :]:
            self._run(op, 0)
        return {name: self._get(t, 0) for name, t in self.tape.outputs.items()}

    # ------------------------------------------------------------- operations
    def _run(self, op: Op, step: int) -> None:
        operands = {
            name: self._get(t, step)
            for name, t in op.operands.items()
            if t.buffer.id in self.memory and t in op.reads
        }
        weights = [self._eight(w) if self._in_fp8(op) else self._weight(w) for w in op.weights]
        results = getattr(self, f"_{op.kind}")(op, operands, weights)
        for name, value in results.items():
            self._put(op.operands[name], value)

    def _normed(self, op: Op, o: Mapping[str, Torch], x: Torch) -> Torch:
        kind = op.attrs["norm"]
        if kind == NORMS["none"]:
            return x.to(self.act)
        y = x.to(self.full)
        if kind == NORMS["layer"]:
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + op.attrs["eps"])
        if "norm_weight" in o:
            y = y * (o["norm_weight"] + op.attrs["plus"])
        if "norm_bias" in o:
            y = y + o["norm_bias"]
        return y.to(self.act)

    def _weight(self, w: Weight) -> Torch:
        full = self.weights[w.name]
        return full if w.cols is None else full[:, w.cols[0] : w.cols[1]]

    def _in_fp8(self, op: Op) -> bool:
        return self.scales is not None and in_fp8(op, self.scales.bf16)

    def _eight(self, w: Weight) -> Torch:
        """What is left of a weight in E4M3 with a scale for each row."""
        if w not in self.eights:
            full = self._weight(w).to(torch.float32)
            largest = full.abs().amax(1, keepdim=True)
            scale = torch.from_numpy(scale_of(largest.cpu().numpy())).to(self.device)
            self.eights[w] = to_e4m3(full, scale), scale
        values, scale = self.eights[w]
        return values.to(self.full) * scale

    def _left(self, op: Op, o: Mapping[str, Torch]) -> Torch:
        """The left operand of a product, norm(x); in fp8 what is left of it in E4M3."""
        x = self._normed(op, o, o["x"])
        if self.observe is not None:
            self.observe(op, x)
        if self.scales is None or not self._in_fp8(op):
            return x
        scale = self.scales.activations[key(op)]
        return to_e4m3(x, scale).to(self.full) * scale

    def _product(self, x: Torch, w: Torch, bias: Torch | None) -> Torch:
        if bias is not None and bias.dim() > 2:  # a bias of its own for each of a batch
            y = F.linear(x, w) + bias.to(x.dtype)
        else:
            y = F.linear(x, w, None if bias is None else bias.reshape(-1).to(x.dtype))
        return y.to(self.act)

    def _linear(self, op: Op, o: Mapping[str, Torch], w: list[Torch]) -> dict[str, Torch]:
        y = self._product(self._left(op, o), w[0], o.get("bias"))
        if op.attrs["scale"] != 1.0:
            y = y * op.attrs["scale"]
        y = _ACT[int(op.attrs["act"])](y)
        if "gate" in o:
            y = y * o["gate"].to(y.dtype)
        if "residual" in o:
            r = o["residual"].to(y.dtype)
            y = torch.cat([r] * (y.shape[-2] // r.shape[-2]), -2) + y
        return {"out": y}

    def _gated_linear(self, op: Op, o: Mapping[str, Torch], w: list[Torch]) -> dict[str, Torch]:
        x = self._left(op, o)
        gate, up = self._product(x, w[0], None), self._product(x, w[1], None)
        return {"out": _ACT[int(op.attrs["act"])](gate) * up}

    def _qkv(self, op: Op, o: Mapping[str, Torch], w: list[Torch]) -> dict[str, Torch]:
        x = self._left(op, o)
        d = int(op.attrs["head_dim"])
        results = {}
        for name, weight in zip([n for n in ("q", "k", "v") if n in op.operands], w, strict=True):
            y = self._product(x, weight, o.get(f"{name}_bias"))
            if "rope" in o and name != "v":
                table = _rows(o["rope"], o["positions"]).to(self.full)
                cos, sin = table[..., None, : d // 2], table[..., None, d // 2 :]
                heads = y.reshape(*y.shape[:-1], -1, d).to(self.full)
                h1, h2 = heads[..., : d // 2], heads[..., d // 2 :]
                y = torch.cat([h1 * cos - h2 * sin, h2 * cos + h1 * sin], -1).reshape(y.shape).to(self.act)
            results[name] = y
        return results

    def _attention(self, op: Op, o: Mapping[str, Torch], w: list[Torch]) -> dict[str, Torch]:
        d, batch = int(op.attrs["head_dim"]), int(op.attrs["batch"])

        def heads(t: Torch) -> Torch:
            return t.reshape(*t.shape[:-2], batch, t.shape[-2] // batch, -1, d).transpose(-3, -2)

        q, k, v = heads(o["q"]), heads(o["k"]), heads(o["v"])
        group = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
        scores = (q.to(self.full) @ k.to(self.full).transpose(-1, -2)) * d**-0.5
        if "q_block" in o:
            seen = o["k_block"].transpose(-1, -2) <= o["q_block"]
            scores = scores.masked_fill(~seen[..., None, None, :, :], float("-inf"))
        p = torch.nan_to_num(scores.softmax(-1)).to(self.act)
        out = (p @ v).transpose(-3, -2)
        return {"out": out.reshape(*out.shape[:-4], *o["q"].shape[-2:])}

    def _space_to_depth(self, op: Op, o: Mapping[str, Torch], w: list[Torch]) -> dict[str, Torch]:
        f, height, width = (int(op.attrs[n]) for n in ("factor", "height", "width"))
        x = self._normed(op, o, o["x"])
        d = x.shape[-1]
        lead = x.shape[:-2]
        x = x.reshape(*lead, -1, height // f, f, width // f, f, d).transpose(-4, -3)
        return {"out": x.reshape(*lead, -1, f * f * d)}

    def _embed(self, op: Op, o: Mapping[str, Torch], w: list[Torch]) -> dict[str, Torch]:
        rows = _rows(o["table"], o["tokens"])
        return {"out": rows * torch.tensor(op.attrs["scale"], dtype=rows.dtype)}

    def _image_patches(self, op: Op, o: Mapping[str, Torch], w: list[Torch]) -> dict[str, Torch]:
        height, width, p = (int(op.attrs[n]) for n in ("height", "width", "patch"))
        frames, geometry = o["frames"], o["geometry"]
        if geometry.dim() > 2:
            raise EngineError("reference: geometry: expected one for the whole batch, (cameras, 8)")
        lead = frames.shape[:-2]
        pictures = []
        for pixels, row in zip(frames.unbind(-2), geometry.tolist(), strict=True):
            h, wide, stride, new_h, new_w, top, left, present = row
            picture = torch.full((*lead, 3, height, width), -1.0, dtype=self.full, device=self.device)
            if present:
                x = pixels[..., : h * stride].reshape(-1, h, stride)[..., : 3 * wide].reshape(-1, h, wide, 3)
                x = x.permute(0, 3, 1, 2).to(self.full) / 255
                if (new_h, new_w) != (h, wide):
                    x = F.interpolate(x, size=(new_h, new_w), mode="bilinear", align_corners=False)
                x = x.reshape(*lead, 3, new_h, new_w)
                picture[..., top : top + new_h, left : left + new_w] = x * 2 - 1
            pictures.append(picture)
        x = torch.stack(pictures, -4).reshape(*lead, -1, 3, height // p, p, width // p, p)
        x = x.movedim((-4, -2), (-5, -4))
        return {"out": x.reshape(*lead, -1, 3 * p * p)}

    def _euler(self, op: Op, o: Mapping[str, Torch], w: list[Torch]) -> dict[str, Torch]:
        h = self._normed(op, o, o["h"])
        v = F.linear(h.to(self.full), w[0].to(self.full), o["bias"].reshape(-1).to(self.full))
        error = (o["previous"] - (o["x"] - o["time"] * v)) * o["weight"]
        return {"x": o["x"] + op.attrs["dt"] * (v - o["gain"] * error)}
