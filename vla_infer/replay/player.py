"""Publishes a recording over ROS 2 at set times, from bytes, and listens to the commands that come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions

from vla_infer.codecs import message_class
from vla_infer.contract import DRY_SUFFIX, Contract
from vla_infer.errors import ReplayError

from .bag import Bag, BagMessage
from .observe import Stamps, TopicMap

_LATE = 0.005  # s from which on a message was published late


@dataclass
class Sent:
    """Every camera message that went out: its stamp and the time of sending (ns, system clock), its stamp in
    the bag (ns since the bag's start)."""

    stamps: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    bag_stamps: list[int] = field(default_factory=list)


class Player:
    """A node in a context of its own: a publisher for each input, a subscription for each command topic."""

    def __init__(self, contract: Contract, topics: TopicMap, stamps: Stamps, *, domain: int) -> None:
        self._stamps = stamps
        self._context = rclpy.Context()
        rclpy.init(
            context=self._context, args=[], domain_id=domain, signal_handler_options=SignalHandlerOptions.NO
        )
        self._node = rclpy.create_node("vla_replay", context=self._context)
        self._publishers: dict[str, Any] = {}
        for topic, name, reliable in _inputs(contract, topics):
            quality = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
            self._publishers[topic] = self._node.create_publisher(
                message_class(topics.types[topic]), name, QoSProfile(depth=10, reliability=quality)
            )
        self.sent: dict[str, Sent] = {topic: Sent() for topic in topics.cameras}
        self.late = 0
        self.count = 0
        self.commands: list[tuple[int, str, bytes]] = []  # (ns at receipt, topic, serialized)
        for sink in contract.commands:
            topic = sink.topic + DRY_SUFFIX
            self._node.create_subscription(
                message_class(sink.type), topic, self._ear(topic), QoSProfile(depth=100), raw=True
            )
        self.answers: list[int] = []  # ns, receipt of the node's word that it has made a chunk
        self._node.create_subscription(
            message_class("std_msgs/msg/Header"),
            "/replay/chunk",
            self._answer,
            QoSProfile(depth=100),
            raw=True,
        )
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin, name="replay_ears", daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        while not self._stop.is_set():
            self._executor.spin_once(timeout_sec=0.05)

    def _ear(self, topic: str) -> Callable[[Any], None]:
        return lambda data: self.commands.append((time.time_ns(), topic, bytes(data)))

    def _answer(self, data: bytes) -> None:
        self.answers.append(time.time_ns())

    def matched(self) -> bool:
        """Whether the node listens to everything that will be sent."""
        return all(publisher.get_subscription_count() > 0 for publisher in self._publishers.values())

    def play(self, messages: Iterable[tuple[float, BagMessage]], alive: Callable[[float], None]) -> float:
        """Publish each message at its time (s from now, not decreasing) with a fresh stamp; seconds that
        it took. alive: called with the time of each message; raises to end the run."""
        origin = time.monotonic()
        for due, message in messages:
            wait = origin + due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            elif wait < -_LATE:
                self.late += 1
            now = time.time_ns()
            # The stamp keeps its recorded distance to the time of arrival.
            data = self._stamps.moved(message, now - message.time)
            self._publishers[message.topic].publish(data)
            self.count += 1
            sent = self.sent.get(message.topic)
            if sent is not None:
                bag_stamp = self._stamps.stamp(message)
                sent.stamps.append(bag_stamp + now - message.time)
                sent.times.append(now)
                sent.bag_stamps.append(bag_stamp)
            alive(due)
        return time.monotonic() - origin

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.shutdown(context=self._context)


def _inputs(contract: Contract, topics: TopicMap) -> Iterator[tuple[str, str, bool]]:
    """(topic in the bag, topic of the contract, reliable)."""
    for topic, camera in topics.cameras.items():
        yield topic, camera.topic, camera.reliable
    for topic, index in topics.states.items():
        yield topic, contract.states[index].topic, contract.states[index].reliable
    if topics.instruction:
        yield topics.instruction, contract.instruction.topic, True


def timeline(messages: Iterable[BagMessage], *, seconds: float) -> Iterator[tuple[float, BagMessage]]:
    """As recorded, up to `seconds` (0: all)."""
    for message in messages:
        due = message.time * 1e-9
        if seconds and due > seconds:
            return
        yield due, message


def at_rate(bag: Bag, topics: TopicMap, *, rate: float, seconds: float) -> Iterator[tuple[float, BagMessage]]:
    """The recording again and again for `seconds`, the camera with most images sending exactly `rate` a second.

    What lies between two of its images follows the first as recorded, closer where there is less time. Where
    there is more, joint states are repeated at their recorded spacing, so that they stay as fresh as they
    were. Raises ReplayError for a bag whose cameras have too few images.
    """
    counts = {topic: bag.topics[topic].count for topic in topics.cameras}
    reference = max(counts, key=lambda topic: counts[topic])
    length = bag.duration * 1e-9
    if counts[reference] < 2:
        raise ReplayError(f"{bag.path}: no camera has two images; --mode loop and sweep need a rate to scale")
    closer = min(1.0, (counts[reference] - 1) / length / rate)
    period = {topic: length / max(1, bag.topics[topic].count) for topic in topics.states}
    last: dict[str, tuple[float, BagMessage]] = {}  # states: when they are due again
    images, base, at = 0, 0.0, 0.0
    while True:
        for message in bag.messages(topics.inputs):
            time_in_bag = message.time * 1e-9
            if message.topic == reference:
                base, at = images / rate, time_in_bag
                images += 1
            due = base + max(0.0, time_in_bag - at) * closer
            yield from _repeats(last, period, until=min(due, seconds))
            if due > seconds:
                return
            yield due, message
            if message.topic in period:
                last[message.topic] = (due + 1.5 * period[message.topic], message)
        base, at = images / rate, 0.0


def _repeats(
    last: dict[str, tuple[float, BagMessage]], period: dict[str, float], *, until: float
) -> Iterator[tuple[float, BagMessage]]:
    """The states that are due again before `until`, in order."""
    while True:
        topic = min(last, key=lambda name: last[name][0], default=None)
        if topic is None or last[topic][0] >= until:
            return
        due, message = last[topic]
        yield due, message
        last[topic] = (due + period[topic], message)
