"""Codecs on real messages: encodings to the same pixels, faults to one line, commands there and back."""

from __future__ import annotations

import array
import contextlib
from typing import Any

import cv2
import numpy as np
import pytest

from vla_infer.codecs import CODECS, COMMAND_CODECS, JointSample, Setpoint, message_class, stamp_ns
from vla_infer.codecs_image import check_compressed, check_image, encode_compressed
from vla_infer.errors import ObservationError

pytest.importorskip("sensor_msgs", reason="needs ROS 2 messages (sensor_msgs)")

RAW, JPEG = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., :1]
ALPHA = np.full((5, 7, 1), 9, dtype=np.uint8)
LAYOUTS = {
    "rgb8": RGB,
    "bgr8": RGB[..., ::-1],
    "rgba8": np.concatenate([RGB, ALPHA], axis=2),
    "bgra8": np.concatenate([RGB[..., ::-1], ALPHA], axis=2),
    "mono8": GREY,
}


def image(encoding: str, pixels: np.ndarray, *, padding: int = 0) -> Any:
    rows = pixels.reshape(pixels.shape[0], -1)
    rows = np.concatenate([rows, np.full((len(rows), padding), 255, dtype=np.uint8)], axis=1)
    message = message_class(RAW)(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding)
    message.step = rows.shape[1]
    message.data = array.array("B", rows.tobytes())
    return message


def compressed(data: bytes, format_: str = "jpeg") -> Any:
    return message_class(JPEG)(format=format_, data=array.array("B", data))


@pytest.mark.parametrize("padding", [0, 1, 13])
@pytest.mark.parametrize("encoding", LAYOUTS)
def test_raw_encodings_become_the_same_rgb(encoding: str, padding: int) -> None:
    decoded = CODECS[RAW].decode(image(encoding, LAYOUTS[encoding], padding=padding))
    expected = np.repeat(GREY, 3, axis=2) if encoding == "mono8" else RGB
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, expected)


def test_unpadded_rgb8_is_not_copied() -> None:
    message = image("rgb8", RGB)
    assert np.shares_memory(CODECS[RAW].decode(message), np.frombuffer(message.data, dtype=np.uint8))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"encoding": "16UC1"}, "encoding '16UC1' is not supported; expected rgb8, bgr8"),
        ({"encoding": ""}, "encoding '' is not supported"),
        ({"encoding": "x" * 9999}, "is not supported"),
        ({"step": 20}, "step is 20 bytes, but 7 pixels of rgb8 take 21"),
        ({"step": 22}, "data has 105 bytes; expected step x height = 110"),
        ({"data": array.array("B", b"1234")}, "data has 4 bytes"),
        ({"data": array.array("B")}, "data has 0 bytes"),
        ({"height": 0}, "7x0 pixels"),
        ({"width": 0}, "0x5 pixels"),
        ({"height": 2**32 - 1, "step": 2**32 - 1}, "pixels"),
        ({"is_bigendian": 7}, "is_bigendian is 7"),
    ],
)
def test_wrong_images_are_one_line(change: dict[str, Any], expected: str) -> None:
    message = image("rgb8", RGB)
    for field, value in change.items():
        setattr(message, field, value)
    with pytest.raises(ObservationError) as caught:
        CODECS[RAW].decode(message)
    with pytest.raises(ObservationError):
        check_image(message)  # the callback refuses what the decoder would
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    row, column = np.mgrid[0:height, 0:width]
    return np.stack([row * 5, column * 3, (row + column) * 2], axis=2).astype(np.uint8)


def test_png_is_exact_and_jpeg_close() -> None:
    pixels = smooth()
    png = encode_compressed(pixels, message_class(JPEG)(), png=True)
    np.testing.assert_array_equal(CODECS[JPEG].decode(png), pixels)
    jpeg = CODECS[JPEG].encode(pixels, 0, "cam")
    assert np.abs(CODECS[JPEG].decode(jpeg).astype(int) - pixels).mean() < 3  # swapped channels give above 30


def test_every_truncation_of_a_stream_is_refused() -> None:
    for png in (False, True):
        data = bytes(encode_compressed(smooth(), message_class(JPEG)(), png=png).data)
        for end in range(0, len(data) - 1, 7):
            with pytest.raises(ObservationError):
                CODECS[JPEG].decode(compressed(data[:end]))
            with pytest.raises(ObservationError):  # by ourselves: not every OpenCV minds
                check_compressed(compressed(data[:end]))
    jpeg = bytes(encode_compressed(smooth(), message_class(JPEG)()).data)
    CODECS[JPEG].decode(compressed(jpeg + b"\0" * 100))  # padding that some cameras add


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "neither JPEG nor PNG"),
        (b"BM" + b"\0" * 100, "neither JPEG nor PNG"),
        (b"\xff\xd8\xff\xd9", "JPEG header says 0x0"),
        (b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03" + b"\0" * 20 + b"\xff\xd9", "65535x65535"),
        (b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x40\x00\x40\x03" + b"\0" * 20 + b"\xff\xd9", "corrupt"),
    ],
)
def test_wrong_streams_are_one_line(data: bytes, expected: str) -> None:
    with pytest.raises(ObservationError, match=expected) as caught:
        CODECS[JPEG].decode(compressed(data))
    assert "\n" not in str(caught.value)


def test_depth_png_is_refused() -> None:
    data = cv2.imencode(".png", np.full((4, 4), 1000, dtype=np.uint16))[1].tobytes()
    with pytest.raises(ObservationError, match="8 bits"):
        check_compressed(compressed(data, "16UC1; compressedDepth"))


def test_random_bytes_never_raise_anything_else() -> None:
    good = bytes(encode_compressed(smooth(), message_class(JPEG)()).data)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        data = bytearray(good)
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(0, 256)
        with contextlib.suppress(ObservationError):
            assert CODECS[JPEG].decode(compressed(bytes(data))).dtype == np.uint8


def test_joint_state() -> None:
    sample = JointSample(("a", "b"), np.array([1.0, 2.0]), None, np.array([3.0, 4.0]))
    message = CODECS["sensor_msgs/msg/JointState"].encode(sample, 1_500_000_000, "base")
    assert stamp_ns(message) == 1_500_000_000
    assert message.header.frame_id == "base"
    back = CODECS["sensor_msgs/msg/JointState"].decode(message)
    assert back.names == ("a", "b")
    assert back.velocity is None
    np.testing.assert_array_equal(back.effort, [3.0, 4.0])
    message.position = [1.0]
    with pytest.raises(ObservationError, match="2 names and 1 numbers in position"):
        CODECS["sensor_msgs/msg/JointState"].decode(message)
    message.name = ["a", "a"]
    with pytest.raises(ObservationError, match="'a' is named twice"):
        CODECS["sensor_msgs/msg/JointState"].decode(message)


@pytest.mark.parametrize("type_name", COMMAND_CODECS)
def test_commands_round_trip(type_name: str) -> None:
    twist = "Twist" in type_name
    names = ("linear.x", "angular.z") if twist else ("a", "b")
    interface = "velocity" if twist else "position"
    setpoint = Setpoint(names, interface, np.array([[0.25, -1.5]]), np.array([0.02]))
    codec = COMMAND_CODECS[type_name]
    message = codec.encode(setpoint, 12_000_000_034, "base")
    assert type(message) is message_class(type_name)
    back = codec.decode(message)
    got = dict(zip(back.names or names, back.values[0], strict=False))
    assert [got[name] for name in names] == [0.25, -1.5]
    assert all(value == 0.0 for name, value in got.items() if name not in names)
    if type_name.endswith(("TwistStamped", "JointState")):
        assert stamp_ns(message) == 12_000_000_034


def test_trajectory_carries_a_whole_chunk() -> None:
    values = np.arange(8.0).reshape(4, 2)
    times = np.array([0.02, 0.5, 1.0, 2.999999999])
    codec = COMMAND_CODECS["trajectory_msgs/msg/JointTrajectory"]
    message = codec.encode(Setpoint(("a", "b"), "position", values, times), 5, "")
    assert len(message.points) == 4
    assert message.points[3].time_from_start.nanosec == 999999999
    assert stamp_ns(message) == 0  # start at receipt: no clock of another machine decides
    back = codec.decode(message)
    np.testing.assert_array_equal(back.values, values)
    np.testing.assert_allclose(back.times, times, atol=1e-9)


def test_joint_state_command_fills_its_interface_alone() -> None:
    codec = COMMAND_CODECS["sensor_msgs/msg/JointState"]
    message = codec.encode(Setpoint(("a",), "effort", np.array([[2.0]]), np.zeros(1)), 5, "")
    assert list(message.effort) == [2.0]
    assert not len(message.position)
    assert not len(message.velocity)
    assert codec.decode(message).interface == "effort"


def test_invalid_stamp_is_refused() -> None:
    message = message_class(RAW)()
    message.header.stamp.sec = -1
    with pytest.raises(ObservationError, match=r"header\.stamp is -1 s"):
        stamp_ns(message)
