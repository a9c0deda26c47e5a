"""Two cameras, 640x480 rgb8 at 30 Hz, best effort: how much reaches the callback, and how old it is there.

    python benchmarks/transport.py            # once with the shipped Fast DDS profile, once without

One process publishes, one listens. Counting starts when the two have found each other. Exits 1 when the shipped
profile falls short of what is promised: 98 % reached, median age at most 3 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from vla_infer.heap import keep_heap

ROOT = Path(__file__).resolve().parents[1]
PROFILE = ROOT / "config" / "fastdds.xml"
WIDTH, HEIGHT, RATE = 640, 480, 30.0
TOPICS = ("/top/image_raw", "/wrist/image_raw")
GRACE = 2.0  # s that the listener goes on after the last image
LEAST_REACHED, MOST_AGE_MS = 0.98, 3.0


def send(seconds: float) -> None:
    """Publish both cameras for `seconds`; print the count sent."""
    import rclpy
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image

    rclpy.init()
    node = rclpy.create_node("transport_sender")
    publishers = [node.create_publisher(Image, topic, qos_profile_sensor_data) for topic in TOPICS]
    picture = np.random.default_rng(0).integers(0, 256, WIDTH * HEIGHT * 3, np.uint8)
    message = Image(height=HEIGHT, width=WIDTH, encoding="rgb8", step=WIDTH * 3)
    message.data = picture.tobytes()
    deadline = time.monotonic() + 20
    while not all(p.get_subscription_count() for p in publishers):
        if time.monotonic() > deadline:
            sys.exit("transport: no listener found in 20 s")
        time.sleep(0.05)
    time.sleep(0.5)  # the listener's side may still be matching
    start = time.monotonic()
    sent = 0
    for k in range(round(seconds * RATE)):
        for i, publisher in enumerate(publishers):  # the two cameras run free, half a period apart
            time.sleep(max(0.0, start + (k + i / 2) / RATE - time.monotonic()))
            now = time.time_ns()
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(now, 1_000_000_000)
            publisher.publish(message)
            sent += 1
    print(json.dumps({"sent": sent}))
    node.destroy_node()
    rclpy.shutdown()


def listen(seconds: float) -> None:
    """Count images and measure their age at the callback; print the ages in ms."""
    import rclpy
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image

    try:
        from rclpy.experimental import EventsExecutor as Executor
    except ImportError:
        from rclpy.executors import SingleThreadedExecutor as Executor
    keep_heap()  # as the node does
    rclpy.init()
    node = rclpy.create_node("transport_listener")
    ages: list[float] = []
    last = time.monotonic()

    def on_image(message: Image) -> None:
        nonlocal last
        stamp = message.header.stamp
        ages.append((time.time_ns() - stamp.sec * 1_000_000_000 - stamp.nanosec) / 1e6)
        last = time.monotonic()

    for topic in TOPICS:
        node.create_subscription(Image, topic, on_image, qos_profile_sensor_data)
    executor = Executor()
    executor.add_node(node)
    deadline = time.monotonic() + seconds + 30
    while time.monotonic() < deadline and not (ages and time.monotonic() > last + GRACE):
        executor.spin_once(timeout_sec=0.1)
    print(json.dumps({"ages": ages}))
    node.destroy_node()
    rclpy.shutdown()


def measure(profile: Path | None, seconds: float) -> tuple[int, list[float]]:
    """(sent, ages in ms of what arrived) with a Fast DDS profile or without any."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FASTDDS_", "FASTRTPS_"))}
    environment |= {"RMW_IMPLEMENTATION": "rmw_fastrtps_cpp", "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    if profile is not None:
        environment |= {
            name: str(profile) for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
        }
    outputs = {}
    processes = {
        role: subprocess.Popen(
            [sys.executable, __file__, "--role", role, "--seconds", str(seconds)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for role in ("listen", "send")
    }
    for role, process in processes.items():
        output, _ = process.communicate(timeout=seconds + 60)
        if process.returncode:
            sys.exit(f"transport: the {role} process failed")
        outputs[role] = json.loads(output.strip().splitlines()[-1])
    return outputs["send"]["sent"], outputs["listen"]["ages"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each run")
    parser.add_argument("--profile", type=Path, default=PROFILE, help="Fast DDS profile to compare with none")
    parser.add_argument("--role", choices=("send", "listen"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        (send if args.role == "send" else listen)(args.seconds)
        return 0
    if not args.profile.exists():
        parser.error(f"--profile {args.profile}: no such file")
    print(
        f"two cameras {WIDTH}x{HEIGHT} rgb8 at {RATE:g} Hz, best effort, {args.seconds:g} s, {os.cpu_count()} cores"
    )
    print(f"{'profile':<14}{'sent':>6}{'received':>10}{'reached':>9}   age ms: p50    p95    p99    max")
    good = True
    for name, profile in ((args.profile.name, args.profile), ("none", None)):
        sent, ages = measure(profile, args.seconds)
        reached = len(ages) / sent
        p50, p95, p99, most = np.percentile(ages or [np.nan], [50, 95, 99, 100])
        print(
            f"{name:<14}{sent:>6}{len(ages):>10}{reached:>9.1%}{p50:>15.2f}{p95:>7.2f}{p99:>7.2f}{most:>7.2f}"
        )
        if profile is not None:
            good = reached >= LEAST_REACHED and p50 <= MOST_AGE_MS
    verdict = "met" if good else "MISSED"
    print(f"asked of the profile: reached >= {LEAST_REACHED:.0%}, age p50 <= {MOST_AGE_MS:g} ms: {verdict}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
