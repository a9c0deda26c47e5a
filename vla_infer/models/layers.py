"""What the model families share, written once on the tape: SigLIP, pre-norm decoder layers, a sequence's masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer: (prefix + suffix rows, kv_heads * head_dim)."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Sequence:
    """Prefix and suffix as one sequence: what each row's position and block are, and a cache for each layer.

    positions and blocks (rows, 1) i32, table (rows, head_dim): see `Rope` and `Tape.attention`.
    """

    positions: Tensor
    blocks: Tensor
    table: Tensor
    caches: tuple[Cache, ...]

    @property
    def rows(self) -> int:
        return self.blocks.rows

    def rope(self, rows: slice) -> Rope:
        return Rope(self.table, self.positions[rows])

    def mask(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
        return self.blocks[queries], self.blocks[keys]


def sequence(t: Tape, rows: int, d: Decoder, wavelength: float) -> Sequence:
    """Inputs positions and blocks (see `index_inputs`), and the caches that the layers of `d` fill."""
    kv = d.kv_heads * d.head_dim
    return Sequence(
        t.input("positions", (rows, 1), "i32"),
        t.input("blocks", (rows, 1), "i32"),
        t.constant("rope", rope_table(rows, d.head_dim, wavelength)),
        tuple(Cache(t.temp(f"k{i}", (rows, kv)), t.temp(f"v{i}", (rows, kv))) for i in range(d.layers)),
    )


# module of a norm -> (the norm, the gate of the residual that follows or None)
NormOf = Callable[[str], tuple[Norm, Tensor | None]]


@dataclass(frozen=True)
class Stack:
    """Records the layers `name` of a checkpoint, one at a time. `adapt` replaces the plain RMS norms."""

    t: Tape
    d: Decoder
    name: str
    adapt: NormOf | None = None

    def norm(self, module: str) -> tuple[Norm, Tensor | None]:
        name = f"{self.name}.{module}"
        if self.adapt:
            return self.adapt(name)
        return Norm(
            "rms", self.d.eps, self.t.param(f"{name}.weight", (1, self.d.width)), plus=self.d.norm_plus
        ), None

    def project(
        self, x: Tensor, layer: int, names: str, rope: Rope, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Those of q, k and v that are in `names`, of the normalised x."""
        d, at = self.d, f"layers.{layer}"
        heads = {"q": d.heads, "k": d.kv_heads, "v": d.kv_heads}
        w = {n: weight(f"{self.name}.{at}.self_attn.{n}_proj", heads[n] * d.head_dim, d.width) for n in names}
        norm, _ = self.norm(f"{at}.input_layernorm")
        return self.t.qkv(x, w, head_dim=d.head_dim, norm=norm, rope=rope, into=into)

    def attend(self, x: Tensor, layer: int, seq: Sequence, cache: Cache, start: int) -> Tensor:
        """Attention of x, the rows from `start` of the sequence, to all keys up to its own, which it writes."""
        rows, seen = slice(start, start + x.rows), slice(start + x.rows)
        q = self.project(x, layer, "qkv", seq.rope(rows), {"k": cache.k[rows], "v": cache.v[rows]})["q"]
        blocks = seq.mask(rows, seen)
        return self.t.attention(q, cache.k[seen], cache.v[seen], head_dim=self.d.head_dim, blocks=blocks)

    def after_attention(self, x: Tensor, a: Tensor, layer: int) -> Tensor:
        """x + gate * o_proj(a), then x + gate * mlp(norm(x))."""
        t, d, at = self.t, self.d, f"layers.{layer}"
        name = f"{self.name}.{at}"
        _, gate = self.norm(f"{at}.input_layernorm")
        x = t.linear(a, weight(f"{name}.self_attn.o_proj", d.width, a.cols), residual=x, gate=gate)
        norm, gate = self.norm(f"{at}.post_attention_layernorm")
        wide = [weight(f"{name}.mlp.{n}_proj", d.mlp, d.width) for n in ("gate", "up")]
        h = t.gated_linear(x, *wide, norm=norm, act=d.act)
        return t.linear(h, weight(f"{name}.mlp.down_proj", d.width, d.mlp), residual=x, gate=gate)

    def fill(self, x: Tensor, seq: Sequence, start: int = 0) -> None:
        """Keys and values of x, the rows from `start`, in every cache. What follows the last keys is not needed."""
        last = len(seq.caches) - 1
        for i, cache in enumerate(seq.caches[:last]):
            x = self.after_attention(x, self.attend(x, i, seq, cache, start), i)
        rows, cache = slice(start, start + x.rows), seq.caches[last]
        self.project(x, last, "kv", seq.rope(rows), {"k": cache.k[rows], "v": cache.v[rows]})


def index_inputs(
    seen: npt.NDArray[np.bool_], suffix: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.int32]]:
    """positions and blocks of a sequence: `seen` (prefix rows) says which are there, block 0; `suffix` holds the
    blocks of the rows after them. Positions count only what is seen."""
    valid = np.concatenate([seen, np.ones(suffix.size, bool)])
    blocks = np.concatenate([np.zeros(seen.size, np.int64), suffix])
    positions = np.maximum(np.cumsum(valid) - 1, 0)
    return {
        "positions": positions.astype(np.int32)[:, None],
        "blocks": np.where(valid, blocks, UNSEEN).astype(np.int32)[:, None],
    }


def prefix_seen(
    present: tuple[bool, ...], image_tokens: int, *, prompt: int, tokens: int
) -> npt.NDArray[np.bool_]:
    """Which rows of a prefix are there: the cameras that are present, `tokens` of `prompt` places."""
    return np.concatenate([np.repeat(np.array(present, bool), image_tokens), np.arange(prompt) < tokens])


def rope_table(positions: int, head_dim: int, wavelength: float) -> npt.NDArray[np.float32]:
    """(positions, head_dim) of [cos | sin] of position / wavelength^(2 i / head_dim). Su et al. 2021."""
    scale = wavelength ** (np.arange(head_dim // 2) * 2.0 / head_dim)
    angle = np.arange(positions)[:, None] / scale
    return np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
