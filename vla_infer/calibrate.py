"""`vla-infer calibrate`: scales for precision "fp8" out of observations, with what fp8 costs measured on them.

Runs on the reference executor, which needs PyTorch and can tell what each product adds, or on a GPU that computes fp8,
without PyTorch. What it writes beside the policy, `fp8.json`, is the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vla_infer.errors import ContractError, EngineError
from vla_infer.fp8 import FILE, MAX_ERROR, Errors, Scales

if TYPE_CHECKING:
    from vla_infer.checkpoint import Checkpoint
    from vla_infer.observations import Observation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", type=Path, help="a policy directory")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--bag", type=Path, help="a rosbag2 folder, or a .mcap or .db3 file; needs --contract"
    )
    source.add_argument("--dataset", type=Path, help="directory of a LeRobot dataset (v2.1 or v3.0)")
    parser.add_argument(
        "--samples",
        type=int,
        default=64,
        help="observations, spread evenly over the bag or the dataset; made up where neither is given (64)",
    )
    parser.add_argument("--contract", help="contract of the bag: a YAML file or a shipped name")
    parser.add_argument(
        "--instruction", default="", help="where the bag or the dataset has none, and of what is made up"
    )
    parser.add_argument(
        "--device", default="reference", help="reference, reference:cuda, or cuda (reference)"
    )
    parser.add_argument(
        "--max-error",
        type=float,
        default=MAX_ERROR,
        help="largest relative L2 error of an observation's actions against bfloat16; nothing is written beyond it "
        f"({MAX_ERROR}, which leaves a cosine of 0.995)",
    )
    parser.add_argument("--layers", action="store_true", help="what each product adds alone")
    parser.add_argument(
        "--keep-limit",
        type=float,
        help="with --layers: propose to keep in bfloat16 what adds more alone (--max-error / sqrt(products): where all "
        "added so much, independently, the sum would be --max-error)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="with --layers: keep in bfloat16 what is proposed"
    )
    parser.add_argument("--out", type=Path, help=f"the file to write (POLICY/{FILE}, where it is looked for)")


def main(args: argparse.Namespace) -> int:
    """Calibrate, print the figures, write the file. 0, or 1 where the error is beyond the bound."""
    _check(args)
    from vla_infer.calibration import Runner
    from vla_infer.calibration_engine import make_runner
    from vla_infer.checkpoint import read_checkpoint

    ckpt = read_checkpoint(args.policy)
    runner = make_runner(ckpt, _observations(args, ckpt), device=args.device)
    scales = runner.calibrate()
    print(report(f"{ckpt.family} on {args.device}", scales))
    if args.layers and isinstance(runner, Runner):
        layers = runner.layers(scales)
        limit = args.keep_limit or args.max_error / max(1, len(layers)) ** 0.5
        proposed = [name for name, errors in layers.items() if errors.relative_l2 > limit]
        print(layer_report(layers, proposed))
        print(f"{len(proposed)} of {len(layers)} add more than {limit:.4f}")
        if args.keep and proposed:
            scales = runner.measured(scales, proposed)
            print(report(f"with {len(proposed)} of {len(layers)} products in bfloat16", scales))
    worst = max(errors.relative_l2 for errors in (scales.seen, scales.unseen) if errors is not None)
    if worst > args.max_error:
        mend = "a larger --max-error" if args.keep else "--layers --keep, or a larger --max-error"
        print(
            f"vla-infer calibrate: relative L2 error {worst:.4f} is beyond --max-error {args.max_error:g}: nothing "
            f"was written; try {mend}",
            file=sys.stderr,
        )
        return 1
    out = args.out or ckpt.path / FILE
    scales.write(out)
    print(f"wrote {out}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.samples < 1:
        raise EngineError(f"--samples: expected 1 or more, got {args.samples}")
    if args.layers and args.device.partition(":")[0] != "reference":
        raise EngineError(f"--layers: expected --device reference or reference:cuda, got {args.device}")
    for name in ("max_error", "keep_limit"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e6:
            raise EngineError(f"--{name.replace('_', '-')}: expected above 0, got {value}")
    if (args.keep or args.keep_limit is not None) and not args.layers:
        raise EngineError("--keep and --keep-limit: need --layers, which measures what each product adds")
    if (args.bag is None) != (args.contract is None):
        raise ContractError("--bag and --contract: expected both, a bag is read by the contract of its robot")


def _observations(args: argparse.Namespace, ckpt: Checkpoint) -> list[Observation]:
    from vla_infer.observations import of_bag, of_dataset, random_observations
    from vla_infer.processors import build_processors

    if args.bag is not None:
        from vla_infer.contract import load_contract

        contract = load_contract(args.contract)
        contract.check_policy(ckpt)
        return of_bag(args.bag, contract, args.samples, instruction=args.instruction)
    processors = build_processors(ckpt)
    if args.dataset is not None:
        cameras = {name: name for name in ckpt.cameras} | processors.rename_map
        return of_dataset(args.dataset, cameras, args.samples, instruction=args.instruction)
    return random_observations(ckpt, processors, args.samples, instruction=args.instruction)


def report(title: str, scales: Scales) -> str:
    """The errors of a calibration as a table."""
    rows = [("calibrated on", scales.samples, scales.seen)]
    if scales.unseen is not None:
        rows.append(("held out", scales.held_out, scales.unseen))
    return f"{title}: fp8 against bfloat16\n{table(rows)}"


def table(rows: Sequence[tuple[str, int, Errors]]) -> str:
    """Errors as a table: what, over how many observations, how far."""
    lines = [
        f"{'':<14} {'observations':>12} {'cosine: worst':>14} {'median':>8} {'less noise':>11} "
        f"{'relative L2: worst':>19} {'median':>7} {'largest difference':>19}"
    ]
    for name, count, e in rows:
        lines.append(
            f"{name:<14} {count:>12} {e.cosine:>14.5f} {e.cosine_median:>8.5f} {e.cosine_added:>11.5f} "
            f"{e.relative_l2:>19.4f} {e.relative_l2_median:>7.4f} {e.action_difference:>19.4g}"
        )
    return "\n".join(lines)


def layer_report(layers: Mapping[str, Errors], proposed: Sequence[str] = ()) -> str:
    """What each product adds, the worst first; proposed: to stay in bfloat16."""
    lines = ["added by each product alone: worst relative L2, worst cosine (*: proposed to stay in bfloat16)"]
    lines += [
        f"{'*' if name in proposed else ' '} {e.relative_l2:.5f}  {e.cosine:.6f}  {name}"
        for name, e in layers.items()
    ]
    return "\n".join(lines)
