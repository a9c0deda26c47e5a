"""`vla-infer evaluate`: how often a policy does what it is told, on the simulated arm."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from vla_infer.safety_options import MODES
from vla_infer.sim.tasks import KINDS, SPLITS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--policy", help="directory of the policy")
    who.add_argument("--expert", action="store_true", help="the scripted expert instead: an upper bound")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first scene (default: 0)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of task")
    parser.add_argument("--split", choices=SPLITS, default="eval", help="of scenes and sentences")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or reference for PyTorch (default: cpu)")
    parser.add_argument(
        "--precision", default="fp32", help="fp32, bf16, int8 (CPU) or fp8 (cuda, reference) (default: fp32)"
    )
    parser.add_argument("--num-steps", type=int, help="denoising steps (default: the checkpoint's)")
    parser.add_argument("--threads", type=int, help="CPU threads of the engine")
    parser.add_argument("--contract", default="so101", help="a YAML file or a shipped name (default: so101)")
    parser.add_argument("--scheduler", choices=MODES, help="mode (default: the contract's)")
    parser.add_argument(
        "--inference-ms", type=float, help="what an inference takes in simulated time (default: as measured)"
    )
    parser.add_argument("--latency-ms", type=float, default=0.0, help="added to that (default: 0)")
    parser.add_argument("--time-limit", type=float, default=10.0, help="s of an episode (default: 10)")
    parser.add_argument(
        "--wrong-instruction",
        action="store_true",
        help="name another cube of the scene: success then shows how little the instruction counts",
    )
    parser.add_argument(
        "--through-dds",
        action="store_true",
        help="run the simulation's node and the policy's as processes, in real time, instead of in this one",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--json", type=Path, help="write the results there, episode by episode")
    parser.add_argument("--markdown", type=Path, help="write the report there too")
    parser.add_argument("--quiet", action="store_true", help="no line for each episode")


def main(args: argparse.Namespace) -> int:
    from vla_infer.sim.evaluate import evaluate, markdown, options_of, summary
    from vla_infer.sim.rollout import Outcome

    for name, least in (("episodes", 1), ("seed", 0), ("workers", 1), ("latency_ms", 0), ("time_limit", 0.1)):
        if not least <= getattr(args, name) < 1e9:
            option = name.replace("_", "-")
            print(f"vla-infer evaluate: --{option}: expected {least} or more", file=sys.stderr)
            return 2
    options = replace(options_of(args), latency=args.latency_ms / 1e3)

    def progress(o: Outcome) -> None:
        if not args.quiet:
            result = "success" if o.success else "obeyed" if o.obeyed else "failed"
            print(f"seed {o.seed}: {o.said}: {result} after {o.seconds:.1f} s", file=sys.stderr, flush=True)

    if args.through_dds:
        from vla_infer.sim.through_dds import evaluate_through_dds

        document = summary(evaluate_through_dds(options, progress=progress))
    else:
        document = summary(evaluate(options, workers=args.workers, progress=progress))
    report = markdown(document)
    print(report, end="")
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(report, encoding="utf-8")
    return 0
