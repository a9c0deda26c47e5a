"""What the model families share, written once on the tape: SigLIP, pre-norm decoder layers, the flow's inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vla_infer.tape import Norm, Rope, Tape, Tensor, Weight

# A key in this block is seen by no query: padding, or the tokens of a camera that is missing.
UNSEEN = 2**30


@dataclass(frozen=True)
class Vision:
    """A SigLIP encoder: `image` is the (height, width) it sees, `grid` the patches of one picture. A picture of
    another shape is resized without distortion and padded: on both sides if `centred`, else top and left."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    patch: int
    image: tuple[int, int]
    eps: float
    centred: bool

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def geometry(self, height: int, width: int, stride: int) -> tuple[int, int, int, int, int, int, int, int]:
        """A row of `Tape.image_patches`' geometry for a picture (height, width, 3) of `stride` bytes a row."""
        ratio = max(width / self.image[1], height / self.image[0])
        rows, cols = max(1, int(height / ratio)), max(1, int(width / ratio))
        top, left = self.image[0] - rows, self.image[1] - cols
        if self.centred:
            top, left = top // 2, left // 2
        return height, width, stride, rows, cols, top, left, 1


@dataclass(frozen=True)
class Decoder:
    """A stack of Llama- or Gemma-like layers: RMS norm, grouped attention with rotary embedding, gated MLP."""

    width: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    act: str
    norm_plus: float


def weight(name: str, n: int, k: int) -> Weight:
    return Weight(f"{name}.weight", n, k)


def layer_norm(t: Tape, name: str, width: int, eps: float) -> Norm:
    return Norm("layer", eps, t.param(f"{name}.weight", (1, width)), t.param(f"{name}.bias", (1, width)))


def rms_norm(t: Tape, name: str, d: Decoder) -> Norm:
    return Norm("rms", d.eps, t.param(f"{name}.weight", (1, d.width)), plus=d.norm_plus)


def affine(t: Tape, x: Tensor, name: str, n: int, **options: object) -> Tensor:
    """A product with the weight and the bias of the checkpoint's module `name`."""
    bias = t.param(f"{name}.bias", (1, n))
    return t.linear(x, weight(name, n, x.cols), bias=bias, **options)  # type: ignore[arg-type]


def siglip(t: Tape, frames: Tensor, geometry: Tensor, name: str, v: Vision) -> Tensor:
    """Pictures to hidden states (cameras * patches, hidden), before the last norm. Zhai et al. 2023."""
    cameras = frames.rows
    patches = t.image_patches(frames, geometry, v.image, v.patch)
    positions = t.param(f"{name}.embeddings.position_embedding.weight", (v.patches, v.hidden), "act")
    x = affine(t, patches, f"{name}.embeddings.patch_embedding", v.hidden, residual=positions)
    for i in range(v.layers):
        at = f"{name}.encoder.layers.{i}"
        names = {n: f"{at}.self_attn.{n}_proj" for n in "qkv"}
        qkv = t.qkv(
            x,
            {n: weight(m, v.hidden, v.hidden) for n, m in names.items()},
            head_dim=v.hidden // v.heads,
            norm=layer_norm(t, f"{at}.layer_norm1", v.hidden, v.eps),
            biases={n: t.param(f"{m}.bias", (1, v.hidden)) for n, m in names.items()},
        )
        a = t.attention(qkv["q"], qkv["k"], qkv["v"], head_dim=v.hidden // v.heads, batch=cameras)
        x = affine(t, a, f"{at}.self_attn.out_proj", v.hidden, residual=x)
        norm = layer_norm(t, f"{at}.layer_norm2", v.hidden, v.eps)
        h = affine(t, x, f"{at}.mlp.fc1", v.mlp, norm=norm, act="gelu_tanh")
        x = affine(t, h, f"{at}.mlp.fc2", v.hidden, residual=x)
    return x


def projections(name: str, d: Decoder, names: str = "qkv") -> dict[str, Weight]:
    """The weights of a layer's query, key and value projections."""
    heads = {"q": d.heads, "k": d.kv_heads, "v": d.kv_heads}
    return {n: weight(f"{name}.self_attn.{n}_proj", heads[n] * d.head_dim, d.width) for n in names}


NormOf = Callable[[str], tuple[Norm, Tensor | None]]


def after_attention(
    t: Tape, x: Tensor, a: Tensor, name: str, d: Decoder, norm_of: NormOf | None = None
) -> Tensor:
    """x + gate * o_proj(a), then x + gate * mlp(norm(x)). `norm_of(module)` gives (norm, gate) where they adapt."""
    _, gate = norm_of(f"{name}.input_layernorm") if norm_of else (None, None)
    o = weight(f"{name}.self_attn.o_proj", d.width, d.heads * d.head_dim)
    x = t.linear(a, o, residual=x, gate=gate)
    after = f"{name}.post_attention_layernorm"
    norm, gate = norm_of(after) if norm_of else (rms_norm(t, after, d), None)
    gate_up = [weight(f"{name}.mlp.{n}_proj", d.mlp, d.width) for n in ("gate", "up")]
    h = t.gated_linear(x, *gate_up, norm=norm, act=d.act)
    return t.linear(h, weight(f"{name}.mlp.down_proj", d.width, d.mlp), residual=x, gate=gate)


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer: (prefix + suffix rows, kv_heads * head_dim)."""

    k: Tensor
    v: Tensor


def prefix_layers(
    t: Tape, x: Tensor, name: str, d: Decoder, caches: list[Cache], rope: Rope, blocks: tuple[Tensor, Tensor]
) -> None:
    """Fill the first rows of the caches from the prefix x. What follows the last layer's keys is not needed."""
    rows = x.rows
    for i, cache in enumerate(caches):
        at = f"{name}.layers.{i}"
        last = i == len(caches) - 1
        qkv = t.qkv(
            x,
            projections(at, d, "kv" if last else "qkv"),
            head_dim=d.head_dim,
            norm=rms_norm(t, f"{at}.input_layernorm", d),
            rope=rope,
            into={"k": cache.k[:rows], "v": cache.v[:rows]},
        )
        if not last:
            a = t.attention(qkv["q"], qkv["k"], qkv["v"], head_dim=d.head_dim, blocks=blocks)
            x = after_attention(t, x, a, at, d)


def rope_table(positions: int, head_dim: int, wavelength: float) -> npt.NDArray[np.float32]:
    """(positions, head_dim) of [cos | sin] of position / wavelength^(2 i / head_dim). Su et al. 2021."""
    scale = wavelength ** (np.arange(head_dim // 2) * 2.0 / head_dim)
    angle = np.arange(positions)[:, None] / scale
    return np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


def flow_times(steps: int) -> npt.NDArray[np.float64]:
    """Times of the Euler steps, (steps,): from 1 (noise) down to 1 / steps."""
    return 1.0 - np.arange(steps) / steps


def time_embedding(
    times: npt.NDArray[np.float64], width: int, min_period: float, max_period: float
) -> npt.NDArray[np.float32]:
    """(steps, width) of [sin | cos] at log-spaced periods. Vaswani et al. 2017; the periods are openpi's."""
    period = min_period * (max_period / min_period) ** np.linspace(0.0, 1.0, width // 2)
    angle = times.astype(np.float32)[:, None] * (2 * math.pi / period)
    return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


@dataclass(frozen=True)
class Flow:
    """The tensors of the denoising loop: actions (in and out), times, and the inputs of real-time chunking."""

    actions: Tensor
    time: Tensor
    guide: tuple[Tensor, Tensor, Tensor]
    steps: int


def flow_inputs(t: Tape, horizon: int, action_dim: int, steps: int) -> Flow:
    """Inputs: actions (horizon, action_dim), the noise on entry; rtc_previous, rtc_weight, rtc_gain."""
    actions = t.input("actions", (horizon, action_dim), "f32")
    guide = (
        t.input("rtc_previous", (horizon, action_dim), "f32"),
        t.input("rtc_weight", (horizon, 1), "f32"),
        t.input("rtc_gain", (steps, 1), "f32"),
    )
    time = t.constant("time", flow_times(steps).astype(np.float32)[:, None])
    t.output("actions", actions)
    return Flow(actions, time, guide, steps)
