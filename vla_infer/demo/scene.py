"""A table-top scene seen by two cameras: an arm carries a red cube to a box and back, for ever.

Everything is a pure function of time with period `PERIOD`, so a recording of one period loops without a seam.
Lengths are metres in the base frame (x forward, y left, z up), angles radians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (height, width, 3), RGB
Points = NDArray[np.float64]  # (n, 2)

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
PERIOD = 8.0  # s
INSTRUCTION = "pick up the red cube and place it in the box"

UPPER, LOWER = 0.116, 0.135  # m, lengths of the two links
SHOULDER_HEIGHT, TOOL = 0.12, 0.10  # m; TOOL is from the wrist down to the finger tips
OPEN, CLOSED = 1.2, 0.25  # rad, gripper
CUBE = 0.03  # m, edge
PICK, PLACE = (0.21, 0.09), (0.17, -0.10)

# Seconds; x, y, z of the finger tips; gripper. To the cube, to the box, and the same way back.
_PATH = (
    (0.0, 0.19, 0.00, 0.10, OPEN),
    (0.9, *PICK, 0.07, OPEN),
    (1.4, *PICK, 0.015, OPEN),
    (1.9, *PICK, 0.015, CLOSED),
    (2.3, *PICK, 0.08, CLOSED),
    (3.1, *PLACE, 0.08, CLOSED),
    (3.5, *PLACE, 0.03, CLOSED),
    (4.0, *PLACE, 0.03, OPEN),
    (4.4, *PLACE, 0.07, OPEN),
    (4.8, *PLACE, 0.03, OPEN),
    (5.3, *PLACE, 0.03, CLOSED),
    (5.7, *PLACE, 0.08, CLOSED),
    (6.4, *PICK, 0.07, CLOSED),
    (6.7, *PICK, 0.015, CLOSED),
    (7.2, *PICK, 0.015, OPEN),
    (8.0, 0.19, 0.00, 0.10, OPEN),
)
_HELD = ((1.9, 3.5), (5.3, 6.7))  # s, while the cube moves with the gripper

_TABLE, _LINE = (214, 200, 178), (196, 181, 158)
_RED, _BLUE, _GREEN, _BOX = (204, 44, 40), (44, 84, 190), (60, 150, 80), (120, 84, 52)
_LINK, _JOINT, _FINGER = (236, 166, 44), (60, 60, 66), (48, 48, 54)
_OTHERS = (((0.25, -0.02), 0.5, _BLUE), ((0.13, 0.13), 0.2, _GREEN))  # position, yaw, colour


@dataclass(frozen=True)
class Pose:
    """The scene at one time: finger tips (m), gripper (rad), cube centre (m), joint positions (6,) in rad."""

    tool: tuple[float, float, float]
    gripper: float
    cube: tuple[float, float, float]
    joints: tuple[float, ...]


def pose_at(time: float) -> Pose:
    """The scene `time` seconds into the period (any real number)."""
    t = time % PERIOD
    x, y, z, gripper = _waypoint(t)
    if any(start <= t < end for start, end in _HELD):
        cube = (x, y, z)
    elif _HELD[0][1] <= t < _HELD[1][0]:
        cube = (*PLACE, 0.03)
    else:
        cube = (*PICK, 0.015)
    return Pose((x, y, z), gripper, cube, _inverse_kinematics(x, y, z, gripper))


def render_top(time: float, width: int = 640, height: int = 480) -> Image:
    """The overhead camera, (height, width, 3) RGB."""
    pose = pose_at(time)
    canvas = _Canvas(width, height, scale=height / 0.36, origin=(width / 2, height * 0.94))
    canvas.table()
    _draw_objects(canvas, pose)
    pan = pose.joints[0]
    reach, lift = math.hypot(pose.tool[0], pose.tool[1]), pose.joints[1]
    elbow = UPPER * math.sin(lift)
    along = np.array([math.cos(pan), math.sin(pan)])
    base = np.zeros(2)
    canvas.disc(base, 0.036, _JOINT)
    canvas.line(base, along * elbow, 0.034, _LINK)
    canvas.line(along * elbow, along * reach, 0.024, _LINK)
    canvas.disc(along * elbow, 0.019, _JOINT)
    canvas.disc(along * reach, 0.016, _JOINT)
    _draw_fingers(canvas, np.array(pose.tool[:2]), pan, pose.gripper)
    return canvas.image


def render_wrist(time: float, width: int = 640, height: int = 480) -> Image:
    """The camera on the gripper, looking down between the fingers, (height, width, 3) RGB."""
    pose = pose_at(time)
    x, y, z = pose.tool
    camera_height = z + 0.09
    canvas = _Canvas(
        width,
        height,
        scale=0.8 * height / camera_height,
        origin=(width / 2, height * 0.55),
        centre=(x, y),
        yaw=pose.joints[0],
    )
    canvas.table()
    _draw_objects(canvas, pose)
    fingers = _Canvas(width, height, scale=height / 0.16, origin=(width / 2, height * 0.55))
    fingers.image = canvas.image
    _draw_fingers(fingers, np.zeros(2), 0.0, pose.gripper)
    return canvas.image


def _waypoint(t: float) -> tuple[float, float, float, float]:
    for (start, *a), (end, *b) in pairwise(_PATH):
        if start <= t <= end:
            s = (t - start) / (end - start)
            s = s * s * s * (10 - 15 * s + 6 * s * s)  # minimum jerk
            x, y, z, gripper = (u + (v - u) * s for u, v in zip(a, b, strict=True))
            return x, y, z, gripper
    raise AssertionError(f"no waypoint at {t} s of {PERIOD} s")


def _inverse_kinematics(x: float, y: float, z: float, gripper: float) -> tuple[float, ...]:
    """Joint positions that hold the tool at (x, y, z), pointing straight down.

    Shoulder lift is 0 with the upper arm upright, elbow flex 0 with the lower arm at a right angle to it,
    wrist flex 0 with the tool in line with the lower arm.
    """
    reach, rise = math.hypot(x, y), z + TOOL - SHOULDER_HEIGHT
    span = math.hypot(reach, rise)
    elbow = math.acos((UPPER**2 + LOWER**2 - span**2) / (2 * UPPER * LOWER))  # between the two links
    shoulder = math.acos((UPPER**2 + span**2 - LOWER**2) / (2 * UPPER * span))  # from the upper link to span
    lift = math.pi / 2 - math.atan2(rise, reach) - shoulder
    return (math.atan2(y, x), lift, math.pi / 2 - elbow, elbow - lift, 0.0, gripper)


class _Canvas:
    """An image of the table plane: metres to pixels by scale, a centre and a yaw.

    Edges are not smoothed: smooth ones would double the bytes of a recording.
    """

    def __init__(
        self,
        width: int,
        height: int,
        *,
        scale: float,
        origin: tuple[float, float],
        centre: tuple[float, float] = (0.0, 0.0),
        yaw: float = 0.0,
    ) -> None:
        self.image: Image = np.empty((height, width, 3), np.uint8)
        self._scale, self._origin, self._centre, self._yaw = scale, origin, centre, yaw

    def table(self) -> None:
        self.image[:] = _TABLE
        for k in range(-7, 12):
            self.line(np.array([-0.5, k * 0.08]), np.array([1.0, k * 0.08]), 0.003, _LINE)
            self.line(np.array([k * 0.08, -0.6]), np.array([k * 0.08, 0.9]), 0.003, _LINE)

    def polygon(self, points: Points, colour: tuple[int, int, int]) -> None:
        cv2.fillPoly(self.image, [self._pixels(points)], colour, cv2.LINE_8, _SHIFT)

    def line(self, a: Points, b: Points, thickness: float, colour: tuple[int, int, int]) -> None:
        start, end = self._pixels(np.stack([a, b])).tolist()
        width = max(1, round(thickness * self._scale))
        cv2.line(self.image, start, end, colour, width, cv2.LINE_8, _SHIFT)

    def disc(self, centre: Points, radius: float, colour: tuple[int, int, int]) -> None:
        ((x, y),) = self._pixels(centre[None]).tolist()
        cv2.circle(
            self.image, (x, y), round(radius * self._scale * 2**_SHIFT), colour, -1, cv2.LINE_8, _SHIFT
        )

    def _pixels(self, points: Points) -> NDArray[np.int32]:
        """(n, 2) metres to (n, 2) fixed-point pixels: forward is up in the image, left is left."""
        c, s = math.cos(self._yaw), math.sin(self._yaw)
        forward, left = ((points - self._centre) @ np.array([[c, -s], [s, c]])).T
        column = self._origin[0] - left * self._scale
        row = self._origin[1] - forward * self._scale
        pixels: NDArray[np.int32] = np.round(np.stack([column, row], axis=1) * 2**_SHIFT).astype(np.int32)
        return pixels


_SHIFT = 4  # fractional bits of OpenCV's coordinates: slow motion stays smooth


def _square(centre: tuple[float, float], edge: float, yaw: float) -> Points:
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * edge / 2
    c, s = math.cos(yaw), math.sin(yaw)
    turned: Points = corners @ np.array([[c, s], [-s, c]]) + np.array(centre)
    return turned


def _draw_objects(canvas: _Canvas, pose: Pose) -> None:
    canvas.polygon(_square(PLACE, 0.085, 0.0), _BOX)
    canvas.polygon(_square(PLACE, 0.07, 0.0), (160, 120, 84))
    for position, yaw, colour in _OTHERS:
        canvas.polygon(_square(position, CUBE, yaw), colour)
    x, y, z = pose.cube
    lifted = z - CUBE / 2
    shadow = (x - 0.3 * lifted, y - 0.3 * lifted)
    canvas.polygon(_square(shadow, CUBE, pose.joints[0]), (150, 138, 120))
    canvas.polygon(_square((x, y), CUBE * (1 + 2 * lifted), pose.joints[0]), _RED)


def _draw_fingers(canvas: _Canvas, tip: Points, yaw: float, gripper: float) -> None:
    half = CUBE / 2 + 0.004 + 0.02 * (gripper - CLOSED) / (OPEN - CLOSED)  # m, from the middle to a finger
    across = np.array([-math.sin(yaw), math.cos(yaw)])
    along = np.array([math.cos(yaw), math.sin(yaw)])
    for side in (-half, half):
        canvas.line(tip + across * side - along * 0.02, tip + across * side + along * 0.012, 0.008, _FINGER)
