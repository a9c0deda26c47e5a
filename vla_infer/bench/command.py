"""The verb: arguments, measurements of each setup, tables and JSON."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.util
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer import __version__
from vla_infer.bench import fp8
from vla_infer.bench import peers as P
from vla_infer.bench.ceilings import measure_ceilings
from vla_infer.bench.cost import stages, tape_cost
from vla_infer.bench.host import commit, processor, versions
from vla_infer.bench.measure import in_turn, measure, percentiles, ratio
from vla_infer.bench.report import markdown
from vla_infer.bench.setups import (
    Actions,
    Plan,
    ReadWeight,
    Setup,
    in_host_memory,
    infer,
    make_tape,
    policy_tape,
    pooled_reader,
)
from vla_infer.checkpoint import Checkpoint, read_checkpoint
from vla_infer.engine import PRECISIONS, Engine
from vla_infer.errors import EngineError, VlaInferError
from vla_infer.inputs import Arrays
from vla_infer.models import BF16_IN_FP8, FAMILIES
from vla_infer.policy import weight_reader
from vla_infer.random_checkpoint import random_policy
from vla_infer.reference_engine import make_engine
from vla_infer.tape import Tape
from vla_infer.verify import relative

INPUT_SETS = 8
WARMUP_PAIRS = 2


class Reading:
    """A reader of weights that counts: `seconds` in it, `bytes` that came out."""

    def __init__(self, read: ReadWeight) -> None:
        self._read = read
        self.seconds, self.bytes = 0.0, 0

    def __call__(self, name: str) -> npt.NDArray[np.generic]:
        began = time.perf_counter()
        values = self._read(name)
        self.seconds += time.perf_counter() - began
        self.bytes += values.nbytes
        return values


def bench(read: ReadWeight, ckpt: Checkpoint, setup: Setup, plan: Plan, scratch: Path) -> dict[str, Any]:
    """Measure one setup; a JSON-ready report."""
    tape, draw = make_tape(ckpt, setup)
    random = np.random.default_rng(0)
    sets = [draw(random) for _ in range(INPUT_SETS)]
    on_cpu = setup.device.startswith("cpu")
    want, yardstick = (None, "")
    eight: fp8.Calibrated | None = None
    if setup.precision == "fp8":
        eight = (
            fp8.of_inputs(
                tape, read, draw, setup.device, keep=(*BF16_IN_FP8.get(ckpt.family, ()), *plan.keep)
            )
            if plan.calibrate
            else fp8.of_file(ckpt, policy_tape(ckpt, setup), setup.device)
        )
    elif plan.baselines:
        want, yardstick = expected(tape, read, sets[0], device=setup.device)
    ceilings = None
    if not setup.device.startswith("reference"):
        ceilings = measure_ceilings(setup.precision, device=setup.device, threads=setup.threads or 1)
    load, start, reading = os.getloadavg()[0], time.perf_counter(), Reading(read)
    scales = eight.scales if eight else None
    engine = make_engine(
        [tape], reading, device=setup.device, precision=setup.precision, threads=setup.threads, scales=scales
    )
    load_s = time.perf_counter() - start
    program = engine.programs[0]

    def whole(i: int) -> Actions:
        return infer(program, sets[i % INPUT_SETS])

    whole(0)
    first_s = time.perf_counter() - start
    report: dict[str, Any] = {
        "family": ckpt.family,
        "device": engine.device_name,
        "precision": setup.precision,
        "cameras": tape.inputs["frames"].rows,
        "horizon": tape.outputs["actions"].rows,
        "prompt": setup.prompt,
        "steps": tape.steps,
        "threads": setup.threads,
        "runs": plan.runs,
        "load_s": round(load_s, 3),
        "read_s": round(reading.seconds, 3),
        "read_mb": round(reading.bytes / 1e6, 1),
        "first_action_s": round(first_s, 3),
        "load_average": round(load, 2),
        "weight_mb": round(engine.weight_bytes / 1e6, 1),
        "arena_mb": round(engine.arena_bytes / 1e6, 1),
        "operations": sum(tape.steps if op.loop else 1 for op in tape.ops if not op.at_load),
        "call_ms": percentiles(measure(whole, runs=plan.runs, warmup=plan.warmup)),
    }
    report["engine_ms"] = percentiles(measure(lambda _: program.run(), runs=plan.runs, warmup=1))
    costs = tape_cost(tape, setup.precision, scales)
    report["stages"] = stages(program, costs, ceilings)
    if ceilings:
        report["ceilings"] = ceilings.json()
    if isinstance(engine, Engine) and engine.programs[0].graph_nodes:
        where_read = [in_host_memory(engine, inputs) for inputs in sets]
        calls = measure(
            lambda i: infer(program, where_read[i % INPUT_SETS]), runs=plan.runs, warmup=plan.warmup
        )
        report["pinned_call_ms"] = percentiles(calls)
        report["graph_nodes"] = engine.programs[0].graph_nodes
        report["gpu_memory_mb"] = round(engine.memory_in_use / 1e6, 1)
    report["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
    if eight is not None:
        plain, compared = fp8.against_bfloat16(program, tape, read, setup, sets, plan)
        others = fp8.observations(draw, plan.samples)
        compared |= fp8.errors(program, plain, others, ckpt.action_dim, eight.want)
        report["against_bf16"] = {"scales": eight.source, "kept": list(eight.scales.bf16), **compared}
    if want is not None:
        job = P.Job(
            tape, read, sets, setup.device, setup.threads if on_cpu else None, scratch, plan.compile_limit
        )
        report |= {"pairs": plan.pairs, "yardstick": yardstick, "error": relative(whole(0), want)}
        report |= compare(whole, job, setup.precision, plan, want)
        report["load_average_after"] = round(os.getloadavg()[0], 2)
    return report


def expected(tape: Tape, read: ReadWeight, inputs: Arrays, *, device: str = "cpu") -> tuple[Actions, str]:
    """Actions of a set of inputs, and who says so: the reference executor in float32 where `device` is, or the engine
    in float32 on its plainest kernels where PyTorch is not installed."""
    if importlib.util.find_spec("torch"):
        from vla_infer.reference import ReferenceExecutor

        place = "cuda" if device.startswith("cuda") else "cpu"
        executor = ReferenceExecutor(tape, read, "fp32", device=place)
        actions = executor.run(inputs)["actions"].astype(np.float32)
        return actions, "the reference executor in float32"
    program = Engine([tape], read, device="cpu:generic", precision="fp32").programs[0]
    for name, values in inputs.items():
        program.inputs[name][...] = values
    program.run()
    return program.result("actions"), "the engine's generic float32 kernels (PyTorch is not installed)"


def compare(
    ours: Callable[[int], Actions], job: P.Job, precision: str, plan: Plan, want: Actions
) -> dict[str, Any]:
    """Every peer checked, then timed in turn with the engine: entries "peers" and "refused" of a report, and "torch":
    PyTorch's times by name."""
    done: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    for name in plan.baselines:
        with contextlib.closing(P.open_peers(name, job, precision)) as found:
            for peer in found:
                entry = peer if isinstance(peer, P.Refused) else _compare_one(ours, peer, plan, want)
                if isinstance(entry, P.Refused):
                    refused.append({"name": entry.name, "why": entry.why})
                    print(f"vla-infer bench: {entry.name}: {entry.why}", file=sys.stderr, flush=True)
                else:
                    done.append(entry)
                del peer, entry
        gc.collect()
    torch = {p["name"].removeprefix("PyTorch "): p["ms"] for p in done if p["name"].startswith("PyTorch ")}
    return {"peers": done, "refused": refused} | ({"torch": torch} if torch else {})


def _compare_one(
    ours: Callable[[int], Actions], peer: P.Peer, plan: Plan, want: Actions
) -> dict[str, Any] | P.Refused:
    try:
        error, limit = relative(peer.call(0), want), P.LIMITS[peer.precision]
        if not error <= limit:
            why = f"not timed: relative error {error:.2g}, expected {limit} or less"
            return P.Refused(f"{peer.name}, {peer.precision}", why)
        mine, its = in_turn(ours, peer.call, pairs=plan.pairs, warmup=WARMUP_PAIRS)
    except VlaInferError:
        raise
    except Exception as failure:  # the peer's own: the others are compared all the same
        return P.Refused(f"{peer.name}, {peer.precision}", P.one_line(failure))
    return {
        "name": peer.name,
        "precision": peer.precision,
        "error": error,
        "ms": percentiles(its),
        "our_ms": percentiles(mine),
        "ratio": ratio(its, mine).json(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--policy", type=Path, help="a policy directory")
    source.add_argument("--model", choices=sorted(FAMILIES), help="full size, with --random-weights")
    parser.add_argument(
        "--random-weights", action="store_true", help="weights made on the fly, no file needed"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cpu:<instruction set>, cuda or reference")
    parser.add_argument(
        "--precision",
        default=["bf16"],
        nargs="+",
        choices=sorted({*PRECISIONS, "fp8"}),
        help="one measurement for each; fp8 beside bf16, with its error (random weights: needs PyTorch for scales)",
    )
    parser.add_argument("--cameras", type=int, nargs="+", help="one measurement for each number of cameras")
    parser.add_argument("--horizon", type=int, nargs="+", help="one measurement for each number of actions")
    parser.add_argument("--prompt", type=int, default=48, help="prompt tokens (48)")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument(
        "--threads", type=int, help="threads of the CPU engine and of its peers (all processors)"
    )
    parser.add_argument(
        "--samples", type=int, default=64, help="sets of inputs that fp8's error is measured on (64)"
    )
    parser.add_argument(
        "--keep",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="PART,...",
        help="with random weights in fp8: products with such a part in their names stay in bf16",
    )
    parser.add_argument("--runs", type=int, default=200, help="calls that count (200)")
    parser.add_argument("--warmup", type=int, default=10, help="calls before them (10)")
    parser.add_argument(
        "--baseline",
        type=P.parse,
        default=[],
        metavar="PEER,...",
        help="run the same tape through these too, in turn with the engine: torch (on a GPU eager and in a CUDA graph; "
        "torch-compile: compiled there too), onnxruntime, openvino",
    )
    parser.add_argument(
        "--pairs", type=int, default=10, help="pairs of calls with each peer, or in bf16 (10)"
    )
    parser.add_argument(
        "--compile-limit", type=float, default=300.0, help="seconds that torch.compile may take (300)"
    )
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")


def main(args: argparse.Namespace) -> int:
    """Print the tables; write JSON and Markdown where asked."""
    if bool(args.model) != args.random_weights:
        raise VlaInferError(
            "bench: --model and --random-weights go together: a model without weights is random"
        )
    if args.baseline and ("fp8" in args.precision or args.device.startswith("reference")):
        raise EngineError("bench: --baseline: expected device cpu or cuda and no fp8, which no peer computes")
    if args.keep and not (args.random_weights and "fp8" in args.precision):
        raise VlaInferError(
            "bench: --keep: expected random weights in fp8; a policy's fp8.json says what it keeps"
        )
    for name in ("runs", "pairs", "samples"):
        if getattr(args, name) < 1:
            raise VlaInferError(f"bench: --{name}: expected 1 or more, got {getattr(args, name)}")
    threads = args.threads
    if args.device.startswith("cpu") and not threads:
        threads = len(os.sched_getaffinity(0))
    plan = Plan(
        args.runs,
        args.warmup,
        args.baseline,
        args.pairs,
        args.compile_limit,
        args.samples,
        args.random_weights,
        args.keep,
    )
    reports = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        ckpt = read_checkpoint(args.policy) if args.policy else random_policy(name, args.model)
        read = pooled_reader(ckpt) if args.random_weights else weight_reader(ckpt)
        setups = [
            Setup(args.device, precision, args.prompt, cameras, horizon, args.steps, threads)
            for precision in args.precision
            for cameras in args.cameras or [None]
            for horizon in args.horizon or [None]
        ]
        for setup in setups:
            reports.append(bench(read, ckpt, setup, plan, scratch))
            print(markdown(reports[-1]), "\n", flush=True)
            gc.collect()
    document = {
        "command": "vla-infer " + " ".join(sys.argv[1:]),
        "version": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": {
            "processor": processor(),
            "processors": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "packages": versions(),
        },
        "reports": reports,
    }
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text("\n\n".join(markdown(r) for r in reports) + "\n")
    return 0
