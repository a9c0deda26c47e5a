"""`vla-infer replay`: its options, and what is done in which order."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_infer.contract import load_contract
from vla_infer.contract_parse import find_contract
from vla_infer.errors import ReplayError

if TYPE_CHECKING:
    from .bag import Bag

MODES = ("timeline", "loop", "sweep", "direct")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bag", type=Path, help="a rosbag2 folder, or a .mcap or .db3 file")
    parser.add_argument("--policy", required=True, help="directory of the policy as LeRobot saves it")
    parser.add_argument("--contract", required=True, help="contract: a YAML file or a shipped name")
    parser.add_argument("--mode", choices=MODES, default="direct", help="default: direct, which needs no ROS")
    parser.add_argument("--device", default="cpu", help="cpu, cpu:<instruction set>, cuda or reference")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "int8", "fp8"))
    parser.add_argument("--steps", type=int, help="denoising steps; default: the checkpoint's")
    parser.add_argument("--threads", type=int, help="threads of the CPU engine")
    parser.add_argument(
        "--instruction", default="", help="instruction; default: the bag's, then the contract's"
    )
    parser.add_argument(
        "--remap",
        action="append",
        default=[],
        metavar="TOPIC:=BAG_TOPIC",
        help="a contract's topic in this bag",
    )
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after so many seconds")
    parser.add_argument("--every-frame", action="store_true", help="direct: infer every observation, untimed")
    parser.add_argument("--rate", type=float, default=30.0, help="loop: images a second of each camera (30)")
    parser.add_argument("--domain", type=int, help="ROS domain to replay in; default: one of its own")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="write an output bag (modes over ROS)")
    parser.add_argument("--deadline", type=float, help="ms, age at actuation; default: max_observation_age")
    parser.add_argument("--warmup", type=int, default=3, help="inferences left out of the figures (3)")
    parser.add_argument("--buffer", type=int, default=256, help="MB of messages read ahead (256)")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--markdown", type=Path, help="write its tables here")
    parser.add_argument("--html", type=Path, help="write a page with plots here")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="BASELINE.json",
        help="compare: exit 1 when it got worse, 3 when that cannot be told of times",
    )
    parser.add_argument(
        "--against-python",
        metavar="PYTHON",
        help="compare with the vla_infer of another Python environment, its runs and these in turn",
    )
    parser.add_argument(
        "--repeat",
        type=int,
        metavar="N",
        help="runs, each in a process of its own; from 5 on times are judged (default: the baseline's, 7 with "
        "--against-python, else 1)",
    )
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds in all to wait for others' programs to end (30)"
    )
    parser.add_argument(
        "--actions-only", action="store_true", help="compare what the policy does, not how fast"
    )
    parser.add_argument("--tolerance", type=float, default=0.10, help="relative slowdown that passes (0.10)")
    parser.add_argument(
        "--action-tolerance", type=float, default=0.005, help="relative error of actions that passes (0.005)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table")


def console() -> int:
    """`ros2 run vla_infer replay_benchmark`: the same as `vla-infer replay`."""
    from vla_infer.cli import main as cli_main

    return cli_main(["replay", *sys.argv[1:]])


def main(args: argparse.Namespace) -> int:
    """Replay, write what was asked for, compare: 0, 1 when it got worse, 3 when that cannot be told of times."""
    _check(args)
    from . import compare, markdown, repeat, report  # numpy and rosbags are needed from here on

    baseline = report.read(args.against) if args.against else None
    number = args.repeat or repeat.default_number(args, baseline)
    verdict = None
    if number > 1 or args.against_python:
        document, verdict = repeat.measure(args, number, baseline)
    else:
        document, page_inputs = _replay(args)
        if args.html:
            from .page import write_page

            write_page(document, page_inputs, args.html)
        if baseline is not None:
            verdict = compare.compare(baseline, document, repeat.judging(args))
    text = markdown.markdown(document)
    if args.json:
        report.write(document, args.json)
    if verdict is not None:
        text += "\n" + compare.markdown(verdict)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(text)
    if not args.quiet:
        print(text)
    elif verdict is not None:
        print(verdict.summary)
    return verdict.status if verdict is not None else 0


def _check(args: argparse.Namespace) -> None:
    if args.record is not None and args.mode == "direct":
        raise ReplayError(
            "--record: direct mode publishes nothing that could be recorded; choose another mode"
        )
    positive = {
        "--rate": args.rate,
        "--buffer": args.buffer,
        "--tolerance": args.tolerance,
        "--action-tolerance": args.action_tolerance,
    }
    for name, value in positive.items():
        if not value > 0:
            raise ReplayError(f"{name}: expected above 0, got {value}")
    if args.repeat is not None and args.repeat < 1:
        raise ReplayError(f"--repeat: expected 1 or more, got {args.repeat}")
    if args.against and args.against_python:
        raise ReplayError("--against and --against-python: one baseline at a time; leave out one of them")
    if args.against_python and args.mode != "direct":
        raise ReplayError(f"--against-python: only --mode direct runs in turn, got --mode {args.mode}")
    if args.record is not None and ((args.repeat or 1) > 1 or args.against_python):
        raise ReplayError("--record: one run is recorded; leave out --repeat and --against-python")
    if args.every_frame and args.mode != "direct":
        raise ReplayError(f"--every-frame: only --mode direct can stop the time, got --mode {args.mode}")
    for name, value in {
        "--seconds": args.seconds,
        "--warmup": args.warmup,
        "--patience": args.patience,
    }.items():
        if value < 0:
            raise ReplayError(f"{name}: expected 0 or more, got {value}")


def parse_remaps(pairs: list[str]) -> dict[str, str]:
    remaps = {}
    for pair in pairs:
        topic, sign, target = pair.partition(":=")
        if not (sign and topic and target):
            raise ReplayError(f"--remap {pair}: expected TOPIC:=BAG_TOPIC")
        remaps[topic] = target
    return remaps


def _replay(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from . import agreement, report
    from .bag import Bag
    from .observe import map_topics
    from .page_frames import PageInputs, Snapshots, from_bag

    load = os.getloadavg()[0]
    contract_file = find_contract(args.contract)
    contract = load_contract(args.contract)
    bag = Bag(args.bag)
    topics = map_topics(bag, contract, parse_remaps(args.remap))
    deadline = args.deadline * 1e-3 if args.deadline else contract.max_observation_age
    snapshots = Snapshots(bag.duration * 1e-9)
    if args.mode == "direct":
        trace, resources, info, extra = _direct(args, contract, bag, topics, snapshots)
    else:
        trace, resources, info, extra = _live(args, contract, bag, topics)
        snapshots = from_bag(bag, topics, trace)
    recorded = agreement.read_recorded(bag, contract, topics)
    settings = {
        "command": "vla-infer " + " ".join(sys.argv[1:]),
        "every_frame": args.every_frame,
        "seconds": args.seconds,
        "buffer_mb": args.buffer,
        "instruction": args.instruction,
        "remap": parse_remaps(args.remap),
    }
    subject = report.Subject(bag, topics, contract, contract_file, info)
    outcome = report.Outcome(trace, recorded, resources, settings, extra, load)
    document = report.build(subject, outcome, deadline=deadline, warmup=args.warmup)
    return document, PageInputs(trace, recorded, snapshots)


def _direct(
    args: argparse.Namespace, contract: Any, bag: Any, topics: Any, snapshots: Any
) -> tuple[Any, ...]:
    from vla_infer.policy import load_policy

    from .direct import DirectOptions, replay_direct
    from .resources import Sampler

    began = time.perf_counter()
    policy = load_policy(
        args.policy, device=args.device, precision=args.precision, num_steps=args.steps, threads=args.threads
    )
    load = time.perf_counter() - began
    contract.check_policy(policy.info)
    sampler = Sampler(os.getpid(), device=args.device)
    options = DirectOptions(
        every_frame=args.every_frame,
        instruction=args.instruction,
        max_seconds=args.seconds,
        frames=snapshots.add,
        progress=None if args.quiet else progress_bar("replay"),
    )
    try:
        sampler.start()
        trace = replay_direct(policy, contract, bag, topics, options)
    finally:
        sampler.stop()
        policy.close()
        if options.progress is not None:
            print(file=sys.stderr)
    trace.load = load
    first = next((tick for tick in trace.ticks if tick.values is not None), None)
    if first is not None:
        # Loading, the first inference and the wait for the next tick; the bag's own lead is not counted.
        trace.cold_start = load + first.time - trace.inferences[0].taken
    commands = sum(tick.values is not None for tick in trace.ticks) or len(trace.inferences)
    resources = sampler.figures(inferences=len(trace.inferences), commands=commands)
    return trace, resources, policy.info, {}


def _live(args: argparse.Namespace, contract: Any, bag: Bag, topics: Any) -> tuple[Any, ...]:
    from .live import LiveOptions, own_domain, replay_live

    policy = Path(args.policy)
    parameters = {
        "policy": str(policy.resolve()) if policy.exists() else args.policy,
        "contract": str(find_contract(args.contract).resolve()),
        "device": args.device,
        "precision": args.precision,
        "num_steps": args.steps or 0,
        "threads": args.threads or 0,
        "instruction": args.instruction,
        "dry_run": True,
    }
    options = LiveOptions(
        args.mode,
        parameters,
        domain=own_domain() if args.domain is None else args.domain,
        rate=args.rate,
        seconds=args.seconds,
        buffer=args.buffer << 20,
        record=args.record,
        progress=None if args.quiet else progress_bar("replay"),
    )
    try:
        result = replay_live(contract, bag, topics, options)
    finally:
        if options.progress is not None:
            print(file=sys.stderr)
    return result.trace, result.resources, result.info, result.extra


def progress_bar(label: str) -> Callable[[float, float], None]:
    """A line on standard error, drawn at most five times a second; plain lines where it is no terminal."""
    terminal = sys.stderr.isatty()
    last = [0.0]

    def show(done: float, total: float) -> None:
        now = time.monotonic()
        if now - last[0] < (0.2 if terminal else 5.0):
            return
        last[0] = now
        share = min(1.0, done / total) if total > 0 else 1.0
        bar = "█" * round(30 * share) + "·" * (30 - round(30 * share))
        line = f"{label} {bar} {100 * share:3.0f} %  {done:.1f} of {total:.1f} s"
        print("\r" + line if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return show
