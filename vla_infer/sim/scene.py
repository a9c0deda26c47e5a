"""What differs from one episode to the next, drawn from its seed: cubes, start pose, light, colours, cameras, words."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vla_infer.sim.tasks import COLOURS, KINDS, SPLITS, Task, phrases

FloatArray = npt.NDArray[np.float64]

# Where the arm reaches with the gripper pointing down and can push to either side. Base frame, metres.
REACH_X, REACH_Y = (0.165, 0.285), (-0.13, 0.13)
ROW, LANE = (
    0.06,
    0.17,
)  # m: two cubes are this far apart in x, or else in y, so that each can be pushed past the others
HOME = np.array([0.0, -0.65, 0.40, 1.45, 0.0, 0.0])  # rad: tips 0.1 m above the table, pointing down
_TRIES = 1000


@dataclass(frozen=True)
class Scene:
    """One episode's beginning. Positions in metres in the base frame, angles in radians."""

    task: Task
    cubes: dict[
        str, tuple[float, float, float]
    ]  # colour -> x, y, yaw; a colour that is not in it is not on the table
    start: FloatArray  # (6,) joint positions
    tint: FloatArray  # (colours + 2, 3) factors on the colour of each cube, of the table and of the arm
    light: FloatArray  # (4,) lamp x, y, z (m) and brightness
    camera: FloatArray  # (cameras, 6) shift (m) and turn (rad) of each


def make_scene(seed: int, split: str, kinds: Sequence[str] = KINDS, cameras: int = 2) -> Scene:
    """The scene of a seed: the same numbers for the same arguments, on every machine.

    Where the cubes lie does not depend on the task, so that nothing but the instruction says which is meant.

    Raises:
        ValueError: an unknown split or kind, no kind, or a negative seed.
    """
    if split not in SPLITS or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"split '{split}', kinds {list(kinds)}: expected of {SPLITS} and of {KINDS}")
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    count = int(rng.integers(2, 4))
    colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))[:count]]
    places = _places(rng, count)
    cubes = {
        colour: (float(x), float(y), float(rng.uniform(-0.35, 0.35)))
        for colour, (x, y) in zip(colours, places, strict=True)
    }
    start = HOME + rng.uniform(-1, 1, 6) * np.array([0.5, 0.15, 0.15, 0.15, 0.1, 0.15])
    tint = rng.uniform(0.8, 1.15, (len(COLOURS) + 2, 1)) * rng.uniform(0.92, 1.08, (len(COLOURS) + 2, 3))
    light = np.array([0.2, 0.0, 1.3, 0.6]) + rng.uniform(-1, 1, 4) * np.array([0.5, 0.5, 0.3, 0.15])
    camera = rng.uniform(-1, 1, (cameras, 6)) * np.array([0.006, 0.006, 0.006, 0.015, 0.015, 0.015])
    kind = str(rng.choice(list(kinds)))
    goal = str(rng.choice(colours))
    words = phrases(kind, goal, split)
    return Scene(Task(kind, goal, words[int(rng.integers(len(words)))]), cubes, start, tint, light, camera)


def _places(rng: np.random.Generator, count: int) -> FloatArray:
    """Centres (count, 2) on the table that leave each cube a lane to be pushed along."""
    low, high = np.transpose([REACH_X, REACH_Y])
    for _ in range(_TRIES):
        places = rng.uniform(low, high, (count, 2))
        apart = np.abs(places[:, None] - places[None])
        clear = (apart[..., 0] >= ROW) | (apart[..., 1] >= LANE) | np.eye(count, dtype=bool)
        if clear.all():
            return places
    raise RuntimeError(f"no room for {count} cubes: ROW and LANE do not fit REACH_X and REACH_Y")
