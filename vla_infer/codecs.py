"""One (decode, encode) pair per ROS message type, in one table: `CODECS`.

Decoders are duck-typed: they read a message's fields, so what rclpy delivers and what a bag reader
deserialises are treated alike. Message classes are imported only when something is encoded.
Everything a decoder cannot vouch for is an ObservationError on one line.
"""

from __future__ import annotations

import array
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .codecs_image import decode_compressed, decode_image, encode_compressed, encode_image
from .contract_parse import one_line
from .errors import ObservationError

FloatArray = npt.NDArray[np.float64]
_AXES = ("linear.x", "linear.y", "linear.z", "angular.x", "angular.y", "angular.z")


@dataclass(frozen=True)
class JointSample:
    """A JointState as it came: a field the message leaves empty is None, else float64 (joints,)."""

    names: tuple[str, ...]
    position: FloatArray | None
    velocity: FloatArray | None
    effort: FloatArray | None


@dataclass(frozen=True)
class Setpoint:
    """What one command topic is to carry, in ROS units.

    values: float64 (T, joints), T = 1 except for a whole chunk; times: float64 (T,), seconds from
    now at which each row is due; interface: position, velocity or effort.
    """

    names: tuple[str, ...]
    interface: str
    values: FloatArray
    times: FloatArray


@dataclass(frozen=True)
class Codec:
    """decode(message) -> value and encode(value, stamp_ns, frame_id) -> message, inverse of each other."""

    decode: Callable[[Any], Any]
    encode: Callable[[Any, int, str], Any]


def message_class(type_name: str) -> Any:
    """The Python class of a message type such as sensor_msgs/msg/Image (needs ROS 2)."""
    package, kind, name = type_name.split("/")
    return getattr(importlib.import_module(f"{package}.{kind}"), name)


def stamp_ns(message: Any) -> int:
    """header.stamp of a message in nanoseconds. Raises ObservationError where it is not a valid time."""
    stamp = message.header.stamp
    if not 0 <= int(stamp.nanosec) < 1_000_000_000 or int(stamp.sec) < 0:
        raise ObservationError(
            f"header.stamp is {stamp.sec} s {stamp.nanosec} ns, which is no time; mend the driver"
        )
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def _set_stamp(header: Any, stamp: int, frame_id: str) -> None:
    header.stamp.sec, header.stamp.nanosec = divmod(stamp, 1_000_000_000)
    header.frame_id = frame_id


def _doubles(values: FloatArray) -> array.array[float]:
    """A float64[] field's own type: assigning it skips rclpy's check of each element."""
    return array.array("d", np.ascontiguousarray(values, dtype=np.float64).tobytes())


def _decode_text(message: Any) -> str:
    return str(message.data)


def _encode_text(value: str, stamp: int, frame_id: str) -> Any:
    return message_class("std_msgs/msg/String")(data=value)


def _decode_joint_state(message: Any) -> JointSample:
    names = tuple(message.name)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ObservationError(
            f"joint {one_line(twice)} is named twice in one JointState; its publisher is at fault"
        )
    fields: list[FloatArray | None] = []
    for field in ("position", "velocity", "effort"):
        values = np.array(getattr(message, field), dtype=np.float64)
        if values.size not in (0, len(names)):
            raise ObservationError(f"JointState has {len(names)} names and {values.size} numbers in {field}")
        fields.append(values if values.size else None)
    return JointSample(names, *fields)


def _encode_joint_sample(value: JointSample, stamp: int, frame_id: str) -> Any:
    message = message_class("sensor_msgs/msg/JointState")(name=list(value.names))
    _set_stamp(message.header, stamp, frame_id)
    for field in ("position", "velocity", "effort"):
        numbers = getattr(value, field)
        if numbers is not None:
            setattr(message, field, _doubles(numbers))
    return message


def _encode_joint_command(value: Setpoint, stamp: int, frame_id: str) -> Any:
    sample = JointSample(value.names, None, None, None)
    message = _encode_joint_sample(sample, stamp, frame_id)
    setattr(message, value.interface, _doubles(value.values[0]))
    return message


def _decode_joint_command(message: Any) -> Setpoint:
    sample = _decode_joint_state(message)
    for interface in ("position", "velocity", "effort"):
        numbers = getattr(sample, interface)
        if numbers is not None:
            return Setpoint(sample.names, interface, numbers[None], np.zeros(1))
    raise ObservationError("JointState command carries neither position, velocity nor effort")


def _decode_multi_array(message: Any) -> Setpoint:
    """The message has no names and no interface of its own: the contract knows them."""
    return Setpoint((), "", np.array(message.data, dtype=np.float64)[None], np.zeros(1))


def _encode_multi_array(value: Setpoint, stamp: int, frame_id: str) -> Any:
    return message_class("std_msgs/msg/Float64MultiArray")(data=_doubles(value.values[0]))


def _decode_trajectory(message: Any) -> Setpoint:
    names = tuple(message.joint_names)
    if any(len(point.positions) != len(names) for point in message.points) or not message.points:
        raise ObservationError(
            f"JointTrajectory needs points of {len(names)} positions each, as it has names"
        )
    values = np.array([point.positions for point in message.points], dtype=np.float64)
    due = [point.time_from_start.sec + point.time_from_start.nanosec * 1e-9 for point in message.points]
    return Setpoint(names, "position", values, np.array(due))


def _encode_trajectory(value: Setpoint, stamp: int, frame_id: str) -> Any:
    """The header's stamp stays zero, which a trajectory controller takes as: start at receipt."""
    message = message_class("trajectory_msgs/msg/JointTrajectory")(joint_names=list(value.names))
    message.header.frame_id = frame_id
    point_class = message_class("trajectory_msgs/msg/JointTrajectoryPoint")
    for row, due in zip(value.values, value.times, strict=False):
        point = point_class(positions=_doubles(row))
        seconds, nanoseconds = divmod(round(float(due) * 1e9), 1_000_000_000)
        point.time_from_start.sec, point.time_from_start.nanosec = seconds, nanoseconds
        message.points.append(point)
    return message


def _decode_twist(message: Any) -> Setpoint:
    values = [getattr(getattr(message, axis.split(".")[0]), axis.split(".")[1]) for axis in _AXES]
    return Setpoint(_AXES, "velocity", np.array([values], dtype=np.float64), np.zeros(1))


def _fill_twist(twist: Any, value: Setpoint) -> None:
    for axis, number in zip(value.names, value.values[0], strict=False):
        vector, _, component = axis.partition(".")
        setattr(getattr(twist, vector), component, float(number))


def _encode_twist(value: Setpoint, stamp: int, frame_id: str) -> Any:
    message = message_class("geometry_msgs/msg/Twist")()
    _fill_twist(message, value)
    return message


def _encode_twist_stamped(value: Setpoint, stamp: int, frame_id: str) -> Any:
    message = message_class("geometry_msgs/msg/TwistStamped")()
    _set_stamp(message.header, stamp, frame_id)
    _fill_twist(message.twist, value)
    return message


def _image_message(pixels: npt.NDArray[np.uint8], stamp: int, frame_id: str) -> Any:
    message = message_class("sensor_msgs/msg/Image")()
    _set_stamp(message.header, stamp, frame_id)
    return encode_image(pixels, message)


def _compressed_message(pixels: npt.NDArray[np.uint8], stamp: int, frame_id: str) -> Any:
    message = message_class("sensor_msgs/msg/CompressedImage")()
    _set_stamp(message.header, stamp, frame_id)
    return encode_compressed(pixels, message)


# A JointState is an observation for the state and a Setpoint as a command, hence its two rows.
CODECS: dict[str, Codec] = {
    "sensor_msgs/msg/Image": Codec(decode_image, _image_message),
    "sensor_msgs/msg/CompressedImage": Codec(decode_compressed, _compressed_message),
    "sensor_msgs/msg/JointState": Codec(_decode_joint_state, _encode_joint_sample),
    "std_msgs/msg/String": Codec(_decode_text, _encode_text),
}
COMMAND_CODECS: dict[str, Codec] = {
    "std_msgs/msg/Float64MultiArray": Codec(_decode_multi_array, _encode_multi_array),
    "trajectory_msgs/msg/JointTrajectory": Codec(_decode_trajectory, _encode_trajectory),
    "sensor_msgs/msg/JointState": Codec(_decode_joint_command, _encode_joint_command),
    "geometry_msgs/msg/TwistStamped": Codec(
        lambda message: _decode_twist(message.twist), _encode_twist_stamped
    ),
    "geometry_msgs/msg/Twist": Codec(_decode_twist, _encode_twist),
}
