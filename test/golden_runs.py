"""The runs whose results the golden policies hold, as inputs of a tape, and the noise that they started from.

`golden/pi05` was computed with noise that it does not hold: its `noise` and `rtc_noise` are not what the model
was given (`actions` and `actions_b` start from different noise, and neither from those). An Euler step is a
contraction for a step this small, so the noise is found back from `actions`; that this is right shows in
`velocity_step0`, which is not used for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from golden import Golden

from vla_infer.checkpoint import Checkpoint, read_checkpoint
from vla_infer.models import FAMILIES
from vla_infer.reference import ReferenceExecutor
from vla_infer.rtc import Rtc, tape_inputs
from vla_infer.tape import Tape

Array = npt.NDArray[Any]

torch.set_num_threads(1)  # tensors this small only wait for more threads


@dataclass(frozen=True)
class Run:
    """One golden result: `name` of it, which cameras are there, the schedule of real-time chunking or None."""

    name: str
    noise: str = "noise"
    present: tuple[bool, ...] = (True, True)
    mask: str = "lang_mask"
    schedule: str | None = None


RUNS = {
    "plain": Run("actions"),
    "b": Run("actions_b", present=(True, False), mask="lang_mask_b"),
    "rtc_off": Run("rtc_actions_off", "rtc_noise"),
    "rtc_linear": Run("rtc_actions_linear", "rtc_noise", schedule="LINEAR"),
    "rtc_exp": Run("rtc_actions_exp", "rtc_noise", schedule="EXP"),
}


class GoldenModel:
    """A golden policy and the tapes of its family."""

    def __init__(self, family: str) -> None:
        self.golden = Golden(family)
        self.ckpt: Checkpoint = read_checkpoint(self.golden.path)
        self.model = FAMILIES[family]
        self.sizes = self.model.sizes(self.ckpt)

    def tape(self, *, prompt: int, steps: int | None = None, cameras: int = 2, probes: bool = False) -> Tape:
        s = replace(self.model.sizes(self.ckpt, steps=steps), cameras=cameras)
        frame_bytes = int(np.prod(self.golden["frames"].shape[1:]))
        return self.model.record(s, prompt=prompt, frame_bytes=frame_bytes, probes=probes)

    def rtc(self, run: Run) -> Rtc | None:
        if run.schedule is None:
            return None
        previous = self.golden["rtc_prev_chunk_left_over"][0]
        return Rtc(previous, schedule=run.schedule, normalized=True, **self.golden.meta["rtc"])

    def inputs(self, tape: Tape, run: Run, noise: Array | None = None) -> dict[str, Array]:
        """All inputs of a tape; its prompt places and cameras may be more or fewer than the golden ones."""
        g, prompt = self.golden, tape.inputs["tokens"].rows
        cameras = tape.inputs["frames"].rows
        steps = tape.steps
        frames = g["frames"][:cameras]
        height, width = frames.shape[1:3]
        geometry = np.array([self.sizes.vision.geometry(height, width, 3 * width)] * cameras, np.int32)
        geometry[:, 7] = run.present[:cameras]
        tokens = g["lang_tokens"][0][g[run.mask][0]]
        padded = np.zeros((prompt, 1), np.int32)
        padded[: len(tokens), 0] = tokens
        shape = tape.inputs["rtc_previous"]
        rtc = self.rtc(run)
        guide = (
            {
                "rtc_previous": np.zeros((shape.rows, shape.cols), np.float32),
                "rtc_weight": np.zeros((shape.rows, 1), np.float32),
                "rtc_gain": np.zeros((steps, 1), np.float32),
            }
            if rtc is None
            else tape_inputs(rtc, rtc.previous, horizon=shape.rows, width=shape.cols, steps=steps)
        )
        s = replace(self.sizes, cameras=cameras)
        index = self.model.index_inputs(s, prompt=prompt, tokens=len(tokens), present=run.present[:cameras])
        values = {
            "frames": frames.reshape(cameras, -1),
            "geometry": geometry,
            "tokens": padded,
            "state": g["state"],
            "actions": g[run.noise][0] if noise is None else noise,
            **guide,
            **index,
        }
        return {name: values[name] for name in tape.inputs}

    def prompt(self, run: Run) -> int:
        return int(self.golden[run.mask].sum())

    @cached_property
    def found_noise(self) -> Array:
        """The noise that leads to `actions`, (horizon, width): every Euler step undone by fixed-point iteration."""
        run = RUNS["plain"]
        tape = self.tape(prompt=self.prompt(run))
        executor = ReferenceExecutor(tape, self.ckpt.read, "fp64")
        executor.run(self.inputs(tape, run))
        place = tape.inputs["actions"].buffer.id
        body = [op for op in tape.ops if op.loop]

        def after_step(x: torch.Tensor, step: int) -> torch.Tensor:
            executor.memory[place] = x
            for op in body:
                executor._run(op, step)
            return executor.memory[place]

        with torch.no_grad():
            x = torch.from_numpy(self.golden["actions"][0]).double()
            for step in reversed(range(tape.steps)):
                target = x
                for _ in range(100):
                    error = target - after_step(x, step)
                    x = x + error
                    if float(error.abs().max()) < 1e-9:
                        break
                else:
                    raise AssertionError(f"step {step} is no contraction")
        return x.numpy().astype(np.float32)

    def noise(self, run: Run) -> Array:
        """What the golden run started from."""
        return self.found_noise if self.ckpt.family == "pi05" else self.golden[run.noise][0]


@lru_cache
def golden_model(family: str) -> GoldenModel:
    return GoldenModel(family)
