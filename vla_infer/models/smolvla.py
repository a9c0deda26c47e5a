"""SmolVLA (Shukor et al. 2025): SigLIP and the first layers of SmolLM2 make a prefix of images, instruction and
state; an action expert denoises a chunk, attending to itself and to the prefix in turn with looking at it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.checkpoint import Checkpoint
from vla_infer.errors import CheckpointError
from vla_infer.models import flow as F
from vla_infer.models import layers as L
from vla_infer.tape import Rope, Tape, Tensor

ROOT = "model.vlm_with_expert"
VLM = f"{ROOT}.vlm.model"
EXPERT = f"{ROOT}.lm_expert"
WAVELENGTH = 10_000.0  # of the rotary embedding, whatever the language model's own

# What tensor shapes do not tell: the head sizes of the SmolVLM2 variants.
HEAD_DIM = 64


@dataclass(frozen=True)
class Sizes:
    """Everything the tape is made from. `expert_every`: a language layer in so many has an expert layer."""

    vision: L.Vision
    text: L.Decoder
    expert: L.Decoder
    scale_factor: int
    vocabulary: int
    expert_every: int
    self_every: int
    cameras: int
    state_dim: int
    action_dim: int
    horizon: int
    steps: int
    periods: tuple[float, float]

    @property
    def image_tokens(self) -> int:
        return self.vision.patches // self.scale_factor**2


def sizes(ckpt: Checkpoint, *, steps: int | None = None) -> Sizes:
    """Sizes from the tensors' shapes, the configuration, and `vla_infer.json` where it is present."""
    config = ckpt.config
    given: Mapping[str, Any] = ckpt.architecture or {}
    text, vision = given.get("text", {}), given.get("vision", {})
    hidden, _, patch, _ = ckpt.shape_of(f"{VLM}.vision_model.embeddings.patch_embedding.weight")
    positions = ckpt.shape_of(f"{VLM}.vision_model.embeddings.position_embedding.weight")[0]
    resize = config.get("resize_imgs_with_padding") or (int(positions**0.5) * patch,) * 2
    image = (int(resize[1]), int(resize[0]))  # the configuration has (width, height)
    v = L.Vision(
        hidden=hidden,
        layers=ckpt.count(f"{VLM}.vision_model.encoder.layers"),
        heads=vision.get("num_attention_heads", hidden // HEAD_DIM),
        mlp=ckpt.shape_of(f"{VLM}.vision_model.encoder.layers.0.mlp.fc1.weight")[0],
        patch=patch,
        image=image,
        eps=vision.get("layer_norm_eps", 1e-6),
        centred=False,
    )
    if v.patches != positions or v.grid[0] != v.grid[1]:
        raise CheckpointError(
            f"{ckpt.path}/config.json: resize_imgs_with_padding {image[1]}x{image[0]} gives {v.patches} patches, "
            f"the checkpoint has positions for {positions}: use the size it was trained with"
        )
    head_dim = text.get("head_dim", HEAD_DIM)

    def decoder(name: str, count: int) -> L.Decoder:
        mlp, width = ckpt.shape_of(f"{name}.layers.0.mlp.gate_proj.weight")
        heads = ckpt.shape_of(f"{name}.layers.0.self_attn.q_proj.weight")[0] // head_dim
        kv_heads = ckpt.shape_of(f"{name}.layers.0.self_attn.k_proj.weight")[0] // head_dim
        eps = text.get("rms_norm_eps", 1e-5)
        return L.Decoder(width, count, mlp, heads, kv_heads, head_dim, eps, "silu", 0.0)

    vlm_layers = ckpt.count(f"{VLM}.text_model.layers")
    wanted = int(config.get("num_vlm_layers", 16))
    vlm_layers = min(vlm_layers, wanted) if wanted > 0 else vlm_layers
    expert_layers = ckpt.count(f"{EXPERT}.layers")
    if vlm_layers % expert_layers:
        raise CheckpointError(f"{ckpt.path}: {expert_layers} expert layers do not divide {vlm_layers} layers")
    cross = "cross" in str(config.get("attention_mode", "cross_attn"))
    merged = ckpt.shape_of(f"{VLM}.connector.modality_projection.proj.weight")[1]
    return Sizes(
        vision=v,
        text=decoder(f"{VLM}.text_model", vlm_layers),
        expert=decoder(EXPERT, expert_layers),
        scale_factor=round((merged / hidden) ** 0.5),
        vocabulary=ckpt.shape_of(f"{VLM}.text_model.embed_tokens.weight")[0],
        expert_every=vlm_layers // expert_layers,
        self_every=int(config.get("self_attn_every_n_layers", 2)) if cross else 1,
        cameras=len(ckpt.cameras),
        state_dim=int(config.get("max_state_dim", 32)),
        action_dim=int(config.get("max_action_dim", 32)),
        horizon=ckpt.horizon,
        steps=steps or int(config.get("num_steps", 10)),
        periods=(float(config.get("min_period", 4e-3)), float(config.get("max_period", 4.0))),
    )


def record(
    s: Sizes, *, prompt: int, frame_bytes: int, probes: bool = False, given_times: bool = False
) -> Tape:
    """The forward pass for prompts of up to `prompt` tokens and pictures of up to `frame_bytes` bytes.

    Inputs beside those of `flow.flow_inputs`: frames, geometry (see `Tape.image_patches`), tokens (prompt, 1),
    state (1, state_dim), positions (prefix + horizon, 1) and blocks (the same), see `index_inputs`; with
    `given_times` also time_embedding (steps, expert width): with one step, actions - (the output) is then the
    velocity at any time, which is what training needs.
    Outputs: actions; with `probes` also vision_out (as `Tape.space_to_depth` leaves it), image_tokens, and
    prefix_values, the last language layer's values (images | instruction | state, kv_heads * head_dim).
    """
    t = Tape()
    frames = t.input("frames", (s.cameras, frame_bytes), "u8")
    geometry = t.input("geometry", (s.cameras, 8), "i32")
    tokens = t.input("tokens", (prompt, 1), "i32")
    state = t.input("state", (1, s.state_dim), "f32")
    flow = F.flow_inputs(t, s.horizon, s.action_dim, s.steps)
    images = s.cameras * s.image_tokens
    rows = images + prompt + 1
    seq = L.sequence(t, rows + s.horizon, s.text, WAVELENGTH)

    # prefix: images | instruction | state
    prefix = t.temp("prefix", (rows, s.text.width))
    t.stage = "vision"
    x = L.siglip(t, frames, geometry, f"{VLM}.vision_model", s.vision)
    norm = L.layer_norm(t, f"{VLM}.vision_model.post_layernorm", s.vision.hidden, s.vision.eps)
    merged = t.space_to_depth(x, s.scale_factor, grid=s.vision.grid, norm=norm)
    connector = L.weight(f"{VLM}.connector.modality_projection.proj", s.text.width, merged.cols)
    t.linear(merged, connector, scale=s.text.width**0.5, out=prefix[:images])
    embedding = t.param(f"{VLM}.text_model.embed_tokens.weight", (s.vocabulary, s.text.width), "act")
    t.embed(tokens, embedding, scale=s.text.width**0.5, out=prefix[images : rows - 1])
    L.affine(t, state, "model.state_proj", s.text.width, out=prefix[rows - 1 :])
    if probes:
        t.output("vision_out", merged)
        t.output("image_tokens", prefix[:images])
    t.stage = "prefix"
    L.Stack(t, s.text, f"{VLM}.text_model").fill(prefix, seq)
    if probes:
        t.output("prefix_values", seq.caches[-1].v[:rows])

    t.stage = "head"
    # what the cross-attending layers see of the prefix does not change while denoising
    e, kv = s.expert, s.text.kv_heads * s.text.head_dim
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for i in range(0, s.text.layers, s.expert_every):
        if i % s.self_every:
            at = f"{EXPERT}.layers.{i // s.expert_every}.self_attn"
            k = t.linear(seq.caches[i].k[:rows], L.weight(f"{at}.k_proj", kv, kv))
            seen[i] = (k, t.linear(seq.caches[i].v[:rows], L.weight(f"{at}.v_proj", kv, kv)))

    times = F.time_table(t, s.steps, e.width, s.periods, given=given_times)
    of_action = F.ActionTimeMlp(t, times, e.width)
    own = t.constant("own_positions", np.arange(s.horizon, dtype=np.int32)[:, None], "i32")
    cross = Rope(seq.table, own)
    expert = L.Stack(t, e, EXPERT)

    with t.loop(s.steps) as step:
        x = of_action(flow.actions, step)
        for i in range(0, s.text.layers, s.expert_every):
            layer = i // s.expert_every
            if i in seen:
                query = expert.project(x, layer, "q", cross)["q"]
                blocks = seq.mask(slice(rows, None), slice(rows))
                a = t.attention(query, *seen[i], head_dim=e.head_dim, blocks=blocks)
            else:
                a = expert.attend(x, layer, seq, seq.caches[i], rows)
            x = expert.after_attention(x, a, layer)
        F.step(t, x, expert.norm("norm")[0], flow, step)
    return t


def index_inputs(
    s: Sizes, *, prompt: int, tokens: int, present: tuple[bool, ...]
) -> dict[str, npt.NDArray[np.int32]]:
    """positions and blocks for `tokens` real tokens in a bucket of `prompt`, and the cameras that are there.

    Images and instruction see each other (block 0), the state sees them too (1), action i sees the actions up to
    itself (2 + i).
    """
    seen = L.prefix_seen(present, s.image_tokens, prompt=prompt, tokens=tokens)
    return L.index_inputs(seen, 1 + np.arange(1 + s.horizon))
