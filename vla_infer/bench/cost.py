"""What each stage has to do at least, and how near to the machine's measured ceilings it does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_infer.bench.ceilings import Ceilings
from vla_infer.bench.setups import Program
from vla_infer.engine import PRECISIONS, in_int8
from vla_infer.fp8 import Scales, in_fp8
from vla_infer.tape import Op, Tape

PROFILED = 3  # runs of which the median counts


@dataclass(frozen=True)
class Cost:
    """Operations of the products of a stage, and bytes that it has to move: the weights that they read; for pictures,
    the pixels in and the patches out."""

    flops: float
    moved: float


def tape_cost(tape: Tape, precision: str, scales: Scales | None = None) -> dict[str, Cost]:
    """Cost by stage, counted from the shapes: 2 m n k a product, 2 products an attention; every weight read once
    for each time its operation runs. The projection of the prefix to keys counts where it is done. scales: of
    precision "fp8"."""
    act_bytes = PRECISIONS.get(precision, 2)
    costs: dict[str, Cost] = {}
    for op in tape.ops:
        if op.at_load:
            continue
        times = tape.steps if op.loop else 1
        old = costs.get(op.stage, Cost(0, 0))
        flops = _flops(op)
        moved = float(sum(w.n * w.k for w in op.weights) * _weight_bytes(op, precision, scales))
        if op.kind == "image_patches":
            frames, out = op.operands["frames"], op.operands["out"]
            moved = float(frames.rows * frames.cols + out.rows * out.cols * act_bytes)
        costs[op.stage] = Cost(old.flops + times * flops, old.moved + times * moved)
    return costs


def _weight_bytes(op: Op, precision: str, scales: Scales | None) -> int:
    """Of one number of an operation's weights."""
    if (precision == "int8" and in_int8(op)) or (scales is not None and in_fp8(op, scales.bf16)):
        return 1
    return PRECISIONS.get(precision, 2)


def _flops(op: Op) -> float:
    if op.kind == "attention":
        q, k = op.operands["q"], op.operands["k"]
        return 4.0 * q.rows * (k.rows // int(op.attrs["batch"])) * q.cols
    rows = op.operands["h" if op.kind == "euler" else "x"].rows if op.weights else 0
    return sum(2.0 * rows * w.n * w.k for w in op.weights)


def stages(program: Program, costs: dict[str, Cost], ceilings: Ceilings | None) -> dict[str, Any]:
    """Milliseconds by stage (median of a few profiled runs) beside what was counted, and the fractions of both
    ceilings. `floor` is the fraction of the time that the nearer ceiling alone would take."""
    profiles = [program.profile() for _ in range(PROFILED)]
    found = {}
    for stage, cost in costs.items():
        entry = {"gflop": round(cost.flops / 1e9, 3), "moved_mb": round(cost.moved / 1e6, 2)}
        if stage in profiles[0]:
            seconds = float(np.median([p[stage] for p in profiles]))
            entry |= {
                "ms": round(seconds * 1e3, 3),
                "tflops": round(cost.flops / seconds / 1e12, 4),
                "gb_s": round(cost.moved / seconds / 1e9, 2),
            }
            if ceilings:
                product, copy = cost.flops / ceilings.flops, cost.moved / ceilings.bytes
                entry |= {
                    "of_product": round(product / seconds, 4),
                    "of_copy": round(copy / seconds, 4),
                    "floor": round(max(product, copy) / seconds, 4),
                }
        found[stage or "all"] = entry
    return found
