"""Camera messages to small JPEG streams for a browser."""

from __future__ import annotations

from typing import Any

import cv2

from ..codecs import CODECS
from ..codecs_image import check_compressed
from ..errors import ObservationError

QUALITY = 80
PASSED_ON = 96 << 10  # bytes of a JPEG stream up to which it goes to the browser as the camera sent it


def picture(message: Any, kind: str, *, width: int) -> bytes:
    """A JPEG stream of a camera message of type `kind`, at most about `width` pixels wide.

    It is made smaller by whole numbers only: averaging 2 × 2 pixels is cheap, a factor of 4 to 3 costs more than
    the encoding. Raises ObservationError for what is no image.
    """
    if kind == "sensor_msgs/msg/CompressedImage":
        check_compressed(message)
        data = bytes(message.data)
        if data.startswith(b"\xff\xd8\xff") and len(data) <= PASSED_ON:
            return data
    pixels = CODECS[kind].decode(message)
    factor = -(-pixels.shape[1] // width)
    if factor > 1:
        size = max(1, pixels.shape[1] // factor), max(1, pixels.shape[0] // factor)
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    done, stream = cv2.imencode(
        ".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )
    if not done:
        raise ObservationError(f"an image of {pixels.shape[1]}x{pixels.shape[0]} cannot be encoded as JPEG")
    return bytes(stream)
