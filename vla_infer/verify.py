"""`vla-infer verify`: does the engine compute what the model's own code computed, stage by stage?

Compares with a `golden.safetensors` beside the policy (or given): observations, and what the training framework made
of them in float32. Each line is a stage, so that the first one that is off says where to look.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.calibrate import layer_report, table
from vla_infer.checkpoint import Checkpoint, read_checkpoint
from vla_infer.engine import PRECISIONS
from vla_infer.errors import CheckpointError, EngineError
from vla_infer.fp8 import MAX_ERROR, Errors, Scales, policy_scales
from vla_infer.inputs import TapeObservation, empty_inputs, fill_inputs
from vla_infer.models import FAMILIES
from vla_infer.policy import weight_reader
from vla_infer.processors import build_processors
from vla_infer.reference_engine import make_engine
from vla_infer.rtc import Rtc, tape_inputs
from vla_infer.safetensors_io import open_safetensors, read_tensor
from vla_infer.tape import Tape

Array = npt.NDArray[Any]
Run = Callable[[Tape, dict[str, Array]], dict[str, Array]]

LIMIT_FP32 = 1e-4
LIMIT_BF16 = 0.02  # never more, whatever PyTorch's error is; alone where PyTorch is not installed
OVER_TORCH = 1.5


@dataclass(frozen=True)
class Line:
    """One stage: relative L2 error, what is allowed, and whether it is within."""

    stage: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def relative(got: Array, want: Array) -> float:
    """Relative L2 error; infinite where shapes differ or anything is not finite."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got.astype(np.float64) - want) / max(np.linalg.norm(want), 1e-30))


class Verification:
    """A policy and its expected values. `run` executes a tape on inputs and gives its outputs."""

    def __init__(self, ckpt: Checkpoint, golden: Path) -> None:
        self.ckpt = ckpt
        self.model = FAMILIES[ckpt.family]
        self.sizes = self.model.sizes(ckpt)
        self.processors = build_processors(ckpt)
        file = open_safetensors(golden)
        self.golden = {name: read_tensor(info) for name, info in file.tensors.items()}
        self.meta = json.loads(golden.with_suffix(".json").read_text())
        missing = {"frames", "raw_state", "noise", "actions"} - set(self.golden)
        if missing or "task" not in self.meta:
            raise CheckpointError(
                f"{golden}: expected frames, raw_state, noise, actions, and a task: no {missing}"
            )

    def tape(self, *, probes: bool = False, steps: int | None = None) -> Tape:
        s = self.sizes if steps is None else replace(self.sizes, steps=steps)
        frame_bytes = int(np.prod(self.golden["frames"].shape[1:]))
        tape: Tape = self.model.record(
            s, prompt=self.processors.max_tokens, frame_bytes=frame_bytes, probes=probes
        )
        return tape

    def inputs(
        self, tape: Tape, *, noise: str = "noise", masked: str = "", rtc: Rtc | None = None
    ) -> dict[str, Array]:
        """Inputs of a golden run; `masked` is the ending of the names of its masks ("_b")."""
        g, s = self.golden, self.sizes
        encoded = self.processors.encode(g["raw_state"], self.meta["task"])
        tokens, images = encoded.tokens, list(g["frames"])
        if masked:
            images = [i if b else None for i, b in zip(images, g[f"image_mask{masked}"].ravel(), strict=True)]
            tokens = tokens[: int(g[f"lang_mask{masked}"].sum())]
        guide: Mapping[str, npt.NDArray[np.float32]] = {}
        if rtc is not None:
            shape = tape.inputs["rtc_previous"]
            guide = tape_inputs(rtc, rtc.previous, horizon=shape.rows, width=shape.cols, steps=tape.steps)
        values = empty_inputs(tape)
        seen = TapeObservation(images, encoded.state, tokens, g[noise][0], guide)
        fill_inputs(values, self.model, s, seen)
        return values

    def stages(self, run: Run) -> Iterator[tuple[str, float]]:
        """(stage, relative error) of everything that the golden file has."""
        g = self.golden
        encoded = self.processors.encode(g["raw_state"], self.meta["task"])
        yield "state", relative(encoded.state, g["state"][0, : len(encoded.state)])
        tokens = g["lang_tokens"][0][g["lang_mask"][0]]
        yield "tokens", relative(encoded.tokens.astype(np.float64), tokens.astype(np.float64))
        tape = self.tape(probes=True)
        outputs = run(tape, self.inputs(tape))
        if "image_tokens" in g:
            want = g["image_tokens"][0]  # of the first camera, before SmolVLA scales them by sqrt(width)
            scale = want.shape[1] ** 0.5 if self.ckpt.family == "smolvla" else 1.0
            yield "image tokens", relative(outputs["image_tokens"][: len(want)] / scale, want)
        if "velocity_step0" in g:
            # one Euler step over the whole time: actions = noise - velocity
            once = self.tape(steps=1)
            actions = run(once, self.inputs(once))["actions"]
            yield "first velocity", relative(g["noise"][0] - actions, g["velocity_step0"][0])
        yield "actions", relative(outputs["actions"], g["actions"][0])
        if "robot_actions" in g:
            robot = self.processors.decode(outputs["actions"], g["raw_state"])
            yield "robot actions", relative(robot, g["robot_actions"][0])
        plain = self.tape()
        if "actions_b" in g:
            actions = run(plain, self.inputs(plain, masked="_b"))["actions"]
            yield "masked camera", relative(actions, g["actions_b"][0])
        for name in sorted(n for n in g if n.startswith("rtc_actions_")):
            schedule = name.removeprefix("rtc_actions_").upper()
            rtc = None
            if schedule != "OFF":
                previous = g["rtc_prev_chunk_left_over"][0]
                rtc = Rtc(previous, schedule=schedule, normalized=True, **self.meta["rtc"])
            actions = run(plain, self.inputs(plain, noise="rtc_noise", rtc=rtc))["actions"]
            yield f"chunking {schedule.lower()}", relative(actions, g[name][0])


def engine_run(ckpt: Checkpoint, *, device: str, precision: str, scales: Scales | None = None) -> Run:
    """Runs a tape on a device; scales: of precision "fp8"."""

    def run(tape: Tape, inputs: dict[str, Array]) -> dict[str, Array]:
        engine = make_engine([tape], weight_reader(ckpt), device=device, precision=precision, scales=scales)
        program = engine.programs[0]
        for name, values in inputs.items():
            program.inputs[name][...] = values
        program.run()
        return {name: program.result(name) for name in tape.outputs}

    return run


def torch_run(ckpt: Checkpoint, *, precision: str) -> Run | None:
    """The reference executor, or None where PyTorch is not installed."""
    try:
        from vla_infer.reference import ReferenceExecutor
    except ImportError:
        return None

    def run(tape: Tape, inputs: dict[str, Array]) -> dict[str, Array]:
        return ReferenceExecutor(tape, weight_reader(ckpt), precision).run(inputs)

    return run


def verify(
    ckpt: Checkpoint, golden: Path, *, device: str, precision: str, scales: Scales | None = None
) -> list[Line]:
    """Errors by stage. Limits: 1e-4 in float32; in bfloat16 1.5 times the error of PyTorch in bfloat16 on the same
    tape where PyTorch is installed, and never above 0.02; in int8 and fp8 what leaves a cosine of 0.995.
    scales: of precision "fp8"."""
    verification = Verification(ckpt, golden)
    errors = list(verification.stages(engine_run(ckpt, device=device, precision=precision, scales=scales)))
    most = {"fp32": LIMIT_FP32, "bf16": LIMIT_BF16, "int8": MAX_ERROR, "fp8": MAX_ERROR}[precision]
    limits = dict.fromkeys((stage for stage, _ in errors), most)
    peer = torch_run(ckpt, precision=precision) if precision == "bf16" else None
    if peer is not None:
        limits = {s: min(OVER_TORCH * error, LIMIT_BF16) for s, error in verification.stages(peer)}
    return [Line(stage, error, limits[stage]) for stage, error in errors]


def against_bfloat16(ckpt: Checkpoint, golden: Path, *, device: str, scales: Scales) -> tuple[int, Errors]:
    """How far fp8 is from bfloat16 on the same device: over how many of the golden runs, and the errors."""
    from vla_infer.calibration import Actions, errors_of

    verification = Verification(ckpt, golden)
    columns, raw = slice(ckpt.action_dim), verification.golden["raw_state"]
    found: dict[str, list[Actions]] = {"bf16": [], "fp8": []}
    for precision, actions in found.items():
        run = engine_run(
            ckpt, device=device, precision=precision, scales=scales if precision == "fp8" else None
        )

        def recorded(
            tape: Tape, inputs: dict[str, Array], run: Run = run, actions: list[Actions] = actions
        ) -> dict[str, Array]:
            outputs = run(tape, inputs)
            if tape.steps == verification.sizes.steps:
                model = outputs["actions"].astype(float)
                robot = verification.processors.decode(outputs["actions"], raw).astype(float)
                actions.append(Actions(model[:, columns], inputs["actions"][:, columns].astype(float), robot))
            return outputs

        list(verification.stages(recorded))
    return len(found["fp8"]), errors_of(list(zip(found["bf16"], found["fp8"], strict=True)))


def by_product(ckpt: Checkpoint, golden: Path, *, device: str, scales: Scales) -> dict[str, Errors]:
    """What each product in fp8 adds alone on the golden observation, the worst first; device: "reference…"."""
    from vla_infer.calibration import Runner
    from vla_infer.observations import Observation

    verification = Verification(ckpt, golden)
    frames = dict(zip(ckpt.cameras, verification.golden["frames"], strict=True))
    observation = Observation(frames, verification.golden["raw_state"], verification.meta["task"])
    return Runner(ckpt, [observation], device=device).layers(scales)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", type=Path, help="a policy directory")
    parser.add_argument("--golden", type=Path, help="expected values (POLICY/golden.safetensors)")
    parser.add_argument("--device", default="cpu", help="cpu, cpu:<instruction set>, cuda or reference")
    parser.add_argument("--precision", default="fp32", choices=sorted({*PRECISIONS, "fp8"}))
    parser.add_argument("--layers", action="store_true", help="of fp8: what each product adds alone")


def main(args: argparse.Namespace) -> int:
    """Print a line for each stage; 1 where one of them is off."""
    if args.layers and args.precision != "fp8":
        raise EngineError(f"--layers: expected --precision fp8, got {args.precision}")
    if args.layers and args.device.partition(":")[0] != "reference":
        raise EngineError(
            f"--layers: expected --device reference or reference:cuda, which observes every product, got {args.device}"
        )
    ckpt = read_checkpoint(args.policy)
    golden = args.golden or args.policy / "golden.safetensors"
    scales = None
    if args.precision == "fp8":  # read once: every byte of the weights is hashed for it
        scales = policy_scales(ckpt, [Verification(ckpt, golden).tape()], device=args.device)
    lines = verify(ckpt, golden, device=args.device, precision=args.precision, scales=scales)
    print(f"{ckpt.family} on {args.device}, {args.precision}: relative L2 error by stage")
    for line in lines:
        print(
            f"{'PASS' if line.passed else 'FAIL'}  {line.stage:<16} {line.error:9.2e}  (limit {line.limit:.1e})"
        )
    if scales is not None:
        count, errors = against_bfloat16(ckpt, golden, device=args.device, scales=scales)
        print(f"fp8 against bfloat16\n{table([('golden', count, errors)])}")
        if args.layers:
            print(layer_report(by_product(ckpt, golden, device=args.device, scales=scales)))
    return 0 if all(line.passed for line in lines) else 1
