"""Writes the scene as a rosbag2 recording: two cameras, joint states and the instruction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vla_infer.demo import scene

CAMERA_RATE, JOINT_RATE = 30, 100  # Hz
START = 1_700_000_000_000_000_000  # ns, stamp of the first message: the same bag every time

TOPICS = {
    "/top/image_raw": "sensor_msgs/msg/Image",
    "/wrist/image_raw": "sensor_msgs/msg/Image",
    "/joint_states": "sensor_msgs/msg/JointState",
    "/instruction": "std_msgs/msg/String",
}
_STORE = get_typestore(Stores.ROS2_JAZZY)
_TYPE = _STORE.types


def write_bag(path: Path, *, seconds: float = scene.PERIOD, width: int = 640, height: int = 480) -> None:
    """Write `seconds` of the scene to the folder `path` (must not exist): mcap, each message by zstd.

    Raises:
        rosbags.rosbag2.WriterError: `path` exists.
    """
    writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
    writer.set_compression(CompressionMode.MESSAGE, CompressionFormat.ZSTD)
    with writer:
        connections = {
            topic: writer.add_connection(
                topic, kind, typestore=_STORE, offered_qos_profiles=[_qos(best_effort="image" in topic)]
            )
            for topic, kind in TOPICS.items()
        }
        for time, topic, message in sorted(_messages(seconds, width, height), key=lambda item: item[0]):
            stamp = START + time
            writer.write(connections[topic], stamp, _STORE.serialize_cdr(message, TOPICS[topic]))


def _messages(seconds: float, width: int, height: int) -> Iterator[tuple[int, str, Any]]:
    """(ns since the start, topic, message) of one recording."""
    yield 0, "/instruction", _TYPE["std_msgs/msg/String"](scene.INSTRUCTION)
    for k in range(math.floor(seconds * JOINT_RATE)):
        time = k * 1_000_000_000 // JOINT_RATE
        joints = np.array(scene.pose_at(time / 1e9).joints)
        empty = np.empty(0)
        yield (
            time,
            "/joint_states",
            _TYPE["sensor_msgs/msg/JointState"](
                _header(time, "base_link"), list(scene.JOINTS), joints, empty, empty
            ),
        )
    cameras = (("top", scene.render_top, 0), ("wrist", scene.render_wrist, 4_000_000))
    for k in range(math.floor(seconds * CAMERA_RATE)):
        for name, render, lag in cameras:  # real cameras are not in step either
            time = k * 1_000_000_000 // CAMERA_RATE + lag
            image = render(time / 1e9, width, height)
            yield (
                time,
                f"/{name}/image_raw",
                _TYPE["sensor_msgs/msg/Image"](
                    _header(time, f"{name}_optical_frame"),
                    height,
                    width,
                    "rgb8",
                    0,
                    width * 3,
                    image.reshape(-1),
                ),
            )


def _header(time: int, frame: str) -> Any:
    seconds, nanoseconds = divmod(START + time, 1_000_000_000)
    return _TYPE["std_msgs/msg/Header"](_TYPE["builtin_interfaces/msg/Time"](seconds, nanoseconds), frame)


def _qos(*, best_effort: bool) -> Qos:
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=5,
        reliability=QosReliability.BEST_EFFORT if best_effort else QosReliability.RELIABLE,
        durability=QosDurability.VOLATILE,
        deadline=QosTime(2147483647, 4294967295),
        lifespan=QosTime(2147483647, 4294967295),
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=QosTime(2147483647, 4294967295),
        avoid_ros_namespace_conventions=False,
    )
