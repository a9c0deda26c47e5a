"""Batches of demonstrations on the training device, with another wording and other light each time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vla_infer.errors import TrainingError
from vla_infer.models import smolvla
from vla_infer.normalize import make_normalizer
from vla_infer.policy_config import ACTION, STATE
from vla_infer.policy_files import EPS
from vla_infer.processors import Processors
from vla_infer.sim.tasks import COLOURS, KINDS, phrases

from .objective import PLACES, Batch
from .shards import Demonstrations, statistics

# Of the observations are asked for a random cube of the scene. Where that is not the one that was gone to, only its
# place is learnt: the arm's own pose then says nothing, and the words have to be understood.
_ASKED_OTHERWISE = 0.3
_STRANGE = 0.05  # of the tokens become another one, so that an unknown word does not decide what is done
_BRIGHTNESS, _CONTRAST, _TINT = 0.15, 0.15, 0.05
_PIXELS_NOISE = 3.0  # of 255, standard deviation
_STATE_NOISE = (
    0.05  # of a standard deviation: what the encoders of a real arm do, and against copying the state
)


class Batches:
    """All of the demonstrations in the device's memory. Pictures stay uint8: N x cameras x H x W x 3 bytes."""

    def __init__(
        self,
        demonstrations: Demonstrations,
        processors: Processors,
        sizes: smolvla.Sizes,
        *,
        device: str,
        seed: int,
    ) -> None:
        grid = tuple(side // sizes.scale_factor for side in sizes.vision.grid)
        rows = demonstrations.rows
        self.generator = torch.Generator(device).manual_seed(seed)
        self._device, self._vocabulary = device, sizes.vocabulary
        self._frames = _on_device(demonstrations.frames, device)
        stats = statistics(demonstrations)

        def normalised(values: npt.NDArray[np.float32], feature: str) -> Tensor:
            normalizer = make_normalizer(
                "MEAN_STD", feature, values.shape[-1], stats, eps=EPS, where="training"
            )
            return torch.from_numpy(normalizer.normalize(values)).to(device)

        self._state = normalised(rows["state"], STATE)
        self._actions = normalised(rows["actions"], ACTION)
        self._valid = torch.from_numpy(rows["valid"]).to(device)
        self._tokens_of_picture = places(rows["places"], grid).to(device)
        self._cubes = torch.from_numpy(rows["cubes"]).to(device)
        self._kind = torch.from_numpy(rows["kind"].astype(np.int64)).to(device)
        self._colour = torch.from_numpy(rows["colour"].astype(np.int64)).to(device)
        self._say(processors)

    def __len__(self) -> int:
        return len(self._state)

    def _say(self, processors: Processors) -> None:
        """Tables of token sequences: (kinds * colours, phrases, PLACES), their lengths, and how many each has."""
        spoken = [
            [processors.encode(np.zeros(processors.state_dim), text).tokens for text in phrases(kind, colour)]
            for kind in KINDS
            for colour in COLOURS
        ]
        most = max(len(said) for said in spoken)
        tokens = np.zeros((len(spoken), most, PLACES), np.int64)
        lengths = np.zeros((len(spoken), most), np.int64)
        for i, said in enumerate(spoken):
            for j, ids in enumerate(said):
                if len(ids) > PLACES:
                    raise TrainingError(f"an instruction has {len(ids)} tokens, expected at most {PLACES}")
                tokens[i, j, : len(ids)] = ids
                lengths[i, j] = len(ids)
        self._tokens = torch.from_numpy(tokens).to(self._device)
        self._lengths = torch.from_numpy(lengths).to(self._device)
        self._counts = torch.tensor([len(said) for said in spoken], device=self._device)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self._device)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self._device)

    def draw(self, size: int) -> Batch:
        """`size` observations, drawn with replacement."""
        chosen = (self._uniform(size) * len(self)).long()
        cubes, done = self._cubes[chosen], self._colour[chosen]
        there = ~cubes[..., 0].isnan()
        any_there = (self._uniform(*there.shape) * there).argmax(-1)
        asked = torch.where(self._uniform(size) < _ASKED_OTHERWISE, any_there, done)
        meaning = self._kind[chosen] * len(COLOURS) + asked
        wording = (self._uniform(size) * self._counts[meaning]).long()
        tokens, lengths = self._tokens[meaning, wording], self._lengths[meaning, wording]
        strange = self._uniform(size, PLACES) < _STRANGE
        other = (self._uniform(size, PLACES) * self._vocabulary).long()
        inside = torch.arange(PLACES, device=self._device) < lengths[:, None] - 1  # the line end stays
        state = self._state[chosen]
        return Batch(
            frames=self._in_another_light(self._frames[chosen]),
            state=state + _STATE_NOISE * self._normal(*state.shape),
            tokens=torch.where(strange & inside, other, tokens),
            lengths=lengths,
            actions=self._actions[chosen],
            valid=self._valid[chosen] & (asked == done)[:, None],
            goal=cubes[torch.arange(size, device=self._device), asked],
            token=self._tokens_of_picture[chosen, asked],
        )

    def _in_another_light(self, frames: Tensor) -> Tensor:
        """Brightness, contrast and tint of each picture, (B, cameras, H, W, 3), and noise on its pixels."""
        lead = frames.shape[:2]

        def around(spread: float, channels: int) -> Tensor:
            return spread * (2 * self._uniform(*lead, 1, 1, channels) - 1)

        x = frames.float()
        x = x * (1 + around(_TINT, 3)) * (1 + around(_CONTRAST, 1)) + 255 * _BRIGHTNESS * around(1.0, 1)
        x = x + _PIXELS_NOISE * self._normal(*x.shape)
        return x.round().clamp(0, 255).to(torch.uint8)


def places(at: npt.NDArray[np.float32], grid: tuple[int, ...]) -> Tensor:
    """Columns and rows (..., 2) in a picture, 0 to 1, as indices (...) of a grid of (rows, columns); -1 outside."""
    inside = np.all((at >= 0) & (at < 1), axis=-1, keepdims=True)
    cells = np.where(inside, at, 0.0) * (grid[1], grid[0])
    index = cells[..., 1].astype(np.int64) * grid[1] + cells[..., 0].astype(np.int64)
    return torch.from_numpy(np.where(inside[..., 0], index, -1))


def _on_device(shards: list[npt.NDArray[np.uint8]], device: str) -> Tensor:
    """One tensor of all shards, filled shard by shard, so that host memory holds one."""
    count = sum(len(shard) for shard in shards)
    result = torch.empty((count, *shards[0].shape[1:]), dtype=torch.uint8, device=device)
    start = 0
    for shard in shards:
        result[start : start + len(shard)] = torch.from_numpy(np.array(shard))
        start += len(shard)
    return result
