"""Everything that needs a GPU, in one call: checks first, then times. Prints a short table last.

    python benchmarks/gpu.py --out RESULTS [--engine DIR] [--skip-tests] [--baseline torch]

--engine names a folder with `libvla_engine.so` and the `_engine` module built elsewhere. Results as JSON in --out.
Exits 1 when a check failed; times are taken all the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("smolvla", "pi05", "pi0")


def run(name: str, command: list[str], out: Path, *, timeout: float) -> bool:
    """Runs a command with its output in `out`/name.txt; whether it ended well."""
    start = time.monotonic()
    log = out / f"{name}.txt"
    try:
        with log.open("w") as file:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=timeout
            ).returncode
    except subprocess.TimeoutExpired:
        code = 124
    print(
        f"{'ok  ' if code == 0 else 'FAIL'} {name}: exit {code}, {time.monotonic() - start:.1f} s", flush=True
    )
    if code:
        print("\n".join(log.read_text(errors="replace").splitlines()[-12:]), flush=True)
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", type=Path)
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--baseline", choices=["torch", "torch-compile"])
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--sweep", action="store_true", help="1, 2 and 3 cameras, 10 and 50 actions")
    parser.add_argument(
        "--sanitize", nargs="+", default=[], help="compute-sanitizer's tools, over a small inference"
    )
    parser.add_argument("--runs", type=int, default=300, help="timed calls of each measurement")
    args = parser.parse_args()
    logs = args.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if args.engine:
        for file in args.engine.glob("*.so"):
            shutil.copy(file, ROOT / "vla_infer")
    python = [sys.executable]
    good = True
    if not args.skip_tests:
        tests = ["test/test_ops.py", "test/test_cuda.py"]
        command = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda", *tests]
        good &= run("tests", command, logs, timeout=240)
        for family in args.families:
            command = [*python, "-m", "vla_infer.cli", "verify", f"test/golden/{family}"]
            # π0.5's golden noise is not what its actions came from (docs/models.md): its test is in test_cuda.py
            passed = run(
                f"verify_{family}",
                [*command, "--device", "cuda", "--precision", "bf16"],
                logs,
                timeout=120,
            )
            good &= passed or family == "pi05"
    for tool in args.sanitize:
        command = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            *python,
            "-m",
            "vla_infer.cli",
        ]
        command += [
            "bench",
            "--policy",
            "test/golden/smolvla",
            "--device",
            "cuda",
            "--runs",
            "1",
            "--warmup",
            "0",
        ]
        good &= run(f"sanitizer_{tool}", command, logs, timeout=100)
    sweep = ["--cameras", "1", "2", "3", "--horizon", "10", "50"] if args.sweep else []
    baseline = ["--baseline", args.baseline] if args.baseline else []
    rows = []
    for family in args.families:
        result = logs / f"bench_{family}.json"
        command = [
            *python,
            "-m",
            "vla_infer.cli",
            "bench",
            "--model",
            family,
            "--random-weights",
            *sweep,
            *baseline,
        ]
        command += [
            "--device",
            "cuda",
            "--precision",
            "bf16",
            "--runs",
            str(args.runs),
            "--warmup",
            "30",
            "--json",
            str(result),
        ]
        if run(f"bench_{family}", command, logs, timeout=300):
            document = json.loads(result.read_text())
            rows += document["reports"]
        else:
            good = False
    if rows:
        (args.out / "results.json").write_text(json.dumps(document | {"reports": rows}, indent=1) + "\n")
    print(f"\n{'model':8} cameras actions {'p50':>8} {'p95':>8} {'p99':>8} {'max':>8} ms  stages and peers")
    for r in rows:
        c = r["call_ms"]
        extra = {k: v.get("ms") for k, v in r["stages"].items()} | {
            k: v["p50"] for k, v in r.get("torch", {}).items()
        }
        numbers = " ".join(f"{c[k]:8.3f}" for k in ("p50", "p95", "p99", "max"))
        print(f"{r['family']:8} {r['cameras']:7} {r['horizon']:7} {numbers}     {extra}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
