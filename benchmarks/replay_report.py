"""The replay benchmark of full-size policies over ROS: a recording of two 640×480 cameras at 30 Hz, commands at 50 Hz.

    python benchmarks/replay_report.py --out results [--device cuda --precision bf16] [--families smolvla pi05]

Writes for each family a report (JSON), its tables (Markdown) and its page (HTML) to the folder `--out`. The weights are
random: what the arm does means nothing, when it does it is what is measured. The recording and the policies are made in
a temporary folder (π0.5: 7 GB) and taken away afterwards.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FAMILIES = ("smolvla", "pi05", "pi0")


ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, *words: str) -> None:
    """`python -m` with these words in a folder; ends the program where that fails."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        sys.exit(f"{' '.join(words[:2])}: exit status {done.returncode}")


def report(args: argparse.Namespace, family: str, folder: Path) -> None:
    size = ["--small"] if args.small else []
    run(folder, "vla_infer.random_checkpoint", family, family, "--cameras", "2", *size)
    name = Path(f"replay-{args.name}-{family}")
    options = {
        "--policy": family, "--contract": "so101", "--mode": "timeline", "--device": args.device,
        "--precision": args.precision, "--seconds": args.seconds, "--json": name.with_suffix(".json"),
        "--markdown": name.with_suffix(".md"), "--html": name.with_suffix(".html"),
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    run(folder, "vla_infer.cli", "replay", "bag", *words, "--quiet")
    for suffix in (".json", ".md", ".html"):
        shutil.move(folder / name.with_suffix(suffix), args.out / name.with_suffix(suffix))
    print((args.out / name.with_suffix(".md")).read_text(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="gpu", help="in the names of the files (default: gpu)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["smolvla", "pi05"])
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the recording (default: 30)")
    parser.add_argument("--small", action="store_true", help="the sizes of the tests' policies")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), "vla_infer.tools.make_bag", "bag", "--seconds", str(args.seconds))
        for family in args.families:
            report(args, family, Path(folder))


if __name__ == "__main__":
    main()
