"""The flow-matching loss of SmolVLA, computed by the reference executor on the model's own tape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vla_infer.models import flow, smolvla
from vla_infer.reference import ReferenceExecutor
from vla_infer.tape import Tape

Parameters = Mapping[str, Tensor]

PLACES = 16  # prompt tokens of the training tape: the shortest bucket of `vla_infer.policy`
TIME_STEPS = 1000  # times are multiples of 1 / TIME_STEPS, so that the embeddings are one table
GOAL = "goal."  # parameters of the auxiliary loss, which are not saved
_GOAL_SCALE = 10.0  # positions count in decimetres, which makes them of order one
_POINTING = 0.3  # weight of the pointing loss beside the place's
_ALPHA = 1.5  # times are 0.001 + 0.999 Beta(_ALPHA, 1)


@dataclass(frozen=True)
class Batch:
    """B observations and what was done.

    frames uint8 (B, cameras, H, W, 3); state (B, state_dim) and actions (B, horizon, action_dim) normalised;
    tokens int (B, PLACES), 0 beyond `lengths` (B,); valid bool (B, horizon): rows within the episode;
    goal (B, 3): where the cube of the instruction lies, in metres; token int (B,): which image token of the first
    camera has its centre, -1 for none.
    """

    frames: Tensor
    state: Tensor
    tokens: Tensor
    lengths: Tensor
    actions: Tensor
    valid: Tensor
    goal: Tensor
    token: Tensor


@dataclass(frozen=True)
class Losses:
    """Means over a batch. flow: of the velocity's squared error; goal: of the place's, in dm²; pointing: cross entropy
    of the image token; total: what is minimised."""

    total: Tensor
    flow: Tensor
    goal: Tensor
    pointing: Tensor


class Objective:
    """Losses of a policy of these sizes with pictures of the size its encoder sees. device, precision: as for
    `ReferenceExecutor`; in bf16 the parameters stay what they are and products are in bfloat16.

    Only the columns of `action_in_proj`, and the rows of `action_out_proj`, that belong to real actions have a
    gradient; initialised at zero (see `initial_parameters`), the others make the policy blind to the padding.
    """

    def __init__(
        self, sizes: smolvla.Sizes, parameters: Parameters, *, device: str = "cpu", precision: str = "fp32"
    ) -> None:
        self.sizes, self.device = sizes, device
        height, width = sizes.vision.image
        self.tape = training_tape(sizes)
        self._executor = ReferenceExecutor(
            self.tape, lambda name: parameters[name].detach().cpu().numpy(), precision, device=device
        )
        present = (True,) * sizes.cameras
        index = [
            smolvla.index_inputs(sizes, prompt=PLACES, tokens=n, present=present) for n in range(PLACES + 1)
        ]
        self._index = {
            name: torch.from_numpy(np.stack([values[name] for values in index])).to(device)
            for name in index[0]
        }
        row = sizes.vision.geometry(height, width, 3 * width)
        self._fixed = {
            "geometry": torch.tensor([row] * sizes.cameras, dtype=torch.int32),
            "rtc_previous": torch.zeros(sizes.horizon, sizes.action_dim, device=device),
            "rtc_weight": torch.zeros(sizes.horizon, 1, device=device),
            "rtc_gain": torch.zeros(1, 1, device=device),
        }
        times = np.arange(TIME_STEPS + 1) / TIME_STEPS
        table = flow.time_embedding(times, sizes.expert.width, *sizes.periods)
        self._time_table = torch.from_numpy(table).to(device)

    def draw(self, batch: Batch, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise (draws, B, horizon, action_dim) and times (draws, B), whole numbers of 1 / TIME_STEPS.

        As SmolVLA: time = 0.001 + 0.999 Beta(1.5, 1), here rounded up to the table. Beta(a, 1) is u^(1 / a).
        """
        shape = (draws, *batch.actions.shape)
        noise = torch.randn(shape, generator=generator, device=self.device)
        u = torch.rand(shape[:2], generator=generator, device=self.device)
        times = 0.001 + 0.999 * u ** (1.0 / _ALPHA)
        return noise, (times * TIME_STEPS).ceil().clamp(1, TIME_STEPS).long()

    def velocity(self, parameters: Parameters, batch: Batch, actions: Tensor, times: Tensor) -> Tensor:
        """Velocity (draws, B, horizon, action_dim) at noisy actions of that shape and times (draws, B)."""
        return self._run(parameters, batch, actions, times)[0]

    def losses(
        self, parameters: Parameters, batch: Batch, noise: Tensor, times: Tensor, *, goal_weight: float
    ) -> Losses:
        """Squared error of the velocity against noise - actions at time * noise + (1 - time) * actions, over the
        rows that are within the episode (Lipman et al. 2023; the form is LeRobot's SmolVLA's)."""
        t = (times.float() / TIME_STEPS)[..., None, None]
        actions = batch.actions
        velocity, values = self._run(parameters, batch, t * noise + (1 - t) * actions, times)
        weight = batch.valid[..., None].float().expand_as(actions)
        error = (velocity - (noise - actions)).square() * weight
        flow_loss = error.sum() / (weight.sum() * len(noise)).clamp_min(1.0)
        goal, pointing = self._readout(parameters, batch, values.to(flow_loss.dtype))
        total = flow_loss + goal_weight * (goal + _POINTING * pointing)
        return Losses(total, flow_loss.detach(), goal.detach(), pointing.detach())

    def _readout(self, parameters: Parameters, batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the place, read at the state token, and of which image token it is: both from the last
        language layer's values (B, prefix, width), linearly and by a bilinear form of state and image."""
        p = {name: parameters[GOAL + name] for name in ("weight", "bias", "query", "key", "mark")}
        images, state = values[:, : self.sizes.image_tokens], values[:, -1]
        place = (state @ p["weight"].T + p["bias"] - _GOAL_SCALE * batch.goal).square().mean()
        match = ((state @ p["query"].T)[:, None] * (images @ p["key"].T)).sum(-1) / math.sqrt(state.shape[-1])
        match = match + images @ p["mark"]
        known = batch.token >= 0
        entropy = torch.nn.functional.cross_entropy(match, batch.token.clamp_min(0), reduction="none")
        return place, (entropy * known).sum() / known.sum().clamp_min(1)

    def _run(
        self, parameters: Parameters, batch: Batch, actions: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor]:
        s, wide = self.sizes, torch.nn.functional.pad
        executor = self._executor
        executor.bind(parameters.__getitem__)
        padded = wide(actions, (0, s.action_dim - actions.shape[-1]))
        inputs = {
            **self._fixed,
            **{name: table[batch.lengths] for name, table in self._index.items()},
            "frames": batch.frames.flatten(2),
            "tokens": batch.tokens[..., None],
            "state": wide(batch.state, (0, s.state_dim - batch.state.shape[-1]))[:, None],
            "actions": padded,
            "time_embedding": self._time_table[times][..., None, :],
        }
        outputs = executor.forward(inputs)
        velocity = (padded - outputs["actions"])[..., : actions.shape[-1]]
        return velocity, outputs["prefix_values"]


def training_tape(sizes: smolvla.Sizes) -> Tape:
    """The model with one Euler step at a time that is given, and its probes."""
    height, width = sizes.vision.image
    return smolvla.record(
        replace(sizes, steps=1), prompt=PLACES, frame_bytes=3 * height * width, probes=True, given_times=True
    )


def initial_parameters(
    shapes: Mapping[str, tuple[int, ...]], sizes: smolvla.Sizes, action_dim: int, seed: int
) -> dict[str, Tensor]:
    """Float32 parameters by name: those of `shapes` that the tape uses, and the auxiliary loss's own.

    Matrices are normal with 1 / sqrt(fan-in); those that add to a residual are smaller by the root of twice the
    layers (Radford et al. 2019). What the tape multiplies by sqrt(width) is divided by it. Position embeddings
    start as sines of the place in both directions.
    """
    tape = training_tape(sizes)
    used = {w.name for op in tape.ops for w in op.weights}
    used |= {b.name for b in tape.buffers if b.kind == "param"}
    generator = torch.Generator().manual_seed(seed)
    depth = {
        "vision_model": sizes.vision.layers,
        "text_model": sizes.text.layers,
        "expert": sizes.expert.layers,
    }
    result: dict[str, Tensor] = {}
    for name, shape in sorted(shapes.items()):
        if name not in used:
            continue
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        elif "position_embedding" in name:
            values = torch.from_numpy(_places(sizes.vision.grid, shape[1]))
        elif "embed_tokens" in name:
            values /= math.sqrt(sizes.text.width)
        else:
            values /= math.sqrt(math.prod(shape[1:]))
            if name.endswith(("o_proj.weight", "out_proj.weight", "fc2.weight", "down_proj.weight")):
                layers = next((n for part, n in depth.items() if part in name), 1)
                values /= math.sqrt(2 * layers)
            if "modality_projection" in name:
                values /= math.sqrt(sizes.text.width)
        result[name] = values
    result["model.action_in_proj.weight"][:, action_dim:] = 0
    result["model.action_out_proj.weight"][action_dim:] = 0
    result["model.state_proj.weight"][:, action_dim:] = 0
    values_width = sizes.text.kv_heads * sizes.text.head_dim
    result[GOAL + "weight"] = torch.zeros(3, values_width)
    result[GOAL + "bias"] = torch.zeros(3)
    for name in ("query", "key"):
        square = torch.randn(values_width, values_width, generator=generator)
        result[GOAL + name] = square / math.sqrt(values_width)
    result[GOAL + "mark"] = torch.zeros(values_width)
    return result


def rate_of(name: str, width: int) -> float:
    """How much slower than others a parameter learns: what the tape multiplies by sqrt(width) by as much."""
    return 1 / math.sqrt(width) if "embed_tokens" in name or "modality_projection" in name else 1.0


def _places(grid: tuple[int, int], width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """(patches, width): a quarter each sines and cosines of row and of column (Vaswani et al. 2017), with
    wavelengths from 6 to 600 patches."""
    y, x = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    rate = 100.0 ** (-np.arange(width // 4) / (width // 4))
    angles = [place.reshape(-1, 1) * rate for place in (y, x)]
    parts = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return np.concatenate(parts, 1).astype(np.float32)
