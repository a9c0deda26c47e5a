"""What is measured: a policy's tape at given sizes, and random inputs for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.checkpoint import Checkpoint
from vla_infer.engine import Engine
from vla_infer.engine import Program as EngineProgram
from vla_infer.errors import VlaInferError
from vla_infer.inputs import Arrays, TapeObservation, empty_inputs, fill_inputs
from vla_infer.models import FAMILIES
from vla_infer.random_weights import PooledWeights
from vla_infer.reference_engine import ReferenceProgram
from vla_infer.tape import Tape

IMAGE = (480, 640)  # of the cameras, height and width

ReadWeight = Callable[[str], npt.NDArray[np.generic]]
Actions = npt.NDArray[np.float32]
Program = EngineProgram | ReferenceProgram


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured: calls of ours alone, pairs of calls with each peer, seconds for torch.compile; samples:
    sets of inputs for the error of fp8; calibrate: whether its scales are made here, from random inputs; keep: then,
    parts of names, the products that stay in bfloat16."""

    runs: int
    warmup: int
    baselines: list[str]
    pairs: int
    compile_limit: float
    samples: int = 1
    calibrate: bool = False
    keep: tuple[str, ...] = ()


def _sizes(ckpt: Checkpoint, setup: Setup) -> Any:
    """The model's sizes, with the setup's instead of the checkpoint's."""
    changes = {"cameras": setup.cameras, "horizon": setup.horizon}
    sizes = FAMILIES[ckpt.family].sizes(ckpt, steps=setup.steps)
    return dataclasses.replace(sizes, **{k: v for k, v in changes.items() if v is not None})


def policy_tape(ckpt: Checkpoint, setup: Setup) -> Tape:
    """The tape of the setup as a policy records it, whose hash is in its calibration file."""
    model, sizes = FAMILIES[ckpt.family], _sizes(ckpt, setup)
    tape: Tape = model.record(sizes, prompt=setup.prompt, frame_bytes=IMAGE[0] * IMAGE[1] * 3)
    return tape


def make_tape(ckpt: Checkpoint, setup: Setup) -> tuple[Tape, Callable[[np.random.Generator], Arrays]]:
    """The tape of the setup, and a function that draws a set of random inputs for it. Turning pictures into patches
    is a stage of its own in it, "preprocess"."""
    model, sizes, tape = FAMILIES[ckpt.family], _sizes(ckpt, setup), policy_tape(ckpt, setup)
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


def infer(program: Program, inputs: Arrays) -> Actions:
    """Actions (horizon, action_dim) of a set of inputs, from host arrays. Raises VlaInferError where they are not
    finite."""
    program.stage("frames", list(inputs["frames"]))
    for name, values in inputs.items():
        if name != "frames":
            program.inputs[name][...] = values
    program.run()
    actions = program.result("actions")
    if not np.isfinite(actions).all():
        raise VlaInferError("bench: actions that are not finite")
    return actions


def in_host_memory(engine: Engine, inputs: Arrays) -> Arrays:
    """A set of inputs whose pictures are where the device reads them by itself (`Policy.picture_memory`)."""
    frames = engine.host_memory(inputs["frames"].shape)
    frames[...] = inputs["frames"]
    return {**inputs, "frames": frames}


def pooled_reader(ckpt: Checkpoint) -> ReadWeight:
    """Random weights of a checkpoint's shapes, made in seconds at any size."""
    pool = PooledWeights()
    return lambda name: pool.tensor(name, ckpt.shape_of(name))
