"""The control tick goes before messages that wait, and messages leave processor time to others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vla_infer.control_timer import SHARE, ControlTimer

P = 0.02


class Time:
    """A clock that moves when something is done: steady time, and processor time of this thread."""

    steady_clock = "steady"

    def __init__(self) -> None:
        self.now, self.spent = 50.0, 7.0
        self.slept: list[float] = []

    def steady(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.spent

    def sleep(self, seconds: float) -> None:
        assert seconds > 0.0
        self.slept.append(seconds)
        self.now += seconds

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.spent += seconds


class Node:
    """Gives out one timer, whose first call is `first` s away."""

    def __init__(self, first: float = P) -> None:
        self.callback: Callable[[], None] | None = None
        self.first = first
        self.period, self.clock = 0.0, ""

    def create_timer(self, period: float, callback: Callable[[], None], clock: Any) -> Node:
        self.period, self.callback, self.clock = period, callback, clock
        return self

    def time_until_next_call(self) -> int:
        return round(self.first * 1e9)

    def destroy_timer(self, timer: Node) -> None:
        assert timer is self
        self.callback = None


@pytest.fixture
def time() -> Time:
    return Time()


def make(time: Time, *, takes: float = 0.0, first: float = P) -> tuple[ControlTimer, list[float], Node]:
    """A timer whose ticks take `takes` s; the times since 50 s at which they began."""
    ticks: list[float] = []

    def tick() -> None:
        ticks.append(round(time.now - 50.0, 9))
        time.work(takes)

    node = Node(first)
    return ControlTimer(node, P, tick, clock=time), ticks, node


def test_ticks_are_on_the_grid_of_the_nodes_timer(time: Time) -> None:
    timer, ticks, node = make(time, first=0.013)
    assert (node.period, node.clock) == (P, "steady")
    for _ in range(100):
        time.now += 0.001
        node.callback()
    assert ticks == pytest.approx([0.013, 0.033, 0.053, 0.073, 0.093])
    timer.destroy()
    assert node.callback is None


def test_a_thousand_messages_do_not_delay_a_tick(time: Time) -> None:
    """Each takes 0.3 ms, and the timer's own event is behind all of them."""
    timer, ticks, node = make(time)
    handled = 0
    while handled < 1000:
        time.work(0.0003)
        handled += 1
        timer.turn()
    node.callback()
    assert ticks == pytest.approx([P * (i + 1) for i in range(len(ticks))], abs=0.0003)
    assert len(ticks) >= 1000 * 0.0003 / P


def test_messages_leave_a_share_of_every_period(time: Time) -> None:
    timer, ticks, _ = make(time)
    spent = time.spent
    for _ in range(5000):
        time.work(0.0001)
        timer.turn()
    assert len(ticks) > 20
    assert time.spent - spent == pytest.approx(SHARE * (time.now - 50.0), rel=0.05)
    assert sum(time.slept) == pytest.approx((1 - SHARE) * (time.now - 50.0), rel=0.05)


def test_waiting_for_messages_is_not_counted(time: Time) -> None:
    """Time that passes without work of this thread, such as the executor's wait, leaves nothing to sleep for."""
    timer, ticks, _ = make(time)
    for _ in range(1000):
        time.now += 0.0007
        timer.turn()
    assert ticks
    assert all(seconds <= 0.0005 for seconds in time.slept)


def test_a_tick_that_is_near_is_waited_for(time: Time) -> None:
    timer, ticks, _ = make(time)
    time.now += P - 0.0004
    timer.turn()
    assert ticks == pytest.approx([P])
    timer.turn()
    assert len(ticks) == 1


@pytest.mark.parametrize("long", [0.019, 0.021, 0.055, 1.0])
def test_a_late_tick_is_made_once_and_the_grid_stays(time: Time, long: float) -> None:
    """After a callback of `long` s."""
    timer, ticks, node = make(time)
    time.now += P
    timer.turn()
    time.now += long
    timer.turn()
    timer.turn()
    first = [P] if long < P - 0.0005 else [P, P + long]
    assert ticks == pytest.approx(first)
    while len(ticks) < len(first) + 3:
        time.now += 0.0001
        node.callback()
    assert [t / P for t in ticks[len(first) :]] == pytest.approx(
        [round(t / P) for t in ticks[len(first) :]], abs=0.01
    )


def test_a_tick_longer_than_the_period_leaves_time_for_callbacks(time: Time) -> None:
    timer, ticks, _ = make(time, takes=0.03)
    time.now += P
    timer.turn()
    timer.turn()
    assert ticks == pytest.approx([P])
    time.now += P
    timer.turn()
    assert len(ticks) == 2
