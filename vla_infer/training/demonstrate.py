"""Demonstrations by the scripted expert, made in several processes.

Now and then a short burst of random motion pushes the arm off its way, so that the policy sees what to do there.
What the burst itself does is not imitated: chunks are valid up to it, and start again after it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.contract import Contract, load_contract
from vla_infer.sim.expert import RATE, Expert
from vla_infer.sim.model import CAMERAS
from vla_infer.sim.tasks import COLOURS, KINDS
from vla_infer.sim.world import World

from .shards import Recipe, prepare, rows_path, write_shard

FloatArray = npt.NDArray[np.float64]

EPISODES = 25  # of a shard
CONTRACT = "so101"
_BURST = (0.1, 0.3)  # s
_BURST_SPEED = 0.8  # rad/s, standard deviation of each joint's


@dataclass(frozen=True)
class Progress:
    """episodes that were tried and those that succeeded, observations written, shards done of those asked for."""

    episodes: int = 0
    successes: int = 0
    observations: int = 0
    done: int = 0
    shards: int = 0


class _Disturbance:
    """Bursts of motion with a velocity of their own, at random times."""

    def __init__(self, rng: np.random.Generator, bursts: float) -> None:
        self._rng, self._bursts = rng, bursts
        self._left = 0
        self._velocity = np.zeros(6)

    def velocity(self) -> FloatArray | None:
        """rad/s (6,) while a burst lasts, else None. To be called once each policy step."""
        if self._left == 0 and self._rng.random() < self._bursts / RATE:
            self._left = int(self._rng.uniform(*_BURST) * RATE) + 1
            self._velocity = self._rng.normal(0.0, _BURST_SPEED, 6)
        if self._left == 0:
            return None
        self._left -= 1
        return self._velocity


def record_episode(
    world: World, contract: Contract, recipe: Recipe, seed: int
) -> tuple[list[npt.NDArray[np.uint8]], dict[str, npt.NDArray[Any]]] | None:
    """One demonstration: pictures (cameras, H, W, 3) and rows of `shards`; None where the expert did not succeed."""
    task = world.reset(seed, split="train", kinds=recipe.kinds)
    rng = np.random.default_rng([recipe.seed, seed])
    expert, disturbance = Expert(world, task, rng), _Disturbance(rng, recipe.bursts)
    targets: list[FloatArray] = []
    disturbed: list[bool] = []
    seen: list[tuple[int, FloatArray, FloatArray, FloatArray]] = []  # step, joints, cubes, places
    pictures = []
    offset = int(rng.integers(recipe.stride))
    while not expert.done:
        target, push = expert.act(), disturbance.velocity()
        if push is None and len(targets) % recipe.stride == offset:
            images = world.images()
            pictures.append(np.stack([images[camera] for camera in recipe.cameras]))
            cubes = _cubes(world)
            places = in_picture(world, CAMERAS[recipe.cameras[0]], cubes)
            seen.append((len(targets), world.joints()[0], cubes, places))
        targets.append(target)
        disturbed.append(push is not None)
        world.command(target if push is None else world.commanded + push / RATE)
        world.advance(1.0 / RATE)
    if not seen or not world.succeeded(task):
        return None
    source, sink = contract.states[0], contract.commands[0]
    actions = sink.units.to_policy(np.array(targets)).astype(np.float32)
    steps = np.array([step for step, *_ in seen])
    ahead = steps[:, None] + np.arange(recipe.horizon)
    inside = ahead < len(targets)
    ahead = np.minimum(ahead, len(targets) - 1)
    undisturbed = np.logical_and.accumulate(~np.array(disturbed)[ahead], axis=1)
    count = len(seen)
    return pictures, {
        "state": source.units.to_policy(np.array([joints for _, joints, *_ in seen])).astype(np.float32),
        "actions": actions[ahead],
        "valid": inside & undisturbed,
        "cubes": np.array([cubes for *_, cubes, _ in seen], np.float32),
        "places": np.array([places for *_, places in seen], np.float32),
        "kind": np.full(count, KINDS.index(task.kind), np.int8),
        "colour": np.full(count, COLOURS.index(task.colour), np.int8),
        "episode": np.full(count, seed, np.int64),
    }


def _cubes(world: World) -> FloatArray:
    """Where each cube is (colours, 3) in m, NaN where the scene has none of that colour."""
    there = world.scene.cubes if world.scene else {}
    return np.array([world.cube(colour) if colour in there else np.full(3, np.nan) for colour in COLOURS])


def in_picture(world: World, camera: str, points: FloatArray) -> FloatArray:
    """Column and row (n, 2) of points (n, 3) in a camera's square picture, 0 to 1 from the upper left corner."""
    number = world.model.camera(camera).id
    seen = (points - world.data.cam_xpos[number]) @ world.data.cam_xmat[number].reshape(3, 3)
    focal = 0.5 / np.tan(np.deg2rad(world.model.cam_fovy[number]) / 2)
    places: FloatArray = 0.5 + focal * seen[:, :2] * (1.0, -1.0) / -seen[:, 2:]  # a camera looks along its -z
    return places


def _make_shard(folder: Path, recipe: Recipe, shard: int) -> Progress:
    """Runs in a process of its own pool; the world is made once for each process."""
    world = _world(recipe)
    contract = load_contract(CONTRACT)
    first = recipe.seed + shard * EPISODES
    made = [record_episode(world, contract, recipe, seed) for seed in range(first, first + EPISODES)]
    good = [episode for episode in made if episode is not None]
    if not good:
        return Progress(episodes=EPISODES, done=1)
    frames = np.stack([picture for pictures, _ in good for picture in pictures])
    rows = {name: np.concatenate([part[name] for _, part in good]) for name in good[0][1]}
    write_shard(folder, shard, frames, rows)
    return Progress(EPISODES, len(good), len(frames), 1)


_worlds: dict[tuple[int, tuple[str, ...]], World] = {}


def _world(recipe: Recipe) -> World:
    key = (recipe.image, recipe.cameras)
    if key not in _worlds:
        _worlds[key] = World(image_size=(recipe.image, recipe.image), cameras=recipe.cameras)
    return _worlds[key]


def make_demonstrations(
    folder: Path,
    recipe: Recipe,
    *,
    episodes: int,
    workers: int,
    share: tuple[int, int] = (0, 1),
    seconds: float = float("inf"),
    report: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Write shards of at least `episodes` scenes to `folder`; those that are there already are kept.

    share: (i, n): only the i-th of every n shards; other calls, at the same time, make the others.
    seconds: start no more shards after so long, so that a call that ends early is resumed by the next.
    """
    prepare(folder, recipe)
    mine = range(share[0], -(-episodes // EPISODES), share[1])
    shards = len(mine)
    waiting = [shard for shard in mine if not rows_path(folder, shard).exists()]
    total = Progress(done=shards - len(waiting), shards=shards)
    until = time.monotonic() + seconds
    # A fresh interpreter for each: OpenGL contexts and threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(workers, len(waiting))), mp_context=context) as pool:
        running: set[Future[Progress]] = set()
        while (waiting and time.monotonic() < until) or running:
            while waiting and len(running) < workers and time.monotonic() < until:
                running.add(pool.submit(_make_shard, folder, recipe, waiting.pop(0)))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for one in (future.result() for future in finished):
                total = Progress(
                    total.episodes + one.episodes,
                    total.successes + one.successes,
                    total.observations + one.observations,
                    total.done + one.done,
                    shards,
                )
                report(total)
    return total


def default_workers() -> int:
    """One process a processor that this one may use."""
    return len(os.sched_getaffinity(0))
