"""Make the demonstration's bag: `python -m vla_infer.tools.make_bag FOLDER`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vla_infer.demo import scene


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make_bag", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the bag, which must not exist")
    parser.add_argument("--seconds", type=float, default=scene.PERIOD, help="length (default: one period)")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("W", "H"))
    args = parser.parse_args(argv)
    if args.folder.exists():
        print(f"make_bag: {args.folder}: exists already; remove it or name another folder", file=sys.stderr)
        return 2
    if args.seconds <= 0 or min(args.size) < 16:
        print("make_bag: --seconds must be above 0 and --size at least 16 16", file=sys.stderr)
        return 2
    from vla_infer.demo.bag import write_bag

    width, height = args.size
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    write_bag(args.folder, seconds=args.seconds, width=width, height=height)
    size = sum(file.stat().st_size for file in args.folder.iterdir())
    print(f"{args.folder}: {args.seconds:g} s, two cameras {width}x{height}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
