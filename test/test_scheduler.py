"""Chunks to commands: time is an argument, so every case is exact."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_infer.chunk import ActionLayout, Chunk
from vla_infer.contract import load_contract, parse_contract
from vla_infer.errors import EngineError
from vla_infer.frame import Frame
from vla_infer.safety_options import SchedulerOptions
from vla_infer.scheduler import Scheduler, Verdict
from vla_infer.stats import Counts, Spacing, TickClock, Window

PERIOD = 0.1
POSITION = np.array([False, False])
CONFIG = Path(__file__).resolve().parent.parent / "config"


_frames = itertools.count(1)


def chunk(observed_at: float, rows: int = 5, *, base: float = 0.0) -> Chunk:
    """Row i is (base + i, base + i + 100); each is of a frame of its own."""
    values = base + np.arange(rows, dtype=np.float64)[:, None] + np.array([0.0, 100.0])
    return Chunk(values.astype(np.float32), values, observed_at, PERIOD, next(_frames))


def plain(*, zero_on_hold: Any) -> Scheduler:
    """Mode `latest` without interpolation, so that rows are seen as they are."""
    return Scheduler(zero_on_hold=zero_on_hold, options=SchedulerOptions(linear=False))


def first(scheduler: Scheduler, now: float) -> float | None:
    command = scheduler.sample(now)
    return None if command is None else float(command.values[0])


def test_nothing_before_the_first_chunk() -> None:
    scheduler = plain(zero_on_hold=POSITION)
    assert scheduler.sample(1.0) is None
    scheduler.hold(1.0)
    assert scheduler.sample(1.1) is None


def test_each_row_while_it_is_due_then_hold() -> None:
    scheduler = plain(zero_on_hold=POSITION)
    assert scheduler.add(chunk(1.0), 1.0) is Verdict.ACCEPTED
    assert [first(scheduler, 1.0 + 0.05 * i) for i in range(13)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4]
    held = scheduler.sample(9.0)
    assert held is not None
    assert held.held
    assert held.chunk is None
    np.testing.assert_array_equal(held.values, [4.0, 104.0])


def test_what_is_past_on_arrival_is_not_played() -> None:
    scheduler = plain(zero_on_hold=POSITION)
    scheduler.add(chunk(1.0), 1.25)
    assert first(scheduler, 1.25) == 2
    assert scheduler.add(chunk(0.5), 1.25) is Verdict.OLDER
    late = plain(zero_on_hold=POSITION)
    assert late.add(chunk(1.0), 1.5) is Verdict.PAST
    assert late.sample(1.5) is None


def test_hold_repeats_what_was_sent_not_what_was_skipped() -> None:
    scheduler = plain(zero_on_hold=POSITION)
    scheduler.add(chunk(1.0), 1.0)
    assert first(scheduler, 1.1) == 1
    assert first(scheduler, 3.0) == 1  # a control loop that stalled must not jump to the last row


def test_velocities_are_held_at_zero() -> None:
    scheduler = plain(zero_on_hold=np.array([False, True]))
    scheduler.add(chunk(1.0), 1.0)
    command = scheduler.sample(1.0)
    assert command is not None
    np.testing.assert_array_equal(command.values, [0.0, 100.0])
    scheduler.hold(1.05)
    held = scheduler.sample(1.05)
    assert held is not None
    np.testing.assert_array_equal(held.values, [0.0, 0.0])


def test_a_newer_chunk_takes_over_at_the_row_that_is_due() -> None:
    scheduler = plain(zero_on_hold=POSITION)
    scheduler.add(chunk(1.0), 1.0)
    scheduler.add(chunk(1.1, base=50), 1.3)
    assert first(scheduler, 1.3) == 52
    for observed_at in (1.05, 1.1):
        assert scheduler.add(chunk(observed_at), 1.3) is Verdict.OLDER
    assert first(scheduler, 1.3) == 52


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 0), (4, 1), (2, 0)])
def test_one_bad_number_refuses_the_whole_chunk(bad: float, where: tuple[int, int]) -> None:
    scheduler = plain(zero_on_hold=POSITION)
    good = chunk(1.0)
    scheduler.add(good, 1.0)
    spoilt = chunk(1.1, base=50)
    spoilt.commands[where] = bad
    assert scheduler.add(spoilt, 1.1) is Verdict.NOT_FINITE
    assert first(scheduler, 1.2) == 2
    assert scheduler.verdicts[Verdict.NOT_FINITE] == 1


def test_hold_drops_the_chunk_and_what_was_observed_before() -> None:
    scheduler = plain(zero_on_hold=POSITION)
    scheduler.add(chunk(1.0, rows=50), 1.0)
    assert first(scheduler, 1.2) == 2
    for tick in range(10):
        scheduler.hold(1.2 + 0.02 * tick)
        assert first(scheduler, 1.2 + 0.02 * tick) == 2
    assert scheduler.add(chunk(1.15, rows=50), 1.4) is Verdict.BEFORE_RESET
    assert first(scheduler, 1.4) == 2
    # Observed while holding, but after it began: the camera is back.
    assert scheduler.add(chunk(1.21, base=70, rows=50), 1.4) is Verdict.ACCEPTED
    assert first(scheduler, 1.42) == 72


def test_reset_forgets_the_last_command_too() -> None:
    scheduler = plain(zero_on_hold=POSITION)
    scheduler.add(chunk(1.0), 1.0)
    scheduler.sample(1.0)
    scheduler.reset(1.05)
    assert scheduler.sample(1.05) is None
    assert scheduler.add(chunk(1.04), 1.06) is Verdict.BEFORE_RESET
    assert scheduler.add(chunk(1.05), 1.06) is Verdict.ACCEPTED


def test_reset_lets_a_clock_that_went_back_start_again() -> None:
    scheduler = plain(zero_on_hold=POSITION)
    scheduler.add(chunk(1000.0), 1000.0)
    scheduler.reset(2.0)
    assert scheduler.add(chunk(2.0), 2.0) is Verdict.ACCEPTED


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "bad", "hold", "tick", "tick", "tick"]), st.floats(0, 0.3), st.floats(0, 0.8)
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_any_order_of_events(events: list[tuple[str, float, float]]) -> None:
    """Commands are finite, come from rows that are due, and never from an older observation than before."""
    scheduler = plain(zero_on_hold=POSITION)
    now, newest, accepted, last = 1.0, -1.0, False, None
    for kind, pause, age in events:
        now += pause
        if kind in ("add", "bad"):
            item = chunk(now - age, base=round(now * 1000))
            if kind == "bad":
                item.commands[1, 1] = np.nan
            accepted |= scheduler.add(item, now) is Verdict.ACCEPTED
        elif kind == "hold":
            scheduler.hold(now)
        command = scheduler.sample(now)
        assert accepted or command is None
        if command is None:
            continue
        assert np.isfinite(command.values).all()
        if command.held:
            np.testing.assert_array_equal(command.values, last)
        else:
            assert kind != "hold"
            assert command.chunk is not None
            assert command.chunk.due(command.row) <= now + 1e-6 < command.chunk.due(command.row + 1) + 2e-6
            assert command.chunk.observed_at >= newest
            newest = command.chunk.observed_at
        last = command.values


def frame(observed_at: float = 1.0) -> Frame:
    return Frame({}, np.zeros(6, dtype=np.float32), 0, observed_at, 1)


def test_layout_turns_policy_units_into_ros_units() -> None:
    layout = ActionLayout(load_contract("so101"))
    actions = np.array([[180.0, 90, 0, 0, 0, 100], [0, 0, 0, 0, 0, 0]], dtype=np.float32)
    made = layout.chunk(actions, frame())
    np.testing.assert_allclose(made.commands[0], [np.pi, np.pi / 2, 0, 0, 0, 1.7453], atol=1e-6)
    np.testing.assert_allclose(made.commands[1, 5], -0.1745, atol=1e-6)
    assert made.end == pytest.approx(1.0 + 2 / 30)
    actions[:] = 7  # the chunk is its own copy
    assert made.actions[0, 0] == 180.0
    for wrong in (np.zeros((5, 7)), np.zeros(6), np.zeros((0, 6))):
        with pytest.raises(EngineError, match=r"expected actions of shape \(H, 6\)"):
            layout.chunk(wrong.astype(np.float32), frame())


def test_layout_splits_an_action_and_knows_what_to_zero() -> None:
    layout = ActionLayout(load_contract("lekiwi"))
    assert [(command.type.split("/")[-1], part) for command, part in layout.parts] == [
        ("Float64MultiArray", slice(0, 6)),
        ("TwistStamped", slice(6, 9)),
    ]
    np.testing.assert_array_equal(layout.zero_on_hold, [False] * 6 + [True] * 3)


def test_chunk_steps_cut_the_chunk() -> None:
    document: dict[str, Any] = yaml.safe_load((CONFIG / "so101.yaml").read_text())
    layout = ActionLayout(parse_contract({**document, "chunk_steps": 3}, file="f"))
    assert layout.chunk(np.zeros((10, 6), dtype=np.float32), frame()).steps == 3


def test_window_keeps_the_last_values() -> None:
    window = Window(capacity=100)
    assert window.percentiles() is None
    for value in range(1000):
        window.add(value)
    figures = window.percentiles()
    assert figures is not None
    assert window.count == 1000
    assert figures["max"] == 999
    assert figures["p50"] == pytest.approx(949.5)
    assert figures["p95"] == pytest.approx(994.05)
    assert figures["p99"] == pytest.approx(998.01)


def test_tick_clock_counts_late_and_missed() -> None:
    clock = TickClock(0.02)
    for now in (0.0, 0.02, 0.0415, 0.0625, 0.08):
        clock.tick(now)
    assert (clock.ticks, clock.late, clock.missed) == (5, 1, 0)
    clock.tick(0.145)  # due at 0.1: 0.12 and 0.14 have no tick of their own
    clock.tick(0.16)
    assert (clock.late, clock.missed) == (2, 2)


def test_spacing_passes_the_first_and_counts_the_rest() -> None:
    spacing = Spacing(5.0)
    assert spacing.pass_on("a", 0.0) == 0
    assert spacing.pass_on("b", 1.0) == 0
    assert [spacing.pass_on("a", now) for now in (1.0, 2.0, 4.9)] == [None] * 3
    assert spacing.pass_on("a", 5.0) == 3
    assert spacing.pass_on("a", 11.0) == 0


def test_counts() -> None:
    counts = Counts()
    counts.add("a")
    counts.add("a", 2)
    assert counts["a"] == 3
    assert counts["b"] == 0
    assert counts.snapshot() == {"a": 3}


def test_a_first_tick_that_was_late_makes_no_other_early() -> None:
    clock = TickClock(0.02)
    assert clock.tick(1.012) == 0.0  # due at 1.0
    late = [clock.tick(at) for at in (1.0200, 1.0405, 1.0600, 1.0830)]
    np.testing.assert_allclose(late, [0.0, 0.0005, 0.0, 0.003], atol=1e-9)
    assert clock.late == 1
