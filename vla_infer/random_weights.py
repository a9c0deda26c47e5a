"""Random weights in the names and shapes of LeRobot's policies, at full size or at that of the golden policies.

Weights are well scaled, so that activations stay of order one through all layers: matrices have standard
deviation 1/sqrt(fan-in), biases 0.1, LayerNorm and Llama norms 1 ± 0.1, Gemma norms (whose scale is 1 + w)
0 ± 0.1, position embeddings 0.5, token embeddings 1. A tensor depends on the seed and its name alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vla_infer.safetensors_io import to_bfloat16_bits

#: Elements made at a time: bounds memory at about 100 MB, whatever the tensor.
_BLOCK = 4 << 20

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Vision:
    """A SigLIP encoder of square images."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    patch: int
    image: int

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class Decoder:
    """Decoder layers with grouped queries."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Sizes:
    """All sizes of one policy."""

    vision: Vision
    text: Decoder
    expert: Decoder
    vocabulary: int
    horizon: int
    #: SmolVLA: side of the square of patches that becomes one token.
    scale_factor: int = 1
    #: Width of the padded state and action.
    padded: int = 32


def full_sizes(family: str) -> Sizes:
    """SmolVLM2-500M with 16 of its layers and an expert of 0.75 times its width; PaliGemma 3B and Gemma 300M."""
    if family == "smolvla":
        text = Decoder(960, 16, 2560, 15, 5, 64)
        return Sizes(
            Vision(768, 12, 12, 3072, 16, 512), text, _smolvla_expert(text), 49280, 50, scale_factor=4
        )
    text = Decoder(2048, 18, 16384, 8, 1, 256)
    return Sizes(Vision(1152, 27, 16, 4304, 14, 224), text, Decoder(1024, 18, 4096, 8, 1, 256), 257152, 50)


def small_sizes(family: str) -> Sizes:
    """The sizes of the golden policies."""
    if family == "smolvla":
        text = Decoder(192, 4, 320, 3, 1, 64)
        return Sizes(Vision(128, 3, 2, 208, 16, 64), text, _smolvla_expert(text), 512, 10, scale_factor=2)
    text = Decoder(128, 4, 256, 4, 1, 64)
    return Sizes(Vision(144, 3, 2, 304, 14, 56), text, Decoder(96, 4, 160, 4, 1, 64), 512, 10)


def _smolvla_expert(text: Decoder) -> Decoder:
    """Three quarters of the width; MLP two thirds of four times that, rounded up to a multiple of 256."""
    width = text.width * 3 // 4
    mlp = -(-4 * (2 * width // 3) // 256) * 256
    return Decoder(width, text.depth, mlp, text.heads, text.kv_heads, text.head_dim)


def tensor_shapes(family: str, sizes: Sizes) -> Shapes:
    """Every tensor of a policy, sorted by name as LeRobot's files have them."""
    shapes = _smolvla(sizes) if family == "smolvla" else _pi(sizes, adaptive=family == "pi05")
    return dict(sorted(shapes.items()))


def _linear(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def _vision(name: str, v: Vision) -> Shapes:
    h = v.hidden
    shapes: Shapes = {
        f"{name}.embeddings.patch_embedding.weight": (h, 3, v.patch, v.patch),
        f"{name}.embeddings.patch_embedding.bias": (h,),
        f"{name}.embeddings.position_embedding.weight": (v.patches, h),
        f"{name}.post_layernorm.weight": (h,),
        f"{name}.post_layernorm.bias": (h,),
    }
    for i in range(v.layers):
        layer = f"{name}.encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{norm}.weight": (h,), f"{layer}.{norm}.bias": (h,)}
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{part}", h, h)
        shapes |= _linear(f"{layer}.mlp.fc1", v.mlp, h) | _linear(f"{layer}.mlp.fc2", h, v.mlp)
    return shapes


def _decoder(
    name: str, d: Decoder, *, cross_every: int = 0, cross_width: int = 0, adaptive: int = 0
) -> Shapes:
    """Layers and final norm. `cross_every`: but for each such layer, keys and values come from `cross_width`
    inputs. `adaptive`: norms are a product of a condition of that width, giving scale, shift and gate."""
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim

    def norm(norm_name: str) -> Shapes:
        if adaptive:
            return _linear(f"{norm_name}.dense", 3 * d.width, adaptive)
        return {f"{norm_name}.weight": (d.width,)}

    shapes = norm(f"{name}.norm")
    for i in range(d.depth):
        layer = f"{name}.layers.{i}"
        source = cross_width if cross_every and i % cross_every else d.width
        shapes |= norm(f"{layer}.input_layernorm") | norm(f"{layer}.post_attention_layernorm")
        shapes |= _linear(f"{layer}.self_attn.q_proj", queries, d.width, bias=False)
        shapes |= _linear(f"{layer}.self_attn.k_proj", keys, source, bias=False)
        shapes |= _linear(f"{layer}.self_attn.v_proj", keys, source, bias=False)
        shapes |= _linear(f"{layer}.self_attn.o_proj", d.width, queries, bias=False)
        for part in ("gate_proj", "up_proj"):
            shapes |= _linear(f"{layer}.mlp.{part}", d.mlp, d.width, bias=False)
        shapes |= _linear(f"{layer}.mlp.down_proj", d.width, d.mlp, bias=False)
    return shapes


def _action_head(width: int, sizes: Sizes) -> Shapes:
    return _linear("model.action_in_proj", width, sizes.padded) | _linear(
        "model.action_out_proj", sizes.padded, width
    )


def _time_mlp(width: int) -> Shapes:
    return _linear("model.action_time_mlp_in", width, 2 * width) | _linear(
        "model.action_time_mlp_out", width, width
    )


def _smolvla(sizes: Sizes) -> Shapes:
    root = "model.vlm_with_expert"
    text, expert = sizes.text, sizes.expert
    merged = sizes.vision.hidden * sizes.scale_factor**2
    return {
        **_vision(f"{root}.vlm.model.vision_model", sizes.vision),
        **_linear(f"{root}.vlm.model.connector.modality_projection.proj", text.width, merged, bias=False),
        f"{root}.vlm.model.text_model.embed_tokens.weight": (sizes.vocabulary, text.width),
        **_decoder(f"{root}.vlm.model.text_model", text),
        f"{root}.vlm.lm_head.weight": (sizes.vocabulary, text.width),
        **_decoder(f"{root}.lm_expert", expert, cross_every=2, cross_width=text.kv_heads * text.head_dim),
        **_linear("model.state_proj", text.width, sizes.padded),
        **_action_head(expert.width, sizes),
        **_time_mlp(expert.width),
    }


def _pi(sizes: Sizes, *, adaptive: bool) -> Shapes:
    root = "model.paligemma_with_expert"
    text, width = sizes.text, sizes.expert.width
    shapes = {
        **_vision(f"{root}.paligemma.model.vision_tower", sizes.vision),
        **_linear(f"{root}.paligemma.model.multi_modal_projector.linear", text.width, sizes.vision.hidden),
        f"{root}.paligemma.model.language_model.embed_tokens.weight": (sizes.vocabulary, text.width),
        **_decoder(f"{root}.paligemma.model.language_model", text),
        **_decoder(f"{root}.gemma_expert.model", sizes.expert, adaptive=width if adaptive else 0),
        **_action_head(width, sizes),
    }
    if adaptive:
        return (
            shapes | _linear("model.time_mlp_in", width, width) | _linear("model.time_mlp_out", width, width)
        )
    return shapes | _linear("model.state_proj", width, sizes.padded) | _time_mlp(width)


def scale_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(mean, standard deviation) of a tensor."""
    if len(shape) == 1:
        if name.endswith(".bias"):
            return 0.0, 0.1
        gemma = "gemma" in name and "vision_tower" not in name
        return (0.0 if gemma else 1.0), 0.1
    if "position_embedding" in name:
        return 0.0, 0.5
    if "embed_tokens" in name:
        return 0.0, 1.0
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


def random_blocks(name: str, shape: tuple[int, ...], seed: int) -> Iterator[npt.NDArray[np.uint16]]:
    """One tensor as bfloat16 bit patterns, in blocks of whole rows."""
    mean, std = scale_of(name, shape)
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    rows = max(1, _BLOCK // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        values = generator.standard_normal((min(rows, shape[0] - start), *shape[1:]), np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        yield to_bfloat16_bits(values)


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.uint16]:
    """One whole tensor as bfloat16 bit patterns, equal to the blocks put together."""
    tensor = np.empty(shape, np.uint16)
    row = 0
    for block in random_blocks(name, shape, seed):
        tensor[row : row + len(block)] = block
        row += len(block)
    return tensor


class PooledWeights:
    """Tensors cut from one pool of normal values at an offset that depends on the name: as random as a measurement
    needs, and made as fast as memory is copied. The pool's length is odd, so that rows do not repeat in step."""

    def __init__(self, *, seed: int = 0, length: int = (1 << 22) + 1) -> None:
        self._pool = np.random.default_rng(seed).standard_normal(length, np.float32)
        self._scaled: dict[tuple[float, float], npt.NDArray[np.uint16]] = {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint16]:
        """A tensor as bfloat16 bit patterns."""
        mean, std = scale_of(name, shape)
        if (mean, std) not in self._scaled:
            values = self._pool * np.float32(std) + np.float32(mean)
            self._scaled[mean, std] = to_bfloat16_bits(values)
        pool = self._scaled[mean, std]
        count = math.prod(shape)
        start = zlib.crc32(name.encode()) % len(pool)
        out = np.empty(count, np.uint16)
        done = 0
        while done < count:
            size = min(count - done, len(pool) - start)
            out[done : done + size] = pool[start : start + size]
            done, start = done + size, 0
        return out.reshape(shape)
