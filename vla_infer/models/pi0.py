"""π0 (Black et al. 2024): the state is a token of the action expert, the time goes through an MLP with each action."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vla_infer.models import flow as F
from vla_infer.models import layers as L
from vla_infer.models import paligemma as P
from vla_infer.models.paligemma import Sizes, sizes
from vla_infer.tape import Loop, Tape, Tensor

__all__ = ["Sizes", "index_inputs", "record", "sizes"]


def record(s: Sizes, *, prompt: int, frame_bytes: int, probes: bool = False) -> Tape:
    """The forward pass for prompts of up to `prompt` tokens and pictures of up to `frame_bytes` bytes.

    Inputs: those of `paligemma.prefix` and `flow.flow_inputs`, state (1, state_dim), positions and blocks
    (images + prompt + 1 + horizon, 1), see `index_inputs`. Outputs: actions; with `probes` also image_tokens.
    """
    t = Tape()
    prefix = s.cameras * s.image_tokens + prompt
    seq = L.sequence(t, prefix + 1 + s.horizon, s.text, P.WAVELENGTH)
    P.prefix(t, s, seq, prompt=prompt, frame_bytes=frame_bytes, probes=probes)
    # The state sees no action and no time, so its row is the same at every step. It goes through the loop all the same:
    # a row more costs nothing there, its layers alone would cost two steps.
    state = t.input("state", (1, s.state_dim), "f32")
    suffix = t.temp("suffix", (1 + s.horizon, s.expert.width))
    L.affine(t, state, "model.state_proj", s.expert.width, out=suffix[:1])
    times = F.time_table(t, s.steps, s.expert.width, s.periods)
    mlp = F.ActionTimeMlp(t, times, s.expert.width)

    def embed(actions: Tensor, loop: Loop) -> Tensor:
        mlp(actions, loop, out=suffix[1:])
        return suffix

    P.denoise(t, s, seq, embed)
    return t


def index_inputs(
    s: Sizes, *, prompt: int, tokens: int, present: tuple[bool, ...]
) -> dict[str, npt.NDArray[np.int32]]:
    """positions and blocks for `tokens` real tokens in a bucket of `prompt`, and the cameras that are there.

    Images and instruction see each other (block 0), the state sees them too (1), the actions see all (2).
    """
    seen = L.prefix_seen(present, s.image_tokens, prompt=prompt, tokens=tokens)
    return L.index_inputs(seen, np.array([1] + [2] * s.horizon))
