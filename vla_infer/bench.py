"""`vla-infer bench`: how long one inference takes, where the time goes, and what the hardware would allow.

A call is what a robot waits for: pictures, state and tokens copied into the engine's staging, one engine call, the
actions copied out. Inputs are random and change from call to call.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer import __version__
from vla_infer.checkpoint import Checkpoint, read_checkpoint
from vla_infer.engine import PRECISIONS, Engine, Program
from vla_infer.errors import VlaInferError
from vla_infer.models import FAMILIES
from vla_infer.policy import weight_reader
from vla_infer.random_checkpoint import random_policy
from vla_infer.random_weights import PooledWeights
from vla_infer.tape import Tape

Arrays = dict[str, npt.NDArray[np.generic]]
PERCENTILES = (50, 95, 99, 100)
IMAGE = (480, 640)  # of the cameras, height and width
INPUT_SETS = 8


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured. None takes what the checkpoint says."""

    device: str
    precision: str
    prompt: int
    cameras: int | None = None
    horizon: int | None = None
    steps: int | None = None
    threads: int | None = None


def make_tape(ckpt: Checkpoint, setup: Setup) -> tuple[Tape, Callable[[np.random.Generator], Arrays]]:
    """The tape of the setup, and a function that draws a set of random inputs for it."""
    model = FAMILIES[ckpt.family]
    sizes = model.sizes(ckpt, steps=setup.steps)
    changes = {"cameras": setup.cameras, "horizon": setup.horizon}
    sizes = dataclasses.replace(sizes, **{k: v for k, v in changes.items() if v is not None})
    size = IMAGE[0] * IMAGE[1] * 3
    tape = model.record(sizes, prompt=setup.prompt, frame_bytes=size)
    geometry = [sizes.vision.geometry(*IMAGE, 3 * IMAGE[1])] * sizes.cameras
    index = model.index_inputs(
        sizes, prompt=setup.prompt, tokens=setup.prompt, present=(True,) * sizes.cameras
    )

    def draw(random: np.random.Generator) -> Arrays:
        inputs: Arrays = dict(index)
        inputs["geometry"] = np.array(geometry, np.int32)
        for name, t in tape.inputs.items():
            if name in inputs:
                continue
            shape = (t.rows, t.cols)
            if t.dtype == "u8":
                inputs[name] = random.integers(0, 256, shape, dtype=np.uint8)
            elif t.dtype == "i32":
                inputs[name] = random.integers(0, sizes.vocabulary, shape, dtype=np.int32)
            else:
                guided = name.startswith("rtc_")
                inputs[name] = (
                    np.zeros(shape, np.float32) if guided else random.standard_normal(shape, np.float32)
                )
        return inputs

    return tape, draw


def pooled_reader(ckpt: Checkpoint) -> Callable[[str], npt.NDArray[np.generic]]:
    """Random weights of a checkpoint's shapes, made in seconds at any size."""
    pool = PooledWeights()
    return lambda name: pool.tensor(name, ckpt.shape_of(name))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a stage must do at least: operations of its products, bytes of the weights that they read."""

    flops: float
    weight_bytes: float


def tape_cost(tape: Tape, weight_bytes: int) -> dict[str, Cost]:
    """Cost by stage, counted from the shapes: 2 m n k a product, 2 products an attention; every weight read once
    for each time its operation runs. The projection of the prefix to keys counts where it is done."""
    costs: dict[str, Cost] = {}
    for op in tape.ops:
        if op.at_load:
            continue
        times = tape.steps if op.loop else 1
        flops = read = 0.0
        if op.kind == "attention":
            q, k = op.operands["q"], op.operands["k"]
            flops = 4.0 * q.rows * (k.rows // int(op.attrs["batch"])) * q.cols
        for w in op.weights:
            rows = op.operands["h" if op.kind == "euler" else "x"].rows
            flops += 2.0 * rows * w.n * w.k
            read += float(w.n * w.k * weight_bytes)
        old = costs.get(op.stage, Cost(0, 0))
        costs[op.stage] = Cost(old.flops + times * flops, old.weight_bytes + times * read)
    return costs


def fill(program: Program, inputs: Arrays) -> None:
    for name, values in inputs.items():
        program.inputs[name][...] = values


def measure(call: Callable[[int], object], *, runs: int, warmup: int) -> npt.NDArray[np.float64]:
    """Seconds of `runs` calls after `warmup` that do not count; the call gets its number."""
    times = np.empty(runs)
    for i in range(warmup):
        call(i)
    for i in range(runs):
        start = time.perf_counter()
        call(i)
        times[i] = time.perf_counter() - start
    return times


def percentiles(times: npt.NDArray[np.float64]) -> dict[str, float]:
    """p50, p95, p99 and max in milliseconds."""
    values = np.percentile(times, PERCENTILES) * 1e3
    return {
        ("max" if p == 100 else f"p{p}"): round(float(v), 4) for p, v in zip(PERCENTILES, values, strict=True)
    }


def bench(
    ckpt: Checkpoint, setup: Setup, *, runs: int, warmup: int, baseline: str | None, random_weights: bool
) -> dict[str, Any]:
    """Measure one setup; a JSON-ready report."""
    tape, draw = make_tape(ckpt, setup)
    start = time.perf_counter()
    read = pooled_reader(ckpt) if random_weights else weight_reader(ckpt)
    engine = Engine([tape], read, device=setup.device, precision=setup.precision, threads=setup.threads)
    load = time.perf_counter() - start
    program = engine.programs[0]
    random = np.random.default_rng(0)
    sets = [draw(random) for _ in range(INPUT_SETS)]

    def whole(i: int) -> None:
        fill(program, sets[i % INPUT_SETS])
        program.run()
        actions = program.result("actions")
        if not np.isfinite(actions).all():
            raise VlaInferError(f"bench: call {i} gave actions that are not finite")

    report: dict[str, Any] = {
        "family": ckpt.family,
        "device": engine.device_name,
        "precision": setup.precision,
        "cameras": tape.inputs["frames"].rows,
        "horizon": tape.outputs["actions"].rows,
        "prompt": setup.prompt,
        "steps": tape.steps,
        "runs": runs,
        "load_s": round(load, 3),
        "weight_mb": round(engine.weight_bytes / 1e6, 1),
        "arena_mb": round(engine.arena_bytes / 1e6, 1),
        "operations": sum(tape.steps if op.loop else 1 for op in tape.ops if not op.at_load),
        "call_ms": percentiles(measure(whole, runs=runs, warmup=warmup)),
    }
    report["engine_ms"] = percentiles(measure(lambda _: program.run(), runs=runs, warmup=1))
    report["stages"] = _stages(tape, program, PRECISIONS[setup.precision])
    report["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
    if baseline:
        from vla_infer.bench_torch import baselines

        calls = baselines(tape, read, setup, sets, compiled=baseline == "torch-compile")
        report["torch"] = {
            name: percentiles(measure(call, runs=max(3, runs // 10), warmup=2))
            for name, call in calls.items()
        }
    return report


def _stages(tape: Tape, program: Program, weight_bytes: int) -> dict[str, Any]:
    """Seconds by stage (median of three profiled runs), beside what was counted."""
    profiles = [program.profile() for _ in range(3)]
    stages = {}
    for stage, cost in tape_cost(tape, weight_bytes).items():
        entry = {"gflop": round(cost.flops / 1e9, 3), "weight_mb": round(cost.weight_bytes / 1e6, 2)}
        if stage in profiles[0]:
            seconds = float(np.median([p[stage] for p in profiles]))
            entry |= {
                "ms": round(seconds * 1e3, 3),
                "tflops": round(cost.flops / seconds / 1e12, 3),
                "weight_gb_s": round(cost.weight_bytes / seconds / 1e9, 2),
            }
        stages[stage or "all"] = entry
    return stages


def commit() -> str | None:
    """The commit that was measured, where this is a checkout."""
    here = Path(__file__).parent
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def markdown(report: dict[str, Any]) -> str:
    """A report as a table."""
    lines = [
        f"### {report['family']} on {report['device']}, {report['precision']}",
        "",
        f"{report['cameras']} cameras, {report['horizon']} actions, {report['steps']} steps, "
        f"{report['prompt']}-token prompt, {report['runs']} calls; weights {report['weight_mb']} MB, everything "
        f"else {report['arena_mb']} MB, {report['operations']} operations, loaded in {report['load_s']} s.",
        "",
        "| ms | p50 | p95 | p99 | max |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = {"whole call": report["call_ms"], "engine": report["engine_ms"]}
    rows |= {f"PyTorch {name}": ms for name, ms in report.get("torch", {}).items()}
    lines += [
        f"| {name} | " + " | ".join(f"{v:.2f}" for v in ms.values()) + " |" for name, ms in rows.items()
    ]
    lines += [
        "",
        "| stage | ms | GFLOP | TFLOP/s | weights MB | GB/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for stage, s in report["stages"].items():
        cells = [
            s.get("ms", "–"),
            s["gflop"],
            s.get("tflops", "–"),
            s["weight_mb"],
            s.get("weight_gb_s", "–"),
        ]
        lines.append(f"| {stage} | " + " | ".join(str(c) for c in cells) + " |")
    if "torch" in report:
        best = min(ms["p50"] for ms in report["torch"].values())
        lines += ["", f"Ratio to the fastest PyTorch here: {best / report['call_ms']['p50']:.2f}"]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--policy", type=Path, help="a policy directory")
    source.add_argument("--model", choices=sorted(FAMILIES), help="full size, with --random-weights")
    parser.add_argument(
        "--random-weights", action="store_true", help="weights made on the fly, no file needed"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cpu:<instruction set> or cuda")
    parser.add_argument("--precision", default="bf16", choices=sorted(PRECISIONS))
    parser.add_argument("--cameras", type=int, nargs="+", help="one measurement for each number of cameras")
    parser.add_argument("--horizon", type=int, nargs="+", help="one measurement for each number of actions")
    parser.add_argument("--prompt", type=int, default=48, help="prompt tokens (48)")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--threads", type=int, help="threads of the CPU engine")
    parser.add_argument("--runs", type=int, default=200, help="calls that count (200)")
    parser.add_argument("--warmup", type=int, default=10, help="calls before them (10)")
    parser.add_argument(
        "--baseline", choices=["torch", "torch-compile"], help="run the same tape through PyTorch too"
    )
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")


def main(args: argparse.Namespace) -> int:
    """Print the tables; write JSON and Markdown where asked."""
    if bool(args.model) != args.random_weights:
        raise VlaInferError(
            "bench: --model and --random-weights go together: a model without weights is random"
        )
    with tempfile.TemporaryDirectory() as scratch:
        ckpt = read_checkpoint(args.policy) if args.policy else random_policy(scratch, args.model)
        reports = []
        for cameras in args.cameras or [None]:
            for horizon in args.horizon or [None]:
                setup = Setup(
                    args.device, args.precision, args.prompt, cameras, horizon, args.steps, args.threads
                )
                report = bench(
                    ckpt,
                    setup,
                    runs=args.runs,
                    warmup=args.warmup,
                    baseline=args.baseline,
                    random_weights=args.random_weights,
                )
                reports.append(report)
                print(markdown(report), "\n", flush=True)
    document = {
        "command": "vla-infer " + " ".join(sys.argv[1:]),
        "version": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": {
            "processor": processor(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "reports": reports,
    }
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text("\n\n".join(markdown(r) for r in reports) + "\n")
    return 0
