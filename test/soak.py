"""A long run of the node with faults in between; its memory must not grow and its state must come back.

    python test/soak.py --minutes 60 --policy test/golden/smolvla --rate 5

With `--rate` an inference starts that many times a second at most, so that other work may run beside it.

Every 20 s something goes wrong for a moment: a camera stops, joints carry NaN, images are garbage, the
instruction changes. Printed once a minute: resident memory, ticks, lateness, inferences. Exit status 1 when
memory has grown by more than 1 MiB after the warm-up, when the node has had an error of its own, or does not
play again within 60 s of a fault's end.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from robot import Robot, patient_contract

HERE = Path(__file__).resolve().parent
DRY = "/forward_position_controller/commands_dry"
MIB = 1 << 20


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def faults(robot: Robot) -> list[tuple[str, Callable[[], None]]]:
    """(name, what makes it happen); each is undone by `robot.feed`."""
    joints = dict(robot.position)

    def garbage() -> None:
        for _ in range(10):
            robot.send_image("top", change={"encoding": "16UC1"})

    return [
        ("camera stops", lambda: robot.feeding.discard("top")),
        ("joints stop", lambda: robot.feeding.discard("joints")),
        ("garbage images", garbage),
        ("joints are NaN", lambda: robot.send_joints({**joints, "elbow_flex": float("nan")})),
        ("new instruction", lambda: robot.instruct(f"put it on shelf {int(time.monotonic()) % 7}")),
        ("bad instruction", lambda: robot.instruct("x" * 5000)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--policy", default=str(HERE / "golden" / "smolvla"))
    parser.add_argument("--rate", type=float, help="inferences a second at most (default: as many as can be)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("soak: ended early"))
    os.environ.setdefault("ROS_DOMAIN_ID", "101")  # none that a test beside it has
    # A busy machine may keep an inference waiting for long; what this looks for does not depend on that. A chunk
    # of the golden policy lasts 10 s.
    options: dict[str, object] = {"failsafe": {"inference_timeout": 60.0}, "policy_rate": 1.0}
    if args.rate is not None:
        options["scheduler"] = {"trigger": "rate", "trigger_rate": args.rate}
    with tempfile.TemporaryDirectory() as folder:
        contract = patient_contract(Path(folder), **options)
        command = [sys.executable, "-m", "vla_infer.vla_node", "--ros-args"]
        command += ["-p", f"policy:={args.policy}", "-p", f"contract:={contract}"]
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            robot = Robot({DRY: "std_msgs/msg/Float64MultiArray"})
            try:
                problems = soak(robot, process, minutes=args.minutes)
            finally:
                robot.close()
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                status = process.wait(timeout=20)
            if status != 0 and not problems:
                problems.append(f"the node ended with status {status}")
            if problems:
                log.seek(0)
                print(log.read()[-4000:])
    for problem in problems:
        print(f"FAIL  {problem}")
    return int(bool(problems))


def soak(robot: Robot, process: subprocess.Popen[bytes], *, minutes: float) -> list[str]:
    """Run for `minutes`; what went wrong. Memory counts after 5 minutes, or two fifths of a shorter run."""
    robot.feed()
    began = time.monotonic()
    warm, end = began + min(300.0, 24.0 * minutes), began + 60.0 * minutes
    samples: list[tuple[float, int]] = []
    problems: list[str] = []
    chain = faults(robot)
    next_fault, next_line, count = began + 20.0, began + 60.0, 0
    while time.monotonic() < end:
        time.sleep(1.0)
        now = time.monotonic()
        if process.poll() is not None:
            return [*problems, f"the node ended after {now - began:.0f} s with status {process.returncode}"]
        samples.append((now, resident(process.pid)))
        robot.commands[DRY].clear()
        if now >= next_fault:
            next_fault += 20.0
            name, happen = chain[count % len(chain)]
            count += 1
            happen()
            time.sleep(1.5)
            robot.feed()
            if not played_again(robot):
                problems.append(f"after '{name}' it did not play again: {robot.message('state')}")
        if now >= next_line:
            next_line += 60.0
            print(
                f"{(now - began) / 60:5.1f} min  {samples[-1][1] / MIB:7.1f} MiB  "
                f"{robot.value('inference', 'inferences')} inferences, {robot.message('control')}, "
                f"p99 {robot.value('control', 'tick lateness p99 ms')} ms",
                flush=True,
            )
    kept = [size for at, size in samples if at >= warm]
    part = max(1, len(kept) // 5)
    growth = statistics.median(kept[-part:]) - statistics.median(kept[:part])
    print(f"{count} faults; memory {growth / MIB:+.2f} MiB after the first {(warm - began) / 60:.1f} minutes")
    if growth > MIB:
        problems.append(f"memory grew by {growth / MIB:.2f} MiB, expected at most 1 MiB")
    if robot.value("control", "internal_errors") != "0":
        problems.append(f"{robot.value('control', 'internal_errors')} errors of the node's own")
    return problems


def played_again(robot: Robot) -> bool:
    end = time.monotonic() + 60.0
    before = int(robot.value("control", "commands_played") or 0)
    while time.monotonic() < end:
        if int(robot.value("control", "commands_played") or 0) > before + 10:
            return True
        time.sleep(0.1)
    return False


if __name__ == "__main__":
    sys.exit(main())
