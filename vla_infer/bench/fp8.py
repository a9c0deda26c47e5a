"""Precision "fp8" beside bfloat16 in one process: scales to run with, times by the same protocol and in turn, and how
far the actions are apart."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_infer.bench.cost import stages, tape_cost
from vla_infer.bench.measure import in_turn, measure, percentiles, ratio
from vla_infer.bench.setups import Actions, Plan, Program, ReadWeight, Setup, infer
from vla_infer.calibration import Actions as Pair
from vla_infer.calibration import Magnitudes, errors_of
from vla_infer.checkpoint import Checkpoint
from vla_infer.fp8 import FILE, Scales, named, policy_scales
from vla_infer.inputs import Arrays
from vla_infer.reference_engine import import_reference, make_engine
from vla_infer.tape import Tape
from vla_infer.verify import relative

if TYPE_CHECKING:
    from vla_infer.reference import ReferenceExecutor

CALIBRATION = 4  # sets of inputs that scales come from where the policy has none of its own

Draw = Callable[[np.random.Generator], Arrays]


@dataclass(frozen=True)
class Calibrated:
    """Scales, what they are from, and, where the reference executor was there to make them, its actions with them for
    the first of `observations`."""

    scales: Scales
    source: str
    want: Actions | None = None


def observations(draw: Draw, count: int) -> list[Arrays]:
    """Inputs that errors are measured on: drawn apart from those that are timed and those that scales come from."""
    random = np.random.default_rng(1)
    return [draw(random) for _ in range(count)]


def of_file(ckpt: Checkpoint, tape: Tape, device: str) -> Calibrated:
    """The calibration beside a policy; tape: as the policy records it. Raises as `policy_scales`."""
    return Calibrated(policy_scales(ckpt, [tape], device=device), FILE)


def of_inputs(
    tape: Tape, read: ReadWeight, draw: Draw, device: str, *, keep: Sequence[str] = ()
) -> Calibrated:
    """Scales from random inputs on the reference executor, in bfloat16 where `device` is; the products that `keep`
    names (`fp8.named`) stay in bfloat16.

    Raises EngineError where PyTorch is missing.
    """
    kept = named(tape, keep, where="bench: --keep")
    name, _, place = device.partition(":")
    executor_of = import_reference("bench: --precision fp8: scales for random weights:")
    executor = executor_of(tape, read, "bf16", device=device if name == "cuda" else place or "cpu")
    scales = calibrate(executor, [draw(np.random.default_rng([2, i])) for i in range(CALIBRATION)])
    scales = executor.scales = replace(scales, bf16=kept)
    (first,) = observations(draw, 1)
    want = executor.run(first)["actions"].astype(np.float32)
    del executor
    gc.collect()
    if "cuda" in device:  # so that the engines find room
        import torch

        torch.cuda.empty_cache()
    return Calibrated(scales, f"{CALIBRATION} other sets of random inputs, by the reference executor", want)


def calibrate(executor: ReferenceExecutor, sets: list[Arrays]) -> Scales:
    """Scales from sets of inputs of which every row counts."""
    magnitudes = Magnitudes(executor.tape)
    executor.observe = magnitudes.observe
    for inputs in sets:
        executor.run(inputs)
    executor.observe = None
    return magnitudes.scales(samples=len(sets))


def against_bfloat16(
    eight: Program, tape: Tape, read: ReadWeight, setup: Setup, sets: list[Arrays], plan: Plan
) -> tuple[Program, dict[str, Any]]:
    """The same tape in bfloat16, and its times: alone by the protocol of every other figure, and in turn with
    `eight`."""
    engine = make_engine([tape], read, device=setup.device, precision="bf16", threads=setup.threads)
    plain = engine.programs[0]
    count = len(sets)

    def whole(program: Program) -> Callable[[int], Actions]:
        return lambda i: infer(program, sets[i % count])

    report = {
        "call_ms": percentiles(measure(whole(plain), runs=plan.runs, warmup=plan.warmup)),
        "engine_ms": percentiles(measure(lambda _: plain.run(), runs=plan.runs, warmup=1)),
        "stages": stages(plain, tape_cost(tape, "bf16"), None),
        "weight_mb": round(engine.weight_bytes / 1e6, 1),
        "arena_mb": round(engine.arena_bytes / 1e6, 1),
    }
    mine, its = in_turn(whole(eight), whole(plain), pairs=plan.pairs, warmup=2)
    return plain, {"bf16": report, "pairs": plan.pairs, "times_longer": ratio(its, mine).json()}


def errors(
    eight: Program, plain: Program, sets: list[Arrays], columns: int, want: Actions | None
) -> dict[str, Any]:
    """How far fp8 is from bfloat16 over sets of inputs, in the first `columns` of the actions in model units; and on
    the first set, how far both are from `want`, the reference executor's fp8 with the same scales."""
    pairs: list[tuple[Pair, Pair]] = []
    report: dict[str, Any] = {"samples": len(sets)}
    for i, inputs in enumerate(sets):
        noise = inputs["actions"][:, :columns].astype(float)
        both = [infer(program, inputs) for program in (plain, eight)]
        if i == 0 and want is not None:
            report["to_reference_fp8"] = relative(both[1], want)
            report["bf16_to_reference_fp8"] = relative(both[0], want)
        model = [actions[:, :columns].astype(float) for actions in both]
        pairs.append((Pair(model[0], noise, model[0]), Pair(model[1], noise, model[1])))
    found = asdict(errors_of(pairs))
    del found["action_difference"]  # of robot units, which random weights do not have
    return report | {name: round(value, 6) for name, value in found.items()}
