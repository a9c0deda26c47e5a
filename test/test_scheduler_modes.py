"""Interpolation, blending, ensembling, guidance, triggers and the delay: exact, since time is an argument."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_infer.chunk import Chunk
from vla_infer.delay import DelayEstimate
from vla_infer.safety_options import MODES, SchedulerOptions
from vla_infer.scheduler import Scheduler, Verdict

PERIOD = 0.1
_frames = itertools.count(1)


def chunk(observed_at: float, values: list[float], *, generation: int = 0) -> Chunk:
    commands = np.array(values, dtype=np.float64)[:, None]
    actions = commands.astype(np.float32) * 10  # other units, to see which are used
    return Chunk(actions, commands, observed_at, PERIOD, next(_frames), generation)


def make(**options: Any) -> Scheduler:
    return Scheduler(zero_on_hold=np.array([False]), options=SchedulerOptions(**options))


def value(scheduler: Scheduler, now: float) -> float:
    command = scheduler.sample(now)
    assert command is not None
    return float(command.values[0])


def test_linear_interpolation_between_rows_and_the_last_row_to_its_end() -> None:
    scheduler = make()
    scheduler.add(chunk(1.0, [0, 1, 4]), 1.0)
    played = [value(scheduler, 1.0 + 0.025 * tick) for tick in range(14)]
    expected = [0, 0.25, 0.5, 0.75, 1, 1.75, 2.5, 3.25, 4, 4, 4, 4, 4, 4]
    np.testing.assert_allclose(played, expected, atol=1e-5)


def test_latest_jumps_and_blend_crosses_over() -> None:
    old, new = [0.0] * 20, [1.0] * 20
    latest = make(mode="latest")
    blended = make(mode="blend", blend_steps=4)
    for scheduler in (latest, blended):
        scheduler.add(chunk(1.0, old), 1.0)
        value(scheduler, 1.3)
        assert scheduler.add(chunk(1.2, new), 1.3) is Verdict.ACCEPTED
    assert value(latest, 1.3) == 1.0
    times = 1.3 + 0.1 * np.arange(6)
    np.testing.assert_allclose([value(blended, t) for t in times], [0, 0.25, 0.5, 0.75, 1, 1], atol=1e-5)


def test_blend_is_no_longer_than_the_old_chunk() -> None:
    scheduler = make(mode="blend", blend_steps=100)
    scheduler.add(chunk(1.0, [0.0] * 5), 1.0)  # its last row is due at 1.4
    scheduler.add(chunk(1.1, [1.0] * 20), 1.2)
    np.testing.assert_allclose([value(scheduler, t) for t in (1.2, 1.3, 1.4, 1.5)], [0, 0.5, 1, 1], atol=1e-5)
    over = make(mode="blend")
    over.add(chunk(1.0, [0.0] * 2), 1.0)
    over.add(chunk(1.1, [1.0] * 20), 1.5)
    assert value(over, 1.5) == 1.0


def test_a_chunk_that_interrupts_a_blend_starts_from_the_blend() -> None:
    scheduler = make(mode="blend", blend_steps=4)
    scheduler.add(chunk(1.0, [0.0] * 30), 1.0)
    scheduler.add(chunk(1.1, [1.0] * 30), 1.1)
    middle = value(scheduler, 1.3)
    assert middle == pytest.approx(0.5, abs=1e-5)
    scheduler.add(chunk(1.3, [-1.0] * 30), 1.3)
    assert value(scheduler, 1.3) == pytest.approx(middle, abs=1e-5)
    assert value(scheduler, 1.7) == pytest.approx(-1.0, abs=1e-5)


def test_ensemble_is_the_weighted_mean_of_those_that_cover_a_time() -> None:
    decay = 0.5
    scheduler = make(mode="ensemble", ensemble_decay=decay, ensemble_size=3)
    scheduler.add(chunk(1.0, [1.0] * 4), 1.0)  # covers up to 1.3
    scheduler.add(chunk(1.1, [2.0] * 10), 1.1)
    scheduler.add(chunk(1.2, [4.0] * 10), 1.2)
    weights = np.exp(-decay * np.arange(3))
    assert value(scheduler, 1.3) == pytest.approx(np.dot(weights, [1, 2, 4]) / weights.sum())
    assert value(scheduler, 1.5) == pytest.approx(np.dot(weights[1:], [2, 4]) / weights[1:].sum())
    scheduler.add(chunk(1.3, [8.0] * 10), 1.3)  # the oldest of four goes
    assert value(scheduler, 1.3) == pytest.approx(np.dot(weights, [2, 4, 8]) / weights.sum())


def test_ensemble_forgets_on_hold() -> None:
    scheduler = make(mode="ensemble")
    scheduler.add(chunk(1.0, [1.0] * 20), 1.0)
    scheduler.hold(1.1)
    scheduler.add(chunk(1.15, [5.0] * 20), 1.2)
    assert value(scheduler, 1.2) == 5.0


def test_guidance_is_what_is_left_in_policy_units_with_the_delay() -> None:
    scheduler = make(mode="rtc")
    assert scheduler.guidance(1.0) is None  # nothing to continue
    scheduler.add(chunk(1.0, [0, 1, 2, 3, 4, 5]), 1.0)
    scheduler.delay.add(0.14)
    left = scheduler.guidance(1.25)
    assert left is not None
    np.testing.assert_allclose(left.previous[:, 0], [25, 35, 45], atol=1e-4)
    assert (left.delay, left.horizon) == (2, 3)
    scheduler.delay.add(0.31)
    assert scheduler.guidance(1.25) is None  # it would be over before the new one arrives
    assert make(mode="latest").guidance(1.0) is None
    short = make(mode="rtc", rtc_horizon=2)
    short.add(chunk(1.0, [0, 1, 2, 3, 4, 5]), 1.0)
    assert short.guidance(1.0).horizon == 2  # type: ignore[union-attr]
    short.delay.add(0.4)
    assert short.guidance(1.0).horizon == 4  # type: ignore[union-attr]  # never under the delay


def test_guidance_and_the_new_chunk_are_of_the_same_instants() -> None:
    """A policy that repeats what it is asked to continue makes a seam of nothing."""
    scheduler = make(mode="rtc")
    rng = np.random.default_rng(1)
    scheduler.add(chunk(1.0, list(np.cumsum(rng.normal(size=30)))), 1.0)
    observed = 1.7
    left = scheduler.guidance(observed)
    assert left is not None
    before = value(scheduler, 2.0)
    scheduler.add(chunk(observed, list(left.previous[:, 0] / 10)), 2.0)
    assert value(scheduler, 2.0) == pytest.approx(before, abs=1e-4)


def test_a_frame_is_used_once_even_after_a_reset() -> None:
    scheduler = make()
    used = chunk(1.0, [0.0] * 9)
    assert scheduler.add(used, 1.0) is Verdict.ACCEPTED
    scheduler.reset(1.0)
    assert scheduler.add(used, 1.0) is Verdict.REPEATED


@pytest.mark.parametrize("flush", [True, False])
def test_a_new_instruction_flushes_or_keeps(flush: bool) -> None:  # noqa: FBT001
    scheduler = make(flush_on_instruction=flush)
    scheduler.add(chunk(1.0, [0, 1, 2, 3, 4, 5]), 1.0)
    value(scheduler, 1.1)
    scheduler.instruct(1)
    assert value(scheduler, 1.3) == pytest.approx(1.0 if flush else 3.0, abs=1e-5)
    verdict = scheduler.add(chunk(1.25, [50] * 6), 1.3)
    assert verdict is (Verdict.OLD_INSTRUCTION if flush else Verdict.ACCEPTED)
    # Observed before the instruction came, but inferred for it.
    assert scheduler.add(chunk(1.28, [70] * 6, generation=1), 1.3) is Verdict.ACCEPTED
    assert value(scheduler, 1.3) == 70


def test_delay_recovers_from_a_spike() -> None:
    delay = DelayEstimate()
    for _ in range(20):
        delay.add(0.05)
    delay.add(3.0)
    assert delay.seconds == 3.0
    for _ in range(8):
        delay.add(0.06)
    assert delay.seconds == 0.06
    for bad in (math.nan, -1.0, math.inf):
        delay.add(bad)
    assert delay.seconds == 0.06
    assert [DelayEstimate().steps(0.1), delay.steps(0.02), delay.steps(0.05)] == [0, 3, 2]


def test_triggers() -> None:
    always = make(trigger="continuous")
    assert always.wants(1.0)
    rate = make(trigger="rate", trigger_rate=5.0)
    assert rate.wants(1.0)
    rate.started(1.0)
    assert [rate.wants(t) for t in (1.0, 1.1, 1.19, 1.2, 1.3, 0.5)] == [False, False, False, True, True, True]
    left = make(trigger="horizon", horizon_left=2)
    assert left.wants(1.0)
    left.add(chunk(1.0, [0.0] * 10), 1.0)
    assert [left.wants(t) for t in (1.0, 1.7, 1.81)] == [False, False, True]
    left.delay.add(0.3)
    assert left.wants(1.51)
    left.hold(1.0)
    assert left.wants(1.0)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(MODES),
    st.lists(st.tuples(st.floats(0.001, 0.3), st.floats(0.0, 0.4), st.floats(-1e3, 1e3)), max_size=30),
)
def test_whatever_the_mode_values_stay_between_what_was_planned(
    mode: str, events: list[tuple[float, float, float]]
) -> None:
    """Every mode makes means: no command lies beyond the extremes of the chunks that were accepted."""
    scheduler, now, low, high = make(mode=mode), 1.0, math.inf, -math.inf
    for pause, age, level in events:
        now += pause
        item = chunk(now - age, [level, level + 1, level - 1, level] * 2)
        if scheduler.add(item, now) is Verdict.ACCEPTED:
            low, high = min(low, level - 1), max(high, level + 1)
        command = scheduler.sample(now)
        if command is not None:
            assert low - 1e-6 <= command.values[0] <= high + 1e-6
