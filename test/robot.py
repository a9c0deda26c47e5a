"""A robot for the node's tests: cameras, joint states and ears, in a context of its own, over real DDS."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from std_msgs.msg import String

from vla_infer.codecs import CODECS, JointSample, message_class

os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")

ROOT = Path(__file__).resolve().parent.parent
TOPICS = {"top": "top/image_raw", "wrist": "wrist/image_raw"}
JOINTS = (
    "gripper",
    "wrist_roll",
    "wrist_flex",
    "elbow_flex",
    "shoulder_lift",
    "shoulder_pan",
)  # not the policy's order
IMAGE = np.full((48, 64, 3), 90, dtype=np.uint8)
BEST_EFFORT = QoSProfile(depth=2, reliability=ReliabilityPolicy.BEST_EFFORT)


class Robot:
    """Publishes at 30 Hz (cameras) and 50 Hz (joints) while `feeding` names them; remembers what it hears.

    commands: topic -> list of (steady time, message); diagnostics: status name -> last DiagnosticStatus.
    """

    def __init__(self, commands: dict[str, str], *, namespace: str = "") -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, args=[])
        self.node = rclpy.create_node("robot", context=self.context, namespace=namespace)
        self.feeding: set[str] = set()
        self._sim_zero: int | None = None
        self._clock: Any = None
        self.position = dict.fromkeys(JOINTS, 0.1)
        self.commands: dict[str, list[tuple[float, Any]]] = {topic: [] for topic in commands}
        self.diagnostics: dict[str, Any] = {}
        image, joint_state = (
            message_class("sensor_msgs/msg/Image"),
            message_class("sensor_msgs/msg/JointState"),
        )
        self._cameras = {
            name: self.node.create_publisher(image, topic, BEST_EFFORT) for name, topic in TOPICS.items()
        }
        self._joints = self.node.create_publisher(joint_state, "joint_states", BEST_EFFORT)
        self._instruction = self.node.create_publisher(String, "instruction", 10)
        for topic, kind in commands.items():
            self.node.create_subscription(message_class(kind), topic, self._ear(topic), 10)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self.node.create_timer(1 / 30, self._feed_cameras)
        self.node.create_timer(1 / 50, self._feed_joints)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        while not self._stop.is_set():
            self._executor.spin_once(timeout_sec=0.05)

    def _ear(self, topic: str) -> Callable[[Any], None]:
        return lambda message: self.commands[topic].append((time.monotonic(), message))

    def _on_diagnostics(self, message: Any) -> None:
        for status in message.status:
            self.diagnostics[status.name] = status

    def now(self) -> int:
        ros = int(self.node.get_clock().now().nanoseconds)
        return ros if self._sim_zero is None else ros - self._sim_zero

    def simulate(self, seconds: float) -> None:
        """From now on stamps are simulated time, which starts at `seconds` and is on /clock at 100 Hz."""
        if self._clock is None:
            self._clock = self.node.create_publisher(Clock, "/clock", BEST_EFFORT)
            self.node.create_timer(0.01, self._tick)
        self._sim_zero = int(self.node.get_clock().now().nanoseconds) - round(seconds * 1e9)

    def _tick(self) -> None:
        message = Clock()
        message.clock.sec, message.clock.nanosec = divmod(self.now(), 1_000_000_000)
        self._clock.publish(message)

    def _feed_cameras(self) -> None:
        for name in self._cameras:
            if name in self.feeding:
                self.send_image(name)

    def _feed_joints(self) -> None:
        if "joints" in self.feeding:
            self.send_joints()

    def send_image(self, name: str, *, change: dict[str, Any] | None = None) -> None:
        message = CODECS["sensor_msgs/msg/Image"].encode(IMAGE, self.now(), name)
        for field, value in (change or {}).items():
            setattr(message, field, value)
        self._cameras[name].publish(message)

    def send_joints(self, position: dict[str, float] | None = None) -> None:
        position = position or self.position
        sample = JointSample(tuple(position), np.array(list(position.values())), None, None)
        self._joints.publish(CODECS["sensor_msgs/msg/JointState"].encode(sample, self.now(), ""))

    def connected(self) -> bool:
        """Whether somebody listens to every camera and to the joints."""
        publishers = [*self._cameras.values(), self._joints]
        return all(publisher.get_subscription_count() for publisher in publishers)

    def instruct(self, text: str) -> None:
        self._instruction.publish(String(data=text))

    def feed(self) -> None:
        self.feeding = {"top", "wrist", "joints"}

    def value(self, status: str, key: str) -> str:
        """A figure of the last /diagnostics; empty when there is none yet."""
        found = self.diagnostics.get(f"vla_node: {status}")
        return next((pair.value for pair in found.values if pair.key == key), "") if found else ""

    def message(self, status: str) -> str:
        found = self.diagnostics.get(f"vla_node: {status}")
        return found.message if found else ""

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def patient_contract(folder: Path, **changes: Any) -> str:
    """so101 for a machine that is busy with other things: its path, written to `folder`.

    Observations stay fresh for a second and chunks last several, so that no stall decides a test.
    """
    document = yaml.safe_load((ROOT / "config" / "so101.yaml").read_text())
    document |= {"max_observation_age": 1.0, "sync_slop": 0.9, "policy_rate": 10.0, **changes}
    path = folder / "robot.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def until(condition: Callable[[], Any], *, timeout: float = 60.0, what: str = "condition") -> None:
    """Wait for `condition`; the time-out only bounds a failure, also on a machine with much else to do."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout} s"
        time.sleep(0.01)
