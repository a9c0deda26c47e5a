"""What π0 and π0.5 share: SigLIP and Gemma make a prefix of images and instruction; a smaller Gemma, the action
expert, denoises a chunk while attending to it (Black et al. 2024; Physical Intelligence 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vla_infer.checkpoint import Checkpoint
from vla_infer.errors import CheckpointError
from vla_infer.models import flow as F
from vla_infer.models import layers as L
from vla_infer.tape import Loop, Tape, Tensor

ROOT = "model.paligemma_with_expert"
VISION = f"{ROOT}.paligemma.model.vision_tower"
PROJECTOR = f"{ROOT}.paligemma.model.multi_modal_projector.linear"
TEXT = f"{ROOT}.paligemma.model.language_model"
EXPERT = f"{ROOT}.gemma_expert.model"
WAVELENGTH = 10_000.0  # of the rotary embedding

# What tensor shapes do not tell: the head sizes of Gemma 2B and 300M, and of SigLIP So400m.
HEAD_DIM = 256
VISION_HEAD_DIM = 72


@dataclass(frozen=True)
class Sizes:
    """Everything the tape is made from."""

    vision: L.Vision
    text: L.Decoder
    expert: L.Decoder
    vocabulary: int
    cameras: int
    state_dim: int
    action_dim: int
    horizon: int
    steps: int
    periods: tuple[float, float]

    @property
    def image_tokens(self) -> int:
        return self.vision.patches


def sizes(ckpt: Checkpoint, *, steps: int | None = None) -> Sizes:
    """Sizes from the tensors' shapes, the configuration, and `vla_infer.json` where it is present."""
    config = ckpt.config
    given: Mapping[str, Any] = ckpt.architecture or {}
    vision: Mapping[str, Any] = given.get("vision", {})
    hidden, _, patch, _ = ckpt.shape_of(f"{VISION}.embeddings.patch_embedding.weight")
    positions = ckpt.shape_of(f"{VISION}.embeddings.position_embedding.weight")[0]
    height, width = config["image_resolution"]
    v = L.Vision(
        hidden=hidden,
        layers=ckpt.count(f"{VISION}.encoder.layers"),
        heads=vision.get("num_attention_heads", hidden // VISION_HEAD_DIM),
        mlp=ckpt.shape_of(f"{VISION}.encoder.layers.0.mlp.fc1.weight")[0],
        patch=patch,
        image=(height, width),
        eps=vision.get("layer_norm_eps", 1e-6),
        centred=True,
    )
    if v.patches != positions or height % patch or width % patch:
        raise CheckpointError(
            f"{ckpt.path}/config.json: image_resolution {height}x{width} gives {v.patches} patches of {patch}, the "
            f"checkpoint has positions for {positions}: use the resolution it was trained with"
        )

    def decoder(part: str, name: str) -> L.Decoder:
        own: Mapping[str, Any] = given.get(part, {})
        mlp, width = ckpt.shape_of(f"{name}.layers.0.mlp.gate_proj.weight")
        head_dim = own.get("head_dim", HEAD_DIM)
        heads, kv_heads = (
            ckpt.shape_of(f"{name}.layers.0.self_attn.{n}_proj.weight")[0] // head_dim for n in "qk"
        )
        eps = own.get("rms_norm_eps", 1e-6)
        return L.Decoder(
            width, ckpt.count(f"{name}.layers"), mlp, heads, kv_heads, head_dim, eps, "gelu_tanh", 1.0
        )

    text, expert = decoder("text", TEXT), decoder("expert", EXPERT)
    for what in ("layers", "kv_heads", "head_dim"):
        ours, theirs = getattr(expert, what), getattr(text, what)
        if ours != theirs:
            raise CheckpointError(
                f"{ckpt.path}: the action expert has {what} {ours}, Gemma {theirs}: expected equal"
            )
    return Sizes(
        vision=v,
        text=text,
        expert=expert,
        vocabulary=ckpt.shape_of(f"{TEXT}.embed_tokens.weight")[0],
        cameras=len(ckpt.cameras),
        state_dim=int(config["max_state_dim"]),
        action_dim=int(config["max_action_dim"]),
        horizon=ckpt.horizon,
        steps=steps or int(config["num_inference_steps"]),
        periods=(float(config["min_period"]), float(config["max_period"])),
    )


def prefix(t: Tape, s: Sizes, seq: L.Sequence, *, prompt: int, frame_bytes: int, probes: bool) -> None:
    """Record images | instruction: the keys and values of the sequence's first rows.

    Inputs: frames, geometry (see `Tape.image_patches`), tokens (prompt, 1). Output, with `probes`: image_tokens.
    """
    frames = t.input("frames", (s.cameras, frame_bytes), "u8")
    geometry = t.input("geometry", (s.cameras, 8), "i32")
    tokens = t.input("tokens", (prompt, 1), "i32")
    images = s.cameras * s.image_tokens
    rows = t.temp("prefix", (images + prompt, s.text.width))
    t.stage = "vision"
    x = L.siglip(t, frames, geometry, VISION, s.vision)
    norm = L.layer_norm(t, f"{VISION}.post_layernorm", s.vision.hidden, s.vision.eps)
    L.affine(t, x, PROJECTOR, s.text.width, norm=norm, out=rows[:images])
    embedding = t.param(f"{TEXT}.embed_tokens.weight", (s.vocabulary, s.text.width), "act")
    t.embed(tokens, embedding, scale=s.text.width**0.5, out=rows[images:])
    if probes:
        t.output("image_tokens", rows[:images])
    t.stage = "prefix"
    L.Stack(t, s.text, TEXT).fill(rows, seq)
    t.stage = "head"


def denoise(
    t: Tape,
    s: Sizes,
    seq: L.Sequence,
    embed: Callable[[Tensor, Loop], Tensor],
    adapt: Callable[[Loop], L.NormOf] | None = None,
) -> None:
    """The loop over the last rows of the sequence. `embed` makes hidden states of them from the actions, which are the
    last of them; `adapt` makes norms."""
    flow = F.flow_inputs(t, s.horizon, s.action_dim, s.steps)
    with t.loop(s.steps) as step:
        expert = L.Stack(t, s.expert, EXPERT, adapt(step) if adapt else None)
        x = embed(flow.actions, step)
        for i, cache in enumerate(seq.caches):
            x = expert.after_attention(x, expert.attend(x, i, seq, cache, seq.rows - x.rows), i)
        F.step(t, x[x.rows - s.horizon :], expert.norm("norm")[0], flow, step)
