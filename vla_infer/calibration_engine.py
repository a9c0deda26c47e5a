"""Calibration on the engine itself, without PyTorch: the tape in bfloat16 with the left operand of every product as an
output, and then in fp8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vla_infer.calibration import Actions, Calibration, Magnitudes, Runner, seen_rows
from vla_infer.checkpoint import Checkpoint
from vla_infer.engine import Engine
from vla_infer.errors import EngineError
from vla_infer.fp8 import Errors, Scales, in_fp8
from vla_infer.inputs import Arrays
from vla_infer.policy import AnyProgram, weight_reader
from vla_infer.reference_engine import ReferenceEngine, make_engine
from vla_infer.safetensors_io import to_float32
from vla_infer.tape import NORMS, Op, Tape, Tensor, Weight

if TYPE_CHECKING:
    from vla_infer.observations import Observation

Floats = npt.NDArray[np.float32]


def probed(tape: Tape) -> tuple[Tape, dict[str, Op]]:
    """The tape with the left operand, before its norm, of every product that could be in fp8 as an output; and the
    products by the name of that. It needs memory for all of them at once, some hundred MB at full size."""
    found: dict[str, Op] = {}
    overwritten: set[int] = set()
    for op in reversed(tape.ops):
        overwritten.update(t.buffer.id for t in op.writes)
        if in_fp8(op):
            x = op.operands["x"]
            if x.buffer.id in overwritten:
                raise EngineError(
                    f"calibrate: {x.buffer.name} is written again after {op.weights[0].name} reads it"
                )
            found[f"left operand {len(found)}"] = op
    outputs = {name: op.operands["x"] for name, op in found.items()}
    return replace(tape, outputs=tape.outputs | outputs), found


class EngineRunner(Calibration):
    """On the engine of `device`, all prompts in the longest bucket. Raises EngineError where it does not compute fp8.

    It holds one engine at a time, in bfloat16 or with the scales that it ran last.
    """

    def __init__(self, ckpt: Checkpoint, observations: Sequence[Observation], *, device: str) -> None:
        super().__init__(ckpt, observations)
        self._device = device
        self._read = weight_reader(ckpt)
        self._probed, self._products = probed(self.tape)
        self._params: dict[str, Floats] = {}
        self._made: tuple[Scales | None, Engine | ReferenceEngine] | None = None

    def close(self) -> None:
        if self._made is not None:
            self._made[
                1
            ].programs.clear()  # they hold their engine: memory is given back now and not in some time
            self._made = None

    def _program(self, scales: Scales | None) -> AnyProgram:
        if self._made is None or self._made[0] is not scales:
            self.close()
            tape, precision = (self._probed, "bf16") if scales is None else (self.tape, "fp8")
            engine = make_engine([tape], self._read, device=self._device, precision=precision, scales=scales)
            self._made = scales, engine
        return self._made[1].programs[0]

    def _run(self, index: int, scales: Scales | None) -> tuple[Arrays, AnyProgram, Actions]:
        program = self._program(scales)
        inputs = self._inputs(index, self.tape, self._encoded(index))
        for name, values in inputs.items():
            program.inputs[name][...] = values
        program.run()
        return inputs, program, self._actions(index, program.result("actions"), inputs["actions"])

    def run(self, index: int, scales: Scales | None = None) -> Actions:
        return self._run(index, scales)[2]

    def magnitudes(self, indices: Sequence[int]) -> Magnitudes:
        """All observations run in bfloat16 here, so that the engine for that is made once."""
        found = Magnitudes(self.tape)
        for i in range(len(self.observations)):
            inputs, program, self._plain[i] = self._run(i, None)
            for name, op in self._products.items() if i in indices else ():
                rows = seen_rows(op, inputs["blocks"], op.operands["x"].rows)
                x = self._normed(op, program.result(name)[rows])
                found.add(op, float(np.abs(x).max()))
        return found

    def _normed(self, op: Op, x: Floats) -> Floats:
        """The left operand after its norm, see `tape.Norm`."""
        kind = op.attrs["norm"]
        if kind == NORMS["none"]:
            return x
        if kind == NORMS["layer"]:
            x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(1, keepdims=True) + np.float32(op.attrs["eps"]))
        if "norm_weight" in op.operands:
            x = x * (self._param(op.operands["norm_weight"]) + np.float32(op.attrs["plus"]))
        if "norm_bias" in op.operands:
            x = x + self._param(op.operands["norm_bias"])
        return x

    def _param(self, t: Tensor) -> Floats:
        name = t.buffer.name
        if t.buffer.kind != "param":
            raise EngineError(f"calibrate: {name}: expected a tensor of the checkpoint as a norm's weight")
        if name not in self._params:
            values: Any = self._read(name)
            self._params[name] = to_float32(values, "BF16" if values.dtype == np.uint16 else "F32").reshape(
                1, -1
            )
        return self._params[name]


def require_fp8(device: str) -> None:
    """Raise EngineError unless `device` is there and computes fp8: found out by one small product."""
    tape = Tape(stage="vision")
    x = tape.linear(tape.input("x", (16, 16), "f32"), Weight("v", 16, 16))
    tape.output("y", tape.linear(x, Weight("w", 16, 16)))
    nothing = Errors(1, 1, 1, 0, 0, 0)
    scales = Scales({"w": 1.0}, (), "0" * 64, "0" * 64, 1, 0, nothing, None)
    weight = np.eye(16, dtype=np.float32)
    make_engine([tape], lambda _: weight, device=device, precision="fp8", scales=scales)


def make_runner(ckpt: Checkpoint, observations: Sequence[Observation], *, device: str) -> Calibration:
    """What calibrates on a device: the reference executor for "reference…", else the engine. Raises EngineError where
    it does not compute fp8, or PyTorch is missing for the reference executor."""
    if device.partition(":")[0] == "reference":
        return Runner(ckpt, observations, device=device)
    require_fp8(device)
    return EngineRunner(ckpt, observations, device=device)
