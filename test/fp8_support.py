"""For tests of precision "fp8" in the engine: scales from one run of a tape, and cases whose intermediate results are
kept as E4M3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from op_cases import Case

from vla_infer.calibration import Magnitudes
from vla_infer.fp8 import Scales
from vla_infer.reference import ReferenceExecutor
from vla_infer.tape import Tape, Tensor, Weight

Arrays = Mapping[str, npt.NDArray[np.generic]]
ReadWeight = Callable[[str], npt.NDArray[np.generic]]


def calibrated(tape: Tape, read: ReadWeight, inputs: Arrays, *, bf16: tuple[str, ...] = ()) -> Scales:
    """Scales from one run."""
    magnitudes = Magnitudes(tape)
    executor = ReferenceExecutor(tape, read, "fp32")
    executor.observe = magnitudes.observe
    executor.run(inputs)
    return replace(magnitudes.scales(samples=1, headroom=1.0), bf16=bf16)


def in_vision(tape: Tape) -> None:
    """Puts every operation down to the vision encoder, which fp8 computes in 8 bits."""
    tape.ops[:] = [replace(op, stage="vision") for op in tape.ops]


# Cases whose intermediate results are kept as E4M3.
def mlp(c: Case) -> Tensor:
    x = c.x(150, 96)
    h = c.tape.linear(
        x, c.weight("in", 208, 96), norm=c.norm("layer", 96), bias=c.row("b", 208), act="gelu_tanh"
    )
    return c.tape.linear(h, c.weight("out", 96, 208), bias=c.row("c", 96))


def gated_mlp(c: Case) -> Tensor:
    gate, up = c.weight("gate", 320, 64), c.weight("up", 320, 64)
    h = c.tape.gated_linear(c.x(80, 64), gate, up, norm=c.norm("rms", 64, plus=1.0), act="silu")
    return c.tape.linear(h, c.weight("down", 64, 320))


def attention_out(c: Case) -> Tensor:
    q, k, v = c.x(2 * 70, 144, name="q"), c.x(2 * 70, 144, name="k"), c.x(2 * 70, 144, name="v")
    a = c.tape.attention(q, k, v, head_dim=72, batch=2)
    return c.tape.linear(a, c.weight("w", 64, 144))


def attention_few_rows(c: Case) -> Tensor:
    """Heads that no wgmma kernel takes, and few enough rows for the kernels of the denoising loop."""
    a = c.tape.attention(c.x(20, 80, name="q"), c.x(30, 40, name="k"), c.x(30, 40, name="v"), head_dim=40)
    return c.tape.linear(a, c.weight("w", 48, 80))


def connector(c: Case) -> Tensor:
    merged = c.tape.space_to_depth(c.x(2 * 8 * 8, 24), 2, grid=(8, 8), norm=c.norm("layer", 24))
    return c.tape.linear(merged, c.weight("w", 80, 96))


def kept_writer(c: Case) -> Tensor:
    """A product that is not in fp8 writes what one in fp8 reads."""
    h = c.tape.linear(c.x(40, 48), Weight("keep", 64, 48, keep=True))
    c.weights["keep"] = c.normal(64, 48, scale=48**-0.5)
    return c.tape.linear(h, c.weight("w", 32, 64))


CHAINS: list[Callable[[Case], Tensor]] = [
    mlp, gated_mlp, attention_out, attention_few_rows, connector, kept_writer,
]  # fmt: skip
