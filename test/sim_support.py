"""What the tests of the simulation share: whether it can run here, and one world for a whole module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


def need_simulation() -> None:
    """Skip what needs MuJoCo, the arm's model and something to draw with, naming what is missing."""
    from vla_infer.errors import UnsupportedError
    from vla_infer.sim.model import model_file
    from vla_infer.sim.rendering import load_mujoco

    try:
        model_file()
        load_mujoco()
    except UnsupportedError as error:
        pytest.skip(f"needs the simulation: {error}")


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    need_simulation()
    from vla_infer.sim.world import World

    made = World(image_size=(96, 96))
    yield made
    made.close()


def play(world: Any, task: Any, *, seed: int = 0, limit: float = 9.0) -> list[Any]:
    """Let the expert do `task` from where the world is. Returns what it commanded, (steps, 6)."""
    from vla_infer.sim.expert import RATE, Expert

    expert = Expert(world, task, np.random.default_rng(seed))
    commands = [world.commanded]
    end = world.time + limit
    while not expert.done and world.time < end:
        commands.append(expert.act())
        world.command(commands[-1])
        world.advance(1 / RATE)
    return commands
