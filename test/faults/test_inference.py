"""Faults of the policy: slow, hanging, raising, absurd. Simulated time, seeded trials."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from faults.world import AGE, FRAME, Ended, P, World
from vla_infer.errors import DeviceLostError, ObservationError
from vla_infer.failsafe import Level

HORIZON = 30 * FRAME  # s that a chunk of the stand-in lasts at policy_rate 30


@pytest.mark.parametrize("times", [2, 10])
@pytest.mark.trials(50)
def test_inference_slower_than_the_policy_period(seed: int, times: int) -> None:
    """Every tick has its command, none waits; the plan lasts, so nothing is held after the first chunk."""
    world = World(seed)
    world.policy.duration = lambda: times * FRAME * float(world.rng.uniform(0.9, 1.1))
    world.warm_up()
    world.run(4.0)
    recent = [held for at, held, _ in world.ticks if at > world.clock.time - 3.0]
    assert len(recent) >= 148
    assert not any(recent)
    world.check()


@pytest.mark.trials(100)
def test_inference_slower_than_the_horizon(seed: int) -> None:
    """A chunk that is over before it arrives is refused; the arm holds where it is, and the process stays."""
    world = World(seed, document={"failsafe": {"inference_timeout": 5.0}})
    world.warm_up()
    world.policy.duration = lambda: HORIZON * 1.2
    world.run(3 * HORIZON)
    assert world.ticks[-1][1]
    assert not world.stops
    assert any("over before it arrived" in line for line in world.logger.lines)
    world.check()


@pytest.mark.trials(100)
def test_inference_hangs(seed: int) -> None:
    """HOLD at the end of the chunk, the process gives up 1 s after the call began, the last message a hold."""
    world = World(seed)
    world.warm_up()
    world.policy.duration = lambda: 1e9
    calls = len(world.policy.calls)
    with pytest.raises(Ended):
        world.run(60.0)
    began = world.policy.calls[calls][0]
    at, level, reason = world.stops[0]
    assert level is Level.EXIT
    assert 1.0 < at - began <= 1.0 + 2 * P
    assert "has not returned for 1.0 s" in reason
    # The chunk in use was made from an observation before the call.
    played = [time for time, held, _ in world.ticks if not held]
    assert played[-1] <= began + HORIZON
    np.testing.assert_array_equal(world.sent[-1][1], world.sent[-2][1])
    world.check()


ERRORS = (RuntimeError("x"), MemoryError(), ValueError("y"), OSError(5, "io"), KeyError("k"))


@pytest.mark.trials(100)
def test_the_engine_raises_until_none_is_left(seed: int) -> None:
    """HOLD at the first failure, three tries, then DEACTIVATE."""
    world = World(seed)
    world.warm_up()
    error = ERRORS[seed % len(ERRORS)]

    def fail(actions: np.ndarray) -> np.ndarray:
        raise error

    world.policy.change = fail
    calls = len(world.policy.calls)
    world.until(lambda: bool(world.stops))
    assert len(world.policy.calls) - calls <= 4  # one may have been under way
    assert world.reporter.counts["inferences_failed"] == 3
    _, level, reason = world.stops[0]
    assert level is Level.DEACTIVATE
    assert "3 inferences failed in a row" in reason
    failed = world.policy.calls[-3][0] + 0.06
    held = [values for at, values in world.sent if at > failed + P]
    assert all((values == held[0]).all() for values in held)
    world.check()


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.trials(25)
def test_fewer_failures_are_outlived(seed: int, failures: int) -> None:
    world = World(seed)
    world.warm_up()
    left = [failures]

    def fail(actions: np.ndarray) -> np.ndarray:
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("once more")
        return actions

    world.policy.change = fail
    world.run(0.4)
    assert any(held and "inference fails" in why for _, held, why in world.ticks)
    world.run(2.0)
    assert not world.ticks[-1][1]
    assert not world.stops
    world.check()


def test_failing_inferences_leave_no_memory_behind() -> None:
    world = World(0, document={"failsafe": {"engine_tries": 100}})
    world.warm_up()
    count = [0]

    def fail(actions: np.ndarray) -> np.ndarray:
        count[0] += 1
        if count[0] % 50:
            raise RuntimeError(f"failure with {actions.shape}")
        return actions

    world.policy.change = fail

    def pass_by(seconds: float) -> tracemalloc.Snapshot:
        world.run(seconds)
        for kept in (
            world.node.publishers[world.contract.commands[0].topic].sent,
            world.ticks,
            world.policy.calls,
        ):
            kept.clear()  # what the test itself keeps
        return tracemalloc.take_snapshot()

    tracemalloc.start()
    before = pass_by(20.0)
    after = pass_by(40.0)
    grown = sum(
        item.size_diff
        for item in after.compare_to(before, "filename")
        if "vla_infer/" in item.traceback[0].filename and "faults" not in item.traceback[0].filename
    )
    tracemalloc.stop()
    assert count[0] > 100
    assert grown < 16 << 10, grown


@pytest.mark.trials(100)
def test_a_lost_device_is_given_up_at_once(seed: int) -> None:
    world = World(seed)
    world.warm_up()

    def fail(actions: np.ndarray) -> np.ndarray:
        raise DeviceLostError("cuda:0 is gone")

    world.policy.change = fail
    with pytest.raises(Ended):
        world.run(5.0)
    assert world.stops[0][1] is Level.EXIT
    assert world.reporter.counts["inferences_failed"] == 1
    world.check()


@pytest.mark.trials(20)
def test_an_observation_that_the_policy_refuses_is_no_failure(seed: int) -> None:
    world = World(seed)
    world.warm_up()

    def refuse(actions: np.ndarray) -> np.ndarray:
        raise ObservationError("too large")

    world.policy.change = refuse
    world.run(3.0)
    assert not world.stops
    assert world.ticks[-1][1]  # the chunk is over
    world.policy.change = lambda actions: actions
    world.run(0.5)
    assert not world.ticks[-1][1]
    world.check()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, -1e38, 1e4])
@pytest.mark.trials(20)
def test_absurd_actions_move_nothing_absurdly(seed: int, value: float) -> None:
    """Anywhere in any chunk; `check` holds every command to the limits. A chunk with a NaN is not played."""
    world = World(seed)
    world.warm_up()

    def spoil(actions: np.ndarray) -> np.ndarray:
        actions[int(world.rng.integers(30)), int(world.rng.integers(6))] = value
        return actions

    world.policy.change = spoil
    world.run(HORIZON + 0.3)
    if not np.isfinite(value):
        assert world.ticks[-1][1]
    world.check()


@pytest.mark.parametrize("shape", [(0, 6), (30, 5), (30, 7), (6,), (1, 30, 6)])
@pytest.mark.trials(1)
def test_actions_of_a_wrong_shape(seed: int, shape: tuple[int, ...]) -> None:
    world = World(seed)
    world.warm_up()
    world.policy.change = lambda actions: np.zeros(shape, dtype=np.float32)
    world.until(lambda: bool(world.stops))
    assert world.stops[0][1] is Level.DEACTIVATE
    world.check()


@pytest.mark.trials(100)
def test_an_emergency_stop_holds_within_a_tick(seed: int) -> None:
    world = World(seed)
    world.warm_up()
    world.run(float(world.rng.uniform(0, 0.1)))
    pressed, stood = world.clock.time, world.sent[-1][1]
    world.emergency.latch("button")
    world.run(2 * AGE)
    assert world.stops[0][1] is Level.DEACTIVATE
    assert world.stops[0][0] - pressed <= P * 1.2
    assert all((values == stood).all() for at, values in world.sent if at > pressed)
    world.check()
