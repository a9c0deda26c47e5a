"""Faults of cameras, joint states and clocks: a hundred seeded trials each, under simulated time."""

from __future__ import annotations

import array
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from faults.world import AGE, CAMERAS, FRAME, PIXELS, P, World

INFERENCE = 0.06  # s


def held_since(world: World, began: float) -> float:
    """The time of the first tick that held after `began`."""
    return next(at for at, held, _ in world.ticks if at >= began and held)


@pytest.mark.parametrize("fault", ["stops", "freezes"])
@pytest.mark.trials(100)
def test_a_camera_stops_or_its_stamps_freeze(seed: int, fault: str) -> None:
    """HOLD within age + 2P; nothing from older frames; motion again within 3 frames + one inference."""
    world = World(seed)
    world.warm_up()
    world.run(float(world.rng.uniform(0, 0.1)))
    topic = CAMERAS[seed % 2]
    last = world.frames[-1]
    frozen = world.clock.now().ros - 10_000_000

    def freeze(message: Any) -> Any:
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(frozen, 10**9)
        return message

    world.filters[topic] = (lambda message: None) if fault == "stops" else freeze
    gone = world.clock.time
    world.run(0.5)
    hold = held_since(world, gone)
    # The last image came up to a frame period ago, and its stamp is some milliseconds older than its arrival.
    assert hold - last <= AGE + FRAME + 2 * P
    assert hold - gone <= AGE + 2 * P
    stood = [values for at, values in world.sent if at >= hold]
    assert all((values == stood[0]).all() for values in stood)
    assert all(held for at, held, _ in world.ticks if at >= hold)
    assert topic in world.ticks[-1][2]
    calls = len(world.policy.calls)

    del world.filters[topic]
    back = world.clock.time
    world.run(3 * FRAME * 1.1 + INFERENCE + 3 * P)
    resumed = next(at for at, held, _ in world.ticks if at >= back and not held)
    third = [at for at in world.frames if at >= back][2]
    assert resumed <= third + INFERENCE + 2 * P
    assert all(at >= back for at, _, _ in world.policy.calls[calls:])
    world.check()


@pytest.mark.trials(100)
def test_one_camera_never_starts(seed: int) -> None:
    """No command and no inference; the reason within a second."""
    world = World(seed)
    topic = CAMERAS[seed % 2]
    world.filters[topic] = lambda message: None
    world.run(3.0)
    assert not world.sent
    assert not world.policy.calls
    first = next(at for at, _, why in world.ticks if topic in why)
    assert first - 1000.0 <= 1.0
    world.check()


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.trials(50)
def test_frames_are_dropped(seed: int, share: float) -> None:
    """Nothing is played while the newest pair of images is older than the age allows, and it always goes on."""
    world = World(seed)
    world.warm_up()
    for topic in CAMERAS:
        world.filters[topic] = lambda message: None if world.rng.random() < share else message
    arrivals: dict[str, list[float]] = {topic: [] for topic in CAMERAS}
    deliver = world.deliver
    began = world.clock.time

    def note(topic: str, message: Any) -> bool:
        arrived = deliver(topic, message)
        if arrived and topic in arrivals:
            arrivals[topic].append(world.clock.time)
        return arrived

    world.deliver = note  # type: ignore[method-assign]
    world.run(4.0)
    for at, held, _ in world.ticks:
        if at < began + AGE + FRAME or held:
            continue
        newest = min(max(t for t in times if t <= at) for times in arrivals.values())
        assert at - newest <= AGE
    world.filters.clear()
    world.run(0.5)
    assert not world.ticks[-1][1]
    world.check()


def image(**change: Any) -> Callable[[Any], Any]:
    def apply(message: Any) -> Any:
        for field, value in change.items():
            setattr(message, field, value)
        return message

    return apply


def padded(message: Any) -> Any:
    """Rows with seven bytes of padding, as alignment makes them."""
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    wide = np.concatenate([rows, np.full((message.height, 7), 0xEE, np.uint8)], axis=1)
    message.step = wide.shape[1]
    message.data = array.array("B", wide.tobytes())
    return message


BAD_IMAGES = {
    "unknown encoding": image(encoding="16UC1"),
    "no encoding": image(encoding=""),
    "long encoding": image(encoding="x" * 10_000),
    "wrong height": image(height=5),
    "wrong width": image(width=7),
    "no size": image(height=0, width=0),
    "huge size": image(height=2**31, width=2**31),
    "short data": image(data=array.array("B", b"123")),
    "no data": image(data=array.array("B")),
    "step too small": image(step=1),
    "step of nonsense": image(step=2**32 - 1),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.trials(10)
def test_a_camera_sends_what_is_no_image(seed: int, name: str) -> None:
    """It is as good as gone: HOLD within age + 2P, no inference sees it; motion when it is mended."""
    world = World(seed)
    world.warm_up()
    topic = CAMERAS[seed % 2]
    world.filters[topic] = BAD_IMAGES[name]
    gone, calls, rejected = world.clock.time, len(world.policy.calls), world.rejected
    world.run(0.5)
    assert held_since(world, gone) - gone <= AGE + 2 * P
    assert world.rejected - rejected >= 14
    assert all(at <= gone + AGE for at, _, _ in world.policy.calls[calls:])
    world.filters.clear()
    world.run(0.5)
    assert not world.ticks[-1][1]
    world.check()


@pytest.mark.parametrize("change", [padded, image(is_bigendian=1)], ids=["padded step", "big-endian"])
@pytest.mark.trials(20)
def test_what_is_unusual_but_right_is_taken(seed: int, change: Callable[[Any], Any]) -> None:
    seen: list[np.ndarray] = []
    world = World(seed)
    predict = world.policy.predict

    def look(images: Any, state: Any, task: str) -> Any:
        seen.extend(images.values())
        return predict(images, state, task)

    world.policy.predict = look  # type: ignore[method-assign]
    for topic in CAMERAS:
        world.filters[topic] = change
    world.warm_up()
    assert world.rejected == 0
    assert len(seen) > 10
    assert all((pixels == PIXELS).all() for pixels in seen)
    world.check()


def joints(kind: str, world: World) -> Callable[[Any], Any]:
    def change(message: Any) -> Any:
        order = world.rng.permutation(len(message.name))
        if kind == "reordered":
            position = [message.position[i] for i in order]
            message.name, message.position = [message.name[i] for i in order], position
        elif kind == "extra":
            message.name = ["finger", *message.name, "toe"]
            message.position = [9.0, *message.position, -9.0]
        elif kind == "not finite":
            message.position[int(order[0])] = float(world.rng.choice([np.nan, np.inf, -np.inf]))
        elif kind == "missing":
            message.name = list(message.name)[:-1]
            message.position = message.position[:-1]
        elif kind == "twice":
            message.name = [message.name[0], message.name[0], *message.name[2:]]
        elif kind == "short":
            message.position = message.position[:-1]
        elif kind == "empty":
            message.name, message.position = [], []
        return message

    return change


@pytest.mark.parametrize("kind", ["not finite", "missing", "twice", "short", "empty"])
@pytest.mark.trials(25)
def test_joint_states_that_are_wrong(seed: int, kind: str) -> None:
    """HOLD within age + 2P; no inference sees a bad number."""
    world = World(seed)
    world.warm_up()
    world.filters["joint_states"] = joints(kind, world)
    gone = world.clock.time
    world.run(0.4)
    assert held_since(world, gone) - gone <= AGE + 2 * P
    for _, state, _ in world.policy.calls:
        np.testing.assert_allclose(state[:5], np.degrees(0.1), rtol=1e-5)
    world.filters.clear()
    world.run(0.4)
    assert not world.ticks[-1][1]
    world.check()


@pytest.mark.parametrize("kind", ["reordered", "extra"])
@pytest.mark.trials(25)
def test_joint_states_that_are_only_unusual(seed: int, kind: str) -> None:
    world = World(seed)
    world.position = {name: 0.01 * i for i, name in enumerate(world.position)}
    world.filters["joint_states"] = joints(kind, world)
    world.warm_up()
    for _, state, _ in world.policy.calls:
        np.testing.assert_allclose(state[:5], np.degrees(0.01 * np.arange(5)), atol=1e-4)
    world.check()


@pytest.mark.parametrize("jump", [1.0, -1.0, 3600.0, -3600.0])
@pytest.mark.trials(25)
def test_the_wall_clock_jumps(seed: int, jump: float) -> None:
    """This machine's clock is set, and the cameras' with it: hold at most, and motion within two seconds."""
    world = World(seed)
    world.warm_up()
    world.run(float(world.rng.uniform(0, 0.1)))
    world.clock.offset += round(jump * 1e9)
    before = len(world.policy.calls)
    world.run(2.0)
    assert not world.ticks[-1][1]
    assert len(world.policy.calls) > before + 5
    world.check()


@pytest.mark.parametrize("jump", [0.5, -0.5, 3600.0, -3600.0])
@pytest.mark.trials(25)
def test_the_cameras_clock_is_another(seed: int, jump: float) -> None:
    """Stamps that are old are stale, stamps ahead by more than 50 ms are a fault: hold until it is mended."""
    world = World(seed)
    world.warm_up()
    shift = round(jump * 1e9)

    def move(message: Any) -> Any:
        total = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec + shift
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(total, 10**9)
        return message

    topic = CAMERAS[seed % 2]
    world.filters[topic] = move
    gone = world.clock.time
    world.run(0.5)
    assert held_since(world, gone) - gone <= AGE + 2 * P
    assert world.ticks[-1][1]
    world.filters.clear()
    world.run(1.5)
    assert not world.ticks[-1][1]
    world.check()


@pytest.mark.trials(100)
def test_everything_arrives_late(seed: int) -> None:
    """A network that holds every message back by more than the age: fresh by arrival, stale by stamp."""
    world = World(seed)
    world.warm_up()

    def age(message: Any) -> Any:
        total = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec - 120_000_000
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(total, 10**9)
        return message

    for topic in (*CAMERAS, "joint_states"):
        world.filters[topic] = age
    late, calls = world.clock.time, len(world.policy.calls)
    world.run(0.6)
    assert held_since(world, late) - late <= AGE + 2 * P
    assert all(at <= late + AGE for at, _, _ in world.policy.calls[calls:])
    assert world.ticks[-1][1]
    world.check()


def restamped(kind: str, world: World) -> Callable[[Any], Any]:
    previous: list[Any] = []

    def change(message: Any) -> Any:
        now = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        stamp = {"zero": 0, "future": now + 60_000_000, "old": now - 10**12}.get(kind, now)
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10**9)
        if kind == "duplicate":
            return [message, copy.deepcopy(message), message]
        if kind == "late":  # each message once more after its successor
            previous.append(copy.deepcopy(message))
            return [message, previous[-2]] if len(previous) > 1 else message
        if kind == "negative":
            message.header.stamp.sec = -1
        return message

    return change


@pytest.mark.parametrize("kind", ["zero", "future", "old", "negative"])
@pytest.mark.trials(25)
def test_stamps_that_cannot_be(seed: int, kind: str) -> None:
    world = World(seed)
    world.warm_up()
    topic = CAMERAS[seed % 2]
    world.filters[topic] = restamped(kind, world)
    gone, calls = world.clock.time, len(world.policy.calls)
    world.run(0.4)
    assert held_since(world, gone) - gone <= AGE + 2 * P
    assert all(at <= gone + AGE + FRAME for at, _, _ in world.policy.calls[calls:])
    world.check()


@pytest.mark.parametrize("kind", ["duplicate", "late"])
@pytest.mark.trials(25)
def test_stamps_that_repeat_or_come_late_change_nothing(seed: int, kind: str) -> None:
    """The good messages among them are used, the others refused; no observation is inferred twice."""
    world = World(seed)
    world.warm_up()
    for topic in CAMERAS:
        world.filters[topic] = restamped(kind, world)
    rejected, calls = world.rejected, len(world.policy.calls)
    frames = len(world.frames)
    world.run(1.0)
    assert not any(held for at, held, _ in world.ticks[-40:])
    assert world.rejected > rejected + 25
    assert len(world.policy.calls) - calls <= 2 * (len(world.frames) - frames) + 2
    world.check()
