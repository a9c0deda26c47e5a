"""π0.5 (Physical Intelligence 2025): the state is text in the prompt, the time adapts the action expert's norms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vla_infer.models import flow as F
from vla_infer.models import layers as L
from vla_infer.models import paligemma as P
from vla_infer.models.paligemma import Sizes, sizes
from vla_infer.tape import Loop, Norm, Tape, Tensor

__all__ = ["Sizes", "index_inputs", "record", "sizes"]


def record(s: Sizes, *, prompt: int, frame_bytes: int, probes: bool = False) -> Tape:
    """The forward pass for prompts of up to `prompt` tokens and pictures of up to `frame_bytes` bytes.

    Inputs: those of `paligemma.prefix` and `flow.flow_inputs`, positions and blocks (images + prompt + horizon,
    1), see `index_inputs`. Outputs: actions; with `probes` also image_tokens.
    """
    t = Tape()
    seq = L.sequence(t, s.cameras * s.image_tokens + prompt + s.horizon, s.text, P.WAVELENGTH)
    P.prefix(t, s, seq, prompt=prompt, frame_bytes=frame_bytes, probes=probes)
    adapt = adaptive_norms(t, s)
    P.denoise(t, s, seq, lambda x, _: L.affine(t, x, "model.action_in_proj", s.expert.width), adapt)
    return t


def adaptive_norms(t: Tape, s: Sizes) -> Callable[[Loop], L.NormOf]:
    """The expert's RMS norms: x / rms(x) * (1 + scale) + shift, and gate * the branch that follows.

    [scale | shift | gate] = dense(silu(mlp_out(silu(mlp_in(time))))) depends on the step alone: a table
    (steps, 3 * width) for each norm, computed at load.
    """
    width, eps = s.expert.width, s.expert.eps

    cond = F.time_table(t, s.steps, width, s.periods)
    for name in ("model.time_mlp_in", "model.time_mlp_out"):
        cond = L.affine(
            t, cond, name, width, act="silu", out=t.temp(f"{name}.table", (s.steps, width), "f32")
        )
    modules = [f"{P.EXPERT}.norm"]
    for i in range(s.expert.layers):
        at = f"{P.EXPERT}.layers.{i}"
        modules += [f"{at}.input_layernorm", f"{at}.post_attention_layernorm"]
    tables = {}
    for name in modules:
        out = t.temp(f"{name}.table", (s.steps, 3 * width), "f32")
        tables[name] = L.affine(t, cond, f"{name}.dense", 3 * width, out=out)

    def at_step(step: Loop) -> L.NormOf:
        def norm_of(name: str) -> tuple[Norm, Tensor]:
            scale, shift, gate = (tables[name].at(step).columns(i * width, (i + 1) * width) for i in range(3))
            return Norm("rms", eps, scale, shift, plus=1.0), gate

        return norm_of

    return at_step


def index_inputs(
    s: Sizes, *, prompt: int, tokens: int, present: tuple[bool, ...]
) -> dict[str, npt.NDArray[np.int32]]:
    """positions and blocks for `tokens` real tokens in a bucket of `prompt`, and the cameras that are there.

    Images and instruction see each other (block 0), the actions see all (1).
    """
    seen = L.prefix_seen(present, s.image_tokens, prompt=prompt, tokens=tokens)
    return L.index_inputs(seen, np.ones(s.horizon, np.int64))
