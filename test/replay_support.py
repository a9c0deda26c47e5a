"""What the tests of the replay share: small bags, a policy with a known answer and known durations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vla_infer.demo.bag import _qos

START = 1_700_000_000_000_000_000  # ns
STORE = get_typestore(Stores.ROS2_JAZZY)
TYPE = STORE.types
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
COMMANDS = "/forward_position_controller/commands"
CAMERAS = ("observation.images.top", "observation.images.wrist")


def header(stamp: int) -> Any:
    seconds, nanoseconds = divmod(stamp, 1_000_000_000)
    return TYPE["std_msgs/msg/Header"](TYPE["builtin_interfaces/msg/Time"](seconds, nanoseconds), "frame")


def joints_at(seconds: float) -> np.ndarray:
    """The six joint positions (rad) of the test's motion, within the limits of so101."""
    return 0.3 * np.sin(seconds * 2.0 + np.arange(6)) + np.array([0, 0, 0, 0, 0, 0.6])


def messages(
    seconds: float, *, size: tuple[int, int], delay: float, commands: bool, seed: int
) -> Iterator[tuple[int, str, str, Any]]:
    """(log time ns, topic, type, message): two cameras at 30 Hz, joints and commands at 50 Hz, in any order."""
    late = round(delay * 1e9)
    width, height = size
    random = np.random.default_rng(seed)
    yield START, "/instruction", "std_msgs/msg/String", TYPE["std_msgs/msg/String"]("pick up the red cube")
    for k in range(round(seconds * 50)):
        time = START + k * 20_000_000
        position = joints_at(k / 50)
        empty = np.empty(0)
        message = TYPE["sensor_msgs/msg/JointState"](header(time), list(JOINTS), position, empty, empty)
        yield time + late, "/joint_states", "sensor_msgs/msg/JointState", message
        if commands:
            layout = TYPE["std_msgs/msg/MultiArrayLayout"]([], 0)
            array = TYPE["std_msgs/msg/Float64MultiArray"](layout, joints_at(k / 50 + 0.1))
            yield time + 1, COMMANDS, "std_msgs/msg/Float64MultiArray", array
    for k in range(round(seconds * 30)):
        for lag, topic in ((0, "/top/image_raw"), (4_000_000, "/wrist/image_raw")):
            time = START + k * 33_333_333 + lag
            pixels = random.integers(0, 256, height * width * 3, dtype=np.uint8)
            image = TYPE["sensor_msgs/msg/Image"](header(time), height, width, "rgb8", 0, width * 3, pixels)
            yield time + late, topic, "sensor_msgs/msg/Image", image


def write_bag(
    path: Path,
    *,
    seconds: float = 1.0,
    size: tuple[int, int] = (48, 36),
    delay: float = 0.0,
    commands: bool = True,
    plugin: StoragePlugin = StoragePlugin.MCAP,
    compression: CompressionMode | None = None,
    seed: int = 0,
) -> Path:
    writer = Writer(path, version=9, storage_plugin=plugin)
    if compression is not None:
        writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        connections: dict[str, Any] = {}
        made = sorted(
            messages(seconds, size=size, delay=delay, commands=commands, seed=seed), key=lambda m: m[0]
        )
        for time, topic, kind, message in made:
            if topic not in connections:
                offered = [_qos(best_effort="image" in topic)]
                connections[topic] = writer.add_connection(
                    topic, kind, typestore=STORE, offered_qos_profiles=offered
                )
            writer.write(connections[topic], time, STORE.serialize_cdr(message, kind))
    return path


class KnownPolicy:
    """Answers with the state it was given, row i being i/10 further; takes `engine` seconds of `clock`.

    Nothing here waits and no real clock is read, so no test depends on the machine's speed.
    """

    def __init__(self, *, engine: float = 0.01, horizon: int = 10) -> None:
        self.elapsed = 0.0
        self.calls: list[tuple[dict[str, np.ndarray], np.ndarray, str]] = []
        self.seeds: list[int] = []
        self.timing = SimpleNamespace(preprocess=0.0, engine=engine, postprocess=0.0)
        self.info = SimpleNamespace(
            family="known", device="cpu", precision="fp32", cameras=CAMERAS, state_dim=6, action_dim=6,
            horizon=horizon, n_action_steps=horizon, num_steps=1, weight_bytes=0, arena_bytes=0, path="known",
            fingerprint="0" * 64,
        )  # fmt: skip

    def cpu_clock(self) -> float:
        return 2 * self.elapsed

    def clock(self) -> float:
        return self.elapsed

    def seed(self, value: int) -> None:
        self.seeds.append(value)

    def predict(self, images: Any, state: np.ndarray, task: str, *, rtc: Any = None) -> np.ndarray:
        self.elapsed += self.timing.engine
        self.calls.append((dict(images), np.array(state), task))
        steps = np.arange(self.info.horizon, dtype=np.float32)[:, None] / 10
        return (state[None] + steps).astype(np.float32)

    def close(self) -> None:
        pass
