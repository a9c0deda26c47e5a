"""What is measured: a policy's tape at given sizes, and random inputs for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vla_infer.checkpoint import Checkpoint
from vla_infer.inputs import Arrays, TapeObservation, empty_inputs, fill_inputs
from vla_infer.models import FAMILIES
from vla_infer.random_weights import PooledWeights
from vla_infer.tape import Tape

IMAGE = (480, 640)  # of the cameras, height and width

ReadWeight = Callable[[str], npt.NDArray[np.generic]]


@dataclasses.dataclass(frozen=True)
class Setup:
    """None takes what the checkpoint says; `threads` is of the engine and of every peer."""

    device: str
    precision: str
    prompt: int
    cameras: int | None = None
    horizon: int | None = None
    steps: int | None = None
    threads: int | None = None


def make_tape(ckpt: Checkpoint, setup: Setup) -> tuple[Tape, Callable[[np.random.Generator], Arrays]]:
    """The tape of the setup, and a function that draws a set of random inputs for it. Turning pictures into patches
    is a stage of its own in it, "preprocess"."""
    model = FAMILIES[ckpt.family]
    sizes = model.sizes(ckpt, steps=setup.steps)
    changes = {"cameras": setup.cameras, "horizon": setup.horizon}
    sizes = dataclasses.replace(sizes, **{k: v for k, v in changes.items() if v is not None})
    tape: Tape = model.record(sizes, prompt=setup.prompt, frame_bytes=IMAGE[0] * IMAGE[1] * 3)
    tape.ops = [
        dataclasses.replace(op, stage="preprocess") if op.kind == "image_patches" else op for op in tape.ops
    ]

    def draw(random: np.random.Generator) -> Arrays:
        inputs = empty_inputs(tape)
        noise = tape.inputs["actions"]
        observation = TapeObservation(
            images=[random.integers(0, 256, (*IMAGE, 3), np.uint8) for _ in range(sizes.cameras)],
            state=random.standard_normal(sizes.state_dim, np.float32),
            tokens=random.integers(0, sizes.vocabulary, setup.prompt, np.int32),
            noise=random.standard_normal((noise.rows, noise.cols), np.float32),
        )
        fill_inputs(inputs, model, sizes, observation)
        return inputs

    return tape, draw


def pooled_reader(ckpt: Checkpoint) -> ReadWeight:
    """Random weights of a checkpoint's shapes, made in seconds at any size."""
    pool = PooledWeights()
    return lambda name: pool.tensor(name, ckpt.shape_of(name))
