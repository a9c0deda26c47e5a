"""Plays a bag over ROS: `python -m vla_infer.demo.player BAG`.

Topics, types and quality of service come from the bag. Messages keep their recorded spacing and get fresh
stamps; at the end the bag starts again. Everything is read beforehand, so nothing but publishing happens in
time.
"""

from __future__ import annotations

import argparse
import struct
import sys
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rosbags.interfaces import ConnectionExtRosbag2, Qos
from rosbags.rosbag2 import Reader
from rosbags.rosbag2.errors import ReaderError

from vla_infer.heap import keep_heap
from vla_infer.stop_signals import stop_on_signals

# A stamped message starts with its header's stamp, behind the four bytes that name the encoding (CDR).
_STAMP = struct.Struct("<iI")
_STAMP_OFFSET = 4


@dataclass(frozen=True)
class Message:
    """One message of a bag. time: ns since the bag's start; data: as serialized, in CDR."""

    time: int
    topic: str
    data: bytes
    stamped: bool

    def with_stamp(self, now: int) -> bytes:
        """The same message with `now` (ns) as its header's stamp, if it has a header."""
        if not self.stamped:
            return self.data
        stamp = _STAMP.pack(*divmod(now, 1_000_000_000))
        end = _STAMP_OFFSET + len(stamp)
        return b"".join((self.data[:_STAMP_OFFSET], stamp, self.data[end:]))


@dataclass(frozen=True)
class Bag:
    """A bag in memory: messages in order of time, the length in ns, type and quality of service by topic."""

    messages: tuple[Message, ...]
    length: int
    types: dict[str, str]
    qos: dict[str, Qos | None]


def read_bag(path: Path) -> Bag:
    """Read a whole rosbag2 folder (mcap or sqlite3, compressed or not).

    Raises:
        ValueError: not a bag, or no message in it; the text says which.
    """
    messages: list[Message] = []
    types: dict[str, str] = {}
    qos: dict[str, Qos | None] = {}
    try:
        with Reader(path) as reader:
            start = reader.start_time
            for connection in reader.connections:
                types[connection.topic] = connection.msgtype
                ext = connection.ext
                offered = ext.offered_qos_profiles if isinstance(ext, ConnectionExtRosbag2) else []
                qos[connection.topic] = offered[0] if offered else None
            stamped = {topic: _starts_with_header(kind) for topic, kind in types.items()}
            for connection, stamp, data in reader.messages():
                topic = connection.topic
                messages.append(Message(stamp - start, topic, bytes(data), stamped[topic]))
    except (FileNotFoundError, ReaderError) as error:
        raise ValueError(f"{path}: not a readable bag: {error}") from error
    if not messages:
        raise ValueError(f"{path}: the bag has no messages")
    # The pause before starting again is the mean spacing of the busiest topic.
    counts = {topic: sum(m.topic == topic for m in messages) for topic in types}
    last = messages[-1].time
    return Bag(tuple(messages), last + last // max(1, max(counts.values()) - 1), types, qos)


def message_class(kind: str) -> Any:
    """The Python class of a type such as "sensor_msgs/msg/Image"."""
    package, _, name = kind.split("/")
    return getattr(import_module(f"{package}.msg"), name)


def play(bag: Bag, *, speed: float, wait: float, stop: threading.Event, once: Collection[str] = ()) -> int:
    """Publish the bag again and again until `stop` is set. Returns the count of messages sent.

    Starts when every topic has a listener, or after `wait` seconds. once: topics that only the first round has.
    """
    import rclpy

    keep_heap()
    context = rclpy.Context()
    rclpy.init(context=context, signal_handler_options=rclpy.signals.SignalHandlerOptions.NO)
    node = rclpy.create_node("bag_player", context=context)
    publishers = {
        topic: node.create_publisher(message_class(kind), topic, _ros_qos(bag.qos[topic]))
        for topic, kind in bag.types.items()
    }
    patience = time.monotonic() + wait
    while time.monotonic() < patience and not stop.wait(0.05):
        if all(publisher.get_subscription_count() for publisher in publishers.values()):
            break
    sent = 0
    origin = time.monotonic_ns()
    messages, repeated = bag.messages, tuple(m for m in bag.messages if m.topic not in once)
    while not stop.is_set() and messages:
        for message in messages:
            wait = origin + message.time / speed - time.monotonic_ns()
            if wait > 0 and stop.wait(wait / 1e9):
                break
            publishers[message.topic].publish(message.with_stamp(time.time_ns()))
            sent += 1
        origin += round(bag.length / speed)
        messages = repeated
    node.destroy_node()
    rclpy.shutdown(context=context)
    return sent


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="player", description="Play a bag with fresh stamps, in a loop.")
    parser.add_argument("bag", type=Path, help="folder of a rosbag2 recording")
    parser.add_argument("--speed", type=float, default=1.0, help="1 is as recorded")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for listeners on all topics")
    parser.add_argument(
        "--once", action="append", default=[], metavar="TOPIC", help="play it in the first round alone"
    )
    args = parser.parse_args(argv)
    if not args.speed > 0:
        parser.error(f"--speed is {args.speed}: expected above 0")
    stop = stop_on_signals()
    try:
        bag = read_bag(args.bag)
    except ValueError as error:
        print(f"player: {error}", file=sys.stderr)
        return 2
    sent = play(bag, speed=args.speed, wait=args.wait, stop=stop, once=args.once)
    print(f"player: {sent} messages sent")
    return 0


def _starts_with_header(kind: str) -> bool:
    fields: dict[str, str] = message_class(kind).get_fields_and_field_types()
    return next(iter(fields.values()), "") == "std_msgs/Header"


def _ros_qos(qos: Qos | None) -> Any:
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    profile = QoSProfile(depth=10)
    if qos is not None:
        profile.depth = qos.depth or 10
        profile.reliability = ReliabilityPolicy[qos.reliability.name]
        profile.durability = DurabilityPolicy[qos.durability.name]
    return profile


if __name__ == "__main__":
    sys.exit(main())
