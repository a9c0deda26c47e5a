"""The observation buffer: what belongs together, what is too old, what is refused, each frame once."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_infer.codecs import JointSample
from vla_infer.contract import Contract, parse_contract
from vla_infer.errors import ObservationError
from vla_infer.frame import FrameBuffer, Now, state_vector

TOP, WRIST = "observation.images.top", "observation.images.wrist"
SO101 = yaml.safe_load((Path(__file__).resolve().parent.parent / "config" / "so101.yaml").read_text())
JOINTS = tuple(SO101["state"]["joints"])
EPOCH = 1_700_000_000  # s; ROS time and the steady clock do not share their zero


def contract(**changes: Any) -> Contract:
    return parse_contract({**copy.deepcopy(SO101), "max_observation_age": 0.1, **changes}, file="f")


def at(seconds: float) -> Now:
    return Now(seconds, round((EPOCH + seconds) * 1e9))


def picture(value: int, **fields: Any) -> Any:
    pixels = np.full((2, 3, 3), value, dtype=np.uint8)
    message = {
        "height": 2,
        "width": 3,
        "encoding": "rgb8",
        "is_bigendian": 0,
        "step": 9,
        "data": pixels.tobytes(),
    }
    return SimpleNamespace(**{**message, **fields})


def joints(value: float = 0.0, **fields: Any) -> JointSample:
    sample = {"names": JOINTS, "position": np.full(6, value), "velocity": None, "effort": None}
    return JointSample(**{**sample, **fields})


class Robot:
    """Feeds a buffer; the stamp is the time of the call unless `stamp` (s) is given."""

    def __init__(self, **changes: Any) -> None:
        self.buffer = FrameBuffer(contract(**changes))

    def image(self, feature: str, now: float, *, value: int = 0, stamp: float | None = None) -> None:
        self.buffer.add_image(feature, picture(value), at(now if stamp is None else stamp).ros, at(now))

    def state(self, now: float, value: float = 0.0, *, stamp: float | None = None) -> None:
        self.buffer.add_state(0, joints(value), at(now if stamp is None else stamp).ros, at(now))

    def all(self, now: float, *, value: int = 0) -> None:
        self.image(TOP, now, value=value)
        self.image(WRIST, now, value=value)
        self.state(now, value=float(value))


def test_a_frame_is_what_came_last_and_is_given_once() -> None:
    robot = Robot()
    robot.all(1.0, value=3)
    robot.all(1.033, value=4)
    frame = robot.buffer.take(at(1.04))
    assert frame is not None
    assert set(frame.images) == {TOP, WRIST}
    assert frame.images[TOP].shape == (2, 3, 3)
    assert frame.images[TOP][0, 0, 0] == 4
    assert frame.state.dtype == np.float32
    np.testing.assert_allclose(frame.state[0], np.degrees(4.0), rtol=1e-6)
    assert frame.stamp == at(1.033).ros
    assert frame.observed_at == pytest.approx(1.033, abs=1e-6)
    assert robot.buffer.dropped == 2  # the first image of either camera
    assert robot.buffer.take(at(1.05)) is None
    assert robot.buffer.readiness(at(1.05)).ready  # nothing new, but nothing wrong
    robot.image(TOP, 1.06)
    assert robot.buffer.take(at(1.065)) is None  # its partner is still to come
    robot.image(WRIST, 1.062)
    assert robot.buffer.take(at(1.07)) is not None
    assert robot.buffer.take(at(1.07)) is None


def test_each_topic_is_needed_and_named() -> None:
    robot = Robot()
    for feed, topic in (
        (lambda: robot.image(TOP, 1.0), "top/image_raw"),
        (lambda: robot.image(WRIST, 1.0), "wrist/image_raw"),
        (lambda: robot.state(1.0), "joint_states"),
    ):
        readiness = robot.buffer.readiness(at(1.0))
        assert readiness.kind == "missing"
        assert topic in readiness.reason
        assert robot.buffer.take(at(1.0)) is None
        feed()
    assert robot.buffer.readiness(at(1.0)).ready


def test_stale_by_receipt_and_by_stamp() -> None:
    robot = Robot()
    robot.all(1.0)
    assert robot.buffer.readiness(at(1.099)).ready
    late = robot.buffer.readiness(at(1.2))
    assert late.kind == "stale"
    assert late.age == pytest.approx(0.2, abs=1e-6)
    assert "top/image_raw is 0.200 s old" in late.reason
    assert robot.buffer.take(at(1.2)) is None
    # Receipt is fresh, the stamp is old: a slow link.
    robot.state(1.2)
    robot.image(TOP, 1.2)
    robot.image(WRIST, 1.2, stamp=1.05)
    assert "wrist/image_raw is 0.150 s old" in robot.buffer.readiness(at(1.2)).reason
    # The stamp is fresh but arrived long ago, as with a clock that was set back meanwhile.
    other = Robot()
    other.all(2.0)
    assert other.buffer.readiness(Now(2.3, at(2.01).ros)).kind == "stale"


def test_the_set_is_around_the_slowest_camera() -> None:
    robot = Robot(sync_slop=0.02)
    for step in range(4):
        robot.image(TOP, 1.0 + 0.01 * step, value=step)
        robot.state(1.0 + 0.01 * step, value=step)
    robot.image(WRIST, 1.031, stamp=1.012, value=9)
    frame = robot.buffer.take(at(1.035))
    assert frame is not None
    assert frame.images[TOP][0, 0, 0] == 1  # 1.010 is nearest to 1.012
    np.testing.assert_allclose(frame.state[0], np.degrees(1.0), rtol=1e-6)
    assert frame.observed_at == pytest.approx(1.010, abs=1e-6)
    robot.image(WRIST, 1.05, stamp=1.049)
    out_of_step = robot.buffer.readiness(at(1.0695))
    assert out_of_step.ready
    robot.image(TOP, 1.08, stamp=1.0795)
    robot.image(WRIST, 1.09)
    assert robot.buffer.readiness(at(1.09)).kind == "unsynchronised"
    assert "joint_states is 0.0" in robot.buffer.readiness(at(1.09)).reason


def test_a_camera_may_be_missing_only_where_the_contract_says_so() -> None:
    robot = Robot(allow_missing_cameras=[WRIST])
    robot.image(TOP, 1.0)
    robot.state(1.0)
    frame = robot.buffer.take(at(1.01))
    assert frame is not None
    assert set(frame.images) == {TOP}
    robot.image(WRIST, 1.05)
    robot.image(TOP, 1.05)
    robot.state(1.05)
    both = robot.buffer.take(at(1.06))
    assert both is not None
    assert set(both.images) == {TOP, WRIST}
    none = Robot(allow_missing_cameras=[TOP, WRIST])
    none.state(1.0)
    assert none.buffer.take(at(1.0)) is None


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        (0.9, "header.stamp goes back by 0.100 s"),
        (1.0, "repeats itself"),
        (1.2, "ahead of this node's clock"),
    ],
)
def test_stamps_that_cannot_be_right(stamp: float, expected: str) -> None:
    robot = Robot()
    robot.image(TOP, 1.0)
    with pytest.raises(ObservationError, match=expected):
        robot.image(TOP, 1.01, stamp=stamp)
    robot.image(TOP, 1.02)


def test_zero_stamp_is_refused() -> None:
    with pytest.raises(ObservationError, match="stamp: receipt"):
        Robot().buffer.add_image(TOP, picture(0), 0, at(1.0))


def test_a_restarted_clock_starts_the_topic_anew() -> None:
    robot = Robot()
    robot.all(100.0)
    assert robot.buffer.take(at(100.0)) is not None
    for feature in (TOP, WRIST):
        robot.buffer.add_image(feature, picture(7), at(5.0).ros, Now(100.1, at(5.0).ros))
    robot.buffer.add_state(0, joints(), at(5.0).ros, Now(100.1, at(5.0).ros))
    frame = robot.buffer.take(Now(100.11, at(5.01).ros))
    assert frame is not None
    assert frame.images[TOP][0, 0, 0] == 7


def test_a_corrupt_image_is_named_and_not_tried_again() -> None:
    robot = Robot()
    robot.image(TOP, 1.0)
    robot.state(1.0)
    robot.buffer.add_image(WRIST, picture(0, data=b"123"), at(1.0).ros, at(1.0))
    with pytest.raises(ObservationError, match="wrist/image_raw: data has 3 bytes"):
        robot.buffer.take(at(1.0))
    assert robot.buffer.take(at(1.0)) is None
    robot.all(1.03)
    assert robot.buffer.take(at(1.03)) is not None


def test_joints_are_found_by_name() -> None:
    source = contract().states[0]
    straight = state_vector(source, joints(position=np.arange(6.0)))
    names = ("extra", *reversed(JOINTS))
    shuffled = JointSample(names, np.array([99.0, 5, 4, 3, 2, 1, 0]), None, None)
    np.testing.assert_array_equal(state_vector(source, shuffled), straight)
    for sample, expected in (
        (JointSample(JOINTS[1:], np.zeros(5), None, None), "joints shoulder_pan are missing"),
        (JointSample((), None, None, None), "got none"),
        (joints(position=None), "has no position"),
        (joints(position=np.array([0, 0, np.nan, 0, 0, 0])), "position of 'elbow_flex' is not finite"),
        (joints(position=np.array([0, 0, 0, 0, 0, np.inf])), "position of 'gripper' is not finite"),
        (joints(position=np.array([0, 0, 1e39, 0, 0, 0])), "a number is too large"),  # infinite in float32
        (joints(position=np.array([0, 0, -1e308, 0, 0, 0])), "a number is too large"),
    ):
        with pytest.raises(ObservationError, match=expected):
            state_vector(source, sample)


def test_fields_follow_one_another_and_velocity_has_no_offset() -> None:
    units = {"ros": [0, 1], "policy": [10, 20]}
    state = {
        "topic": "joint_states",
        "joints": ["a", "b"],
        "fields": ["velocity", "position", "effort"],
        "units": units,
    }
    source = contract(state=state).states[0]
    sample = JointSample(("b", "a"), np.array([0.5, 0.0]), np.array([2.0, 1.0]), np.array([7.0, 8.0]))
    np.testing.assert_array_equal(state_vector(source, sample), [10, 20, 10, 15, 8, 7])


ARRIVALS = st.lists(
    st.tuples(st.sampled_from("twsq"), st.floats(0.0, 0.08), st.floats(0.0, 0.12)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(ARRIVALS)
def test_frames_are_fresh_together_and_new(arrivals: list[tuple[str, float, float]]) -> None:
    """Whatever arrives in whatever order and delay, and whenever one asks."""
    robot = Robot()
    limits = contract()
    now, seen, stamps = 1.0, set(), {TOP: [0.0], WRIST: [0.0]}
    for kind, pause, delay in arrivals:
        now += pause
        try:
            if kind == "s":
                robot.state(now, stamp=now - delay)
            elif kind != "q":
                feature = TOP if kind == "t" else WRIST
                robot.image(feature, now, stamp=now - delay, value=len(stamps[feature]))
                stamps[feature].append(now - delay)
        except ObservationError:
            continue
        frame = robot.buffer.take(at(now))
        if frame is None:
            continue
        pair = (int(frame.images[TOP][0, 0, 0]), int(frame.images[WRIST][0, 0, 0]))
        assert pair not in seen
        seen.add(pair)
        times = [stamps[TOP][pair[0]], stamps[WRIST][pair[1]]]
        assert max(times) - min(times) <= limits.sync_slop + 1e-6
        assert now - min(times) <= limits.max_observation_age + 1e-6
        assert frame.stamp == at(min(times)).ros
        assert frame.observed_at <= min(times) + 1e-6
