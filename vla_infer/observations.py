"""Observations to calibrate on: out of a recording, out of a LeRobot dataset, or made up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from vla_infer.checkpoint import Checkpoint
from vla_infer.contract import Contract
from vla_infer.errors import ReplayError
from vla_infer.processors import Processors

Image = npt.NDArray[np.uint8]
_Item = TypeVar("_Item")

# What made-up observations are told to do: prompts of a few lengths.
INSTRUCTIONS = (
    "touch the red cube",
    "pick up the blue cube and put it on the plate",
    "push the green block to the left",
    "open the drawer, put the purple cube in, then close it",
)


@dataclass(frozen=True, eq=False)
class Observation:
    """images: uint8 (H, W, 3) RGB by the policy's camera features; state: (state_dim,) in robot units; task: the
    instruction."""

    images: Mapping[str, Image]
    state: npt.NDArray[np.floating]
    task: str


class Spread(Generic[_Item]):
    """Keeps some of what it is given, evenly spaced, without knowing how much will come: at most twice as many."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[_Item] = []
        self._stride, self._given = 1, 0

    def add(self, item: _Item) -> None:
        if self._given % self._stride == 0:
            self._kept.append(item)
        self._given += 1
        if len(self._kept) == 2 * self._count:
            self._kept = self._kept[::2]
            self._stride *= 2

    def take(self) -> list[_Item]:
        """As many as were asked for, or all where there are fewer."""
        last = len(self._kept) - 1
        chosen = np.linspace(0, last, min(self._count, last + 1)).round().astype(int)
        return [self._kept[i] for i in chosen]


# -------------------------------------------------------------------------------------------------------- recordings
class _Collector:
    """Stands in a replay where a policy would, and keeps what it is shown."""

    info: Any = None

    def __init__(self, action_dim: int, spread: Spread[Observation]) -> None:
        self._actions = np.zeros((1, action_dim), np.float32)
        self._spread = spread
        self.preprocess = self.engine = self.postprocess = 0.0
        self.timing = self

    def seed(self, value: int) -> None:
        """There is no noise."""

    def predict(
        self, images: Mapping[str, Image], state: npt.NDArray[np.float32], task: str, *, rtc: Any = None
    ) -> npt.NDArray[np.float32]:
        self._spread.add(Observation(dict(images), state, task))
        return self._actions

    def close(self) -> None:
        """Nothing is held."""


def of_bag(path: Path, contract: Contract, count: int, *, instruction: str = "") -> list[Observation]:
    """Up to `count` observations of a rosbag2 recording, spread evenly over it, as the node would have made them.

    instruction: until the recording gives one. Raises ReplayError where none could be made.
    """
    from vla_infer.replay.bag import Bag
    from vla_infer.replay.direct import DirectOptions, replay_direct
    from vla_infer.replay.observe import map_topics

    bag, spread = Bag(path), Spread[Observation](count)
    options = DirectOptions(every_frame=True, instruction=instruction)
    replay_direct(
        _Collector(contract.action_dim, spread), contract, bag, map_topics(bag, contract, {}), options
    )
    return spread.take()


def of_dataset(
    root: Path, cameras: Mapping[str, str], count: int, *, instruction: str = ""
) -> list[Observation]:
    """Up to `count` observations of a LeRobot dataset, spread evenly over as many of its episodes as that allows.

    cameras: the policy's camera by the dataset's feature; others of the dataset are left out. instruction: of
    episodes without a task. Raises ReplayError for a dataset that cannot be read, or does not fit.
    """
    from vla_infer.replay.lerobot import Dataset, Step

    dataset = Dataset(root)
    known = {feature: cameras[feature] for feature in dataset.cameras if feature in cameras}
    if not known:
        raise ReplayError(
            f"{root}: cameras: expected one of {', '.join(cameras)}, got {', '.join(dataset.cameras)}"
        )
    episodes = np.unique(
        np.linspace(0, dataset.episodes - 1, min(count, dataset.episodes)).round().astype(int)
    )
    found = Spread[Observation](count)
    for episode in episodes:
        task, steps = dataset.steps(int(episode))
        if not (task or instruction):
            raise ReplayError(f"{root}: episode {episode} has no task; give one with --instruction")
        some = Spread[Step](math.ceil(count / len(episodes)))
        for step in steps:
            some.add(step)
        for step in some.take():
            images = {ours: step.images[feature] for feature, ours in known.items()}
            found.add(Observation(images, step.state, task or instruction))
    return found.take()


# ----------------------------------------------------------------------------------------------------------- made up
def random_observations(
    ckpt: Checkpoint, processors: Processors, count: int, *, instruction: str = "", seed: int = 0
) -> list[Observation]:
    """Observations that no robot made: pictures of the size the policy was trained with (`random_picture`), states
    evenly within what its statistics call usual, a few instructions. They exercise every product, but only real ones
    show a trained policy's outliers."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        images = {name: random_picture(random, *ckpt.camera_sizes[name]) for name in ckpt.cameras}
        state = processors.denormalize_state(random.uniform(-1, 1, ckpt.state_dim).astype(np.float32))
        made.append(Observation(images, state, instruction or INSTRUCTIONS[i % len(INSTRUCTIONS)]))
    return made


def random_picture(random: np.random.Generator, height: int, width: int) -> Image:
    """Light that changes slowly, surfaces with edges, and a sensor's grain: uint8 (height, width, 3)."""
    grid = random.uniform(0, 255, (4, 5, 3))
    rows, cols = np.linspace(0, 3, height), np.linspace(0, 4, width)
    top, left = np.minimum(rows.astype(int), 2), np.minimum(cols.astype(int), 3)
    down, right = (rows - top)[:, None, None], (cols - left)[None, :, None]
    above = grid[top][:, left] * (1 - right) + grid[top][:, left + 1] * right
    below = grid[top + 1][:, left] * (1 - right) + grid[top + 1][:, left + 1] * right
    picture = above * (1 - down) + below * down
    for _ in range(random.integers(3, 10)):
        y, x = random.integers(0, height), random.integers(0, width)
        h, w = random.integers(1, height // 2 + 2), random.integers(1, width // 2 + 2)
        picture[y : y + h, x : x + w] = random.uniform(0, 255, 3)
    picture += random.normal(0, random.uniform(0, 12), picture.shape)
    return np.asarray(np.clip(picture.round(), 0, 255), np.uint8)
