"""Camera messages to uint8 (H, W, 3) RGB and back: raw 8-bit encodings, JPEG and PNG."""

from __future__ import annotations

import array
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .contract_parse import one_line
from .errors import ObservationError

Pixels = npt.NDArray[np.uint8]

# encoding -> (bytes per pixel, OpenCV conversion to RGB; None when it is RGB already)
_ENCODINGS: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
}
# No robot camera is larger; beyond it a header is wrong, and memory has to stay bounded.
MAX_SIDE = 16384
MAX_PIXELS = 32 << 20
MAX_BYTES = 4 * MAX_PIXELS


def _bytes(data: Any) -> Pixels:
    """A uint8 view of a data field; free for array.array, bytes and ndarray."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data, dtype=np.uint8).reshape(-1)
    return np.frombuffer(data, dtype=np.uint8)


def _check_size(height: int, width: int, what: str) -> None:
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and height * width <= MAX_PIXELS):
        raise ObservationError(
            f"{what} says {width}x{height} pixels; expected 1 to {MAX_SIDE} a side, {MAX_PIXELS} in all"
        )


def check_image(message: Any) -> None:
    """Check the header of a sensor_msgs/Image without touching a pixel. Raises ObservationError."""
    height, width, step = int(message.height), int(message.width), int(message.step)
    row = _ENCODINGS.get(message.encoding)
    if row is None:
        raise ObservationError(
            f"encoding {one_line(message.encoding, limit=42)} is not supported; expected {', '.join(_ENCODINGS)}"
        )
    _check_size(height, width, "the image")
    if int(message.is_bigendian) not in (0, 1):
        raise ObservationError(f"is_bigendian is {message.is_bigendian}; expected 0 or 1")
    if step < width * row[0]:
        raise ObservationError(
            f"step is {step} bytes, but {width} pixels of {message.encoding} take {width * row[0]}; "
            "mend the driver"
        )
    if len(message.data) != step * height:
        raise ObservationError(
            f"data has {len(message.data)} bytes; expected step x height = {step * height}"
        )
    if len(message.data) > MAX_BYTES:
        raise ObservationError(f"data has {len(message.data)} bytes; expected at most {MAX_BYTES}")


def decode_image(message: Any) -> Pixels:
    """sensor_msgs/Image to uint8 (H, W, 3) RGB, contiguous; rgb8 without padding is a view of the message.

    Padding at the end of each row (`step`) is dropped. Endianness has no meaning for 8-bit pixels.
    Raises ObservationError for any other encoding and for a size that does not fit the data.
    """
    check_image(message)
    height, width, step = int(message.height), int(message.width), int(message.step)
    channels, conversion = _ENCODINGS[message.encoding]
    pixels = (
        _bytes(message.data).reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    )
    if conversion is None:
        return np.ascontiguousarray(pixels)
    return np.asarray(cv2.cvtColor(pixels, conversion), dtype=np.uint8)  # reads rows that lie apart as well


def encode_image(pixels: Pixels, message: Any) -> Any:
    """Fill a sensor_msgs/Image with uint8 (H, W, 3) RGB pixels as rgb8."""
    message.height, message.width = pixels.shape[:2]
    message.encoding = "rgb8"
    message.step = 3 * pixels.shape[1]
    # array.array is the field's own type; an ndarray would be checked element by element.
    message.data = array.array("B", np.ascontiguousarray(pixels).tobytes())
    return message


def _jpeg_size(data: memoryview) -> tuple[int, int]:
    """(height, width) of the frame header (SOFn) of a JPEG stream, ITU-T T.81 B.2.2; (0, 0) if none."""
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0


def check_compressed(message: Any) -> None:
    """Check kind, size and end of a CompressedImage without decoding it. Raises ObservationError."""
    data = _bytes(message.data)
    if data.size > MAX_BYTES:
        raise ObservationError(f"data has {data.size} bytes; expected at most {MAX_BYTES}")
    head, tail = data[:26].tobytes(), data[-4096:].tobytes()
    if head.startswith(b"\xff\xd8\xff"):
        _check_size(*_jpeg_size(data[: 1 << 18].data), "the JPEG header")
        # libjpeg fills what is missing with grey and goes on, so a cut stream has to be seen here.
        if not tail.rstrip(b"\0").endswith(b"\xff\xd9"):
            raise ObservationError(
                f"the JPEG stream of {data.size} bytes has no end marker: it was cut short"
            )
    elif head.startswith(b"\x89PNG\r\n\x1a\n"):
        if len(head) < 26 or head[24] != 8:
            raise ObservationError("the PNG is not of 8 bits per channel; depth images are not supported")
        _check_size(int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big"), "the PNG header")
        if not tail.rstrip(b"\0").endswith(b"IEND\xaeB`\x82"):  # with its checksum, which never changes
            raise ObservationError(f"the PNG stream of {data.size} bytes has no end: it was cut short")
    else:
        raise ObservationError(
            f"format {one_line(message.format, limit=42)} with data that is neither JPEG nor PNG is not supported"
        )


def decode_compressed(message: Any) -> Pixels:
    """sensor_msgs/CompressedImage (JPEG or PNG, by its content) to uint8 (H, W, 3) RGB.

    Raises ObservationError for other formats, 16-bit PNG, and streams that are cut or corrupt.
    """
    check_compressed(message)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(_bytes(message.data), flags)
    except cv2.error as error:
        raise ObservationError(f"the compressed image cannot be decoded ({error.code})") from error
    if pixels is None:
        raise ObservationError(
            f"the compressed image of {len(message.data)} bytes is corrupt and cannot be decoded"
        )
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def encode_compressed(pixels: Pixels, message: Any, *, png: bool = False) -> Any:
    """Fill a sensor_msgs/CompressedImage with uint8 (H, W, 3) RGB pixels as JPEG, or PNG (lossless)."""
    message.format = "png" if png else "jpeg"
    done, stream = cv2.imencode(f".{message.format}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    if not done:
        raise ObservationError(f"an image of shape {pixels.shape} cannot be encoded as {message.format}")
    message.data = array.array("B", stream.tobytes())
    return message
