"""The demonstration: a simulated arm or a bag's player, the node, and a page to watch and steer it, over Fast DDS.

python -m vla_infer.demo [--policy DIRECTORY] [--bag FOLDER]

Without a policy of yours it is the one in vla_infer/demo/policy, which was trained in the simulation. With a bag
nothing can move, so the node makes a dry run; in the simulation it is armed. Each is a process of its own, so that
none can keep the node's control timer waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from vla_infer.contract import Contract, load_contract
from vla_infer.demo.programs import Program, Programs, last_lines, parameters, python
from vla_infer.demo.watch import watch
from vla_infer.errors import VlaInferError

PAGE_LIMIT = 20.0  # s for the page's server to say where it is
POLICY = Path(__file__).with_name("policy")
PICTURE = 192  # pixels each way of the simulation's cameras: for people; the policy makes them smaller


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 for a demonstration that failed, 2 for arguments that are wrong."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.duration >= 0:
        parser.error(f"--duration is {args.duration:g}: expected seconds, or 0 for no end")
    try:
        contract = load_contract(args.contract)
    except VlaInferError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    # The bag's cameras must never reach a real node, nor its commands a real robot. This process listens there too.
    domain = 1 + os.getpid() % 100 if args.domain is None else args.domain
    os.environ |= {"ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    if args.profile is not None:
        os.environ["RMW_IMPLEMENTATION"] = "rmw_fastrtps_cpp"
    # SIGTERM as Ctrl-C: what was started must not outlive this process, least of all an armed node.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("wb") as log:
        programs = Programs(log)
        rows: list[str] = []
        try:
            problem = _start(programs, args, contract)
            if not problem:
                dry_run, show = args.bag is not None, not args.no_page
                rows, problem = watch(contract, programs.ended, args.duration, dry_run=dry_run, show=show)
        except KeyboardInterrupt:
            problem = "stopped"
        finally:
            # The node first: its last command is a hold, and there is somebody to hear it.
            ends = programs.stop("node")
    # Only now, for a view in this terminal draws over what is printed beside it.
    for row in rows:
        print(row)
    for name, (status, seconds) in ends.items():
        print(f"  {name + ' ended':<22}  {seconds:.2f} s after SIGINT, exit status {status}")
        if status and not problem:
            problem = f"the {name} ended with status {status}"
    if problem:
        print(f"demo: {problem}; the end of {args.log}:", file=sys.stderr)
        print("\n".join(last_lines(args.log)), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", type=Path, default=POLICY, help="policy directory as LeRobot saves it")
    parser.add_argument("--contract", default="so101", help="contract of the robot (default: so101)")
    parser.add_argument(
        "--bag", type=Path, help="folder of a rosbag2 recording to play (default: a simulated SO-101)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the simulation's first scene (default: 0)")
    parser.add_argument(
        "--duration", type=float, default=20.0, help="seconds from the first command; 0: until Ctrl-C"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 1),
        help="of inference (default: one processor is left for messages and the control timer)",
    )
    parser.add_argument("--port", type=int, default=0, help="of the page on 127.0.0.1 (default: any free)")
    parser.add_argument("--no-page", action="store_true", help="no web server: a view in this terminal")
    parser.add_argument("--profile", type=Path, help="Fast DDS profile (XML) for all that send images")
    parser.add_argument(
        "--domain", type=int, help="ROS domain (default: one of its own, apart from any robot)"
    )
    parser.add_argument("--log", type=Path, default=Path("demo.log"), help="file for what the node prints")
    return parser


def _start(programs: Programs, args: argparse.Namespace, contract: Contract) -> str:
    """Start everything. Returns what went wrong, or nothing."""
    profile = {}
    if args.profile is not None:
        # Fast DDS reads one or the other, by its version.
        names = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
        profile = dict.fromkeys(names, str(args.profile.resolve()))
    if args.no_page:
        view = python("page", "--no-page", *parameters(contract=args.contract))
        programs.start("view", Program(view, talks=True))
    else:
        page = python("page", *parameters(contract=args.contract, port=args.port))
        where = programs.start_page(Program(page), PAGE_LIMIT)
        if not where:
            return programs.ended() or f"the page did not start within {PAGE_LIMIT:g} s"
        print(where, flush=True)
    simulated = args.bag is None
    node = parameters(
        policy=args.policy.resolve(),
        contract=args.contract,
        threads=args.threads,
        dry_run=not simulated,
        use_sim_time=simulated,
    )
    programs.start("node", Program(python("vla_node", *node), environment=profile))
    if simulated:
        size = {"image_height": PICTURE, "image_width": PICTURE}
        world = python(
            "sim.node", *parameters(contract=args.contract, seed=args.seed, **size, **_tasks(args.policy))
        )
        programs.start("simulation", Program(world, environment=profile))
    else:
        programs.start("player", Program(_player(args, contract), environment=profile))
    return ""


def _tasks(policy: Path) -> dict[str, list[str]]:
    """The kinds of task that a policy of vla_infer.training was shown; nothing for any other policy."""
    try:
        record = json.loads((policy / "training.json").read_text(encoding="utf-8"))
        return {"kinds": [str(kind) for kind in record["demonstrations"]["kinds"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _player(args: argparse.Namespace, contract: Contract) -> tuple[str, ...]:
    # The bag's own instruction stands until an operator gives another: it is not repeated with the bag.
    instruction = "/" + contract.instruction.topic.lstrip("/")
    return python("demo.player", str(args.bag), "--wait", "10", "--once", instruction)


if __name__ == "__main__":
    sys.exit(main())
