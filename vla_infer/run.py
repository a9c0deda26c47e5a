"""`vla-infer run`: the node, with its parameters as options."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "policy", help="directory of the policy as LeRobot saves it, or a hub id in the cache"
    )
    parser.add_argument("contract", help="contract of the robot: a YAML file or a shipped name such as so101")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--precision", default="fp32", help="fp32, bf16, int8 (CPU) or fp8 (cuda) (default: fp32)"
    )
    parser.add_argument(
        "--calibrate-first",
        type=int,
        help="observations to calibrate precision fp8 on where the policy has no fp8.json (default: 0, refuse)",
    )
    parser.add_argument("--num-steps", type=int, help="denoising steps (default: the checkpoint's)")
    parser.add_argument("--threads", type=int, help="CPU threads of the engine (default: its own choice)")
    parser.add_argument("--control-rate", type=float, help="commands a second (default: the contract's)")
    parser.add_argument("--instruction", help="instruction until one arrives (default: the contract's)")
    parser.add_argument("--namespace", help="namespace of the node and of the contract's relative topics")
    parser.add_argument("--use-sim-time", action="store_true", help="take the time from /clock")
    parser.add_argument(
        "--arm",
        action="store_true",
        help="publish on the real command topics; without it on <topic>_dry, so that nothing moves",
    )


def ros_arguments(args: argparse.Namespace) -> list[str]:
    """The node's ROS arguments for parsed options."""
    policy = str(Path(args.policy).resolve()) if Path(args.policy).exists() else args.policy
    parameters = {
        "policy": policy,
        "contract": args.contract,
        "device": args.device,
        "precision": args.precision,
        "calibrate_first": args.calibrate_first,
        "num_steps": args.num_steps,
        "threads": args.threads,
        "control_rate": args.control_rate,
        "instruction": args.instruction,
        "dry_run": not args.arm,
        "use_sim_time": args.use_sim_time,
        "autostart": True,
    }
    words = ["--ros-args"]
    for name, value in parameters.items():
        if value is not None:
            # JSON is YAML with the type in plain sight: a policy named `1e3` stays a string.
            words += ["-p", f"{name}:={json.dumps(value)}"]
    if args.namespace:
        words += ["-r", f"__ns:=/{args.namespace.strip('/')}"]
    return words


def main(args: argparse.Namespace) -> int:
    from vla_infer.vla_node import main as node_main

    return int(node_main(ros_arguments(args)))
