"""FP8 beside bfloat16 on one Hopper GPU: whole calls (host arrays in, actions out) in turn on the same inputs.

    python benchmarks/fp8.py --json RESULT [--families smolvla pi05 pi0] [--pairs 300]

Full size, random weights, two cameras, 48-token prompt. Scales come from two sets of inputs on the reference executor
on the GPU, errors from six others: actions in fp8 against those in bfloat16, both by the engine, and against the
reference executor's fp8 of the first. Needs torch.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_infer.bench.host import commit, versions
from vla_infer.bench.measure import in_turn, percentiles, ratio
from vla_infer.bench.setups import Setup, make_tape, pooled_reader
from vla_infer.engine import Engine, Program
from vla_infer.fp8 import HEADROOM, Errors, Scales, hash_tape, in_fp8, key, scale_of
from vla_infer.inputs import Arrays
from vla_infer.random_checkpoint import random_policy
from vla_infer.reference import ReferenceExecutor
from vla_infer.tape import Op

FAMILIES = ("smolvla", "pi05", "pi0")
CALIBRATION, SETS = 2, 8


def calibrated(reference: ReferenceExecutor, sets: list[Arrays]) -> Scales:
    """Scales from a few sets of inputs, not measured and not to be written beside a policy."""
    largest: dict[str, float] = {}

    def observe(op: Op, x: torch.Tensor) -> None:
        if in_fp8(op):
            largest[key(op)] = max(largest.get(key(op), 0.0), float(x.abs().max()))

    reference.observe = observe
    for inputs in sets:
        reference.run(inputs)
    reference.observe = None
    activations = {name: float(scale_of(HEADROOM * value)) for name, value in largest.items()}
    nothing = Errors(1, 1, 1, 0, 0, 0)
    return Scales(activations, (), "0" * 64, hash_tape(reference.tape), len(sets), 0, nothing, None)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def run(program: Program, inputs: Arrays) -> np.ndarray:
    for name, values in inputs.items():
        program.inputs[name][...] = values
    program.run()
    return program.result("actions")


def measure(family: str, pairs: int, device: str = "cuda") -> dict[str, Any]:
    """Both precisions of one model in one process."""
    with tempfile.TemporaryDirectory() as folder:
        ckpt = random_policy(folder, family)
        tape, draw = make_tape(ckpt, Setup(device, "fp8", 48))
        read = pooled_reader(ckpt)
        random = np.random.default_rng(0)
        sets = [draw(random) for _ in range(SETS)]
        reference = ReferenceExecutor(tape, read, "bf16", device=device)
        scales = calibrated(reference, sets[:CALIBRATION])
        eight = ReferenceExecutor(tape, read, "fp8", device=device, scales=scales, like=reference)
        want = eight.run(sets[CALIBRATION])["actions"]
        del reference, eight
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        engines = {
            "bf16": Engine([tape], read, device=device, precision="bf16"),
            "fp8": Engine([tape], read, device=device, precision="fp8", scales=scales),
        }
    programs = {name: engine.programs[0] for name, engine in engines.items()}
    cosines, added = [], []
    for i, inputs in enumerate(sets[CALIBRATION:]):
        plain, got = run(programs["bf16"], inputs), run(programs["fp8"], inputs)
        cosines.append(cosine(plain, got))
        added.append(cosine(plain - inputs["actions"], got - inputs["actions"]))
        if i == 0:
            from_reference = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            format_error = float(np.linalg.norm(plain - want) / np.linalg.norm(want))
    times = in_turn(
        lambda i: run(programs["fp8"], sets[i % SETS]),
        lambda i: run(programs["bf16"], sets[i % SETS]),
        pairs=pairs,
        warmup=20,
    )
    report: dict[str, Any] = {
        "family": family,
        "device": engines["fp8"].device_name,
        "cosine_worst": min(cosines),
        "cosine_added_worst": min(added),
        "error_to_reference_fp8": from_reference,
        "error_bf16_to_reference_fp8": format_error,
        "bf16_over_fp8": ratio(times[1], times[0]).json(),
    }
    for name, each in zip(("fp8", "bf16"), times, strict=True):
        stages = [programs[name].profile() for _ in range(5)]
        report[name] = {
            "call_ms": percentiles(each),
            "stages_ms": {s: round(1e3 * float(np.median([p[s] for p in stages])), 3) for s in stages[0]},
            "weight_mb": round(engines[name].weight_bytes / 1e6, 1),
            "arena_mb": round(engines[name].arena_bytes / 1e6, 1),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--pairs", type=int, default=300)
    args = parser.parse_args()
    reports = []
    for family in args.families:
        r = measure(family, args.pairs)
        reports.append(r)
        for name in ("bf16", "fp8"):
            numbers = " ".join(f"{k} {v:.3f}" for k, v in r[name]["call_ms"].items())
            print(f"{family} {name}: {numbers} ms; {r[name]['stages_ms']}; weights {r[name]['weight_mb']} MB")
        print(
            f"{family}: bf16 takes {r['bf16_over_fp8']['median']:.3f} times as long; worst cosine "
            f"{r['cosine_worst']:.5f}, of what is added {r['cosine_added_worst']:.5f}; from the reference's fp8 "
            f"{r['error_to_reference_fp8']:.1e} (bf16 {r['error_bf16_to_reference_fp8']:.1e})",
            flush=True,
        )
        args.json.write_text(
            json.dumps({"commit": commit(), "versions": versions(), "reports": reports}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
