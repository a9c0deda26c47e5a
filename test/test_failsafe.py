"""Flags in, worst action out: severity, latches, what clears what."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_infer.failsafe import TABLE, Clears, Failsafe, Flag, Level
from vla_infer.safety_options import FailsafeOptions

LATCHING = [flag for flag in Flag if TABLE[flag].clears in (Clears.ACTIVATION, Clears.RESET)]
FLEETING = [flag for flag in Flag if flag not in LATCHING]


def test_every_flag_has_a_row() -> None:
    assert set(TABLE) == set(Flag)
    assert Level.RUN < Level.WARN < Level.HOLD < Level.DEACTIVATE < Level.EXIT


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(FLEETING, 2)))
def test_the_worst_wins(first: Flag, second: Flag) -> None:
    state = Failsafe().assess({first: "one", second: "two"}, 0)
    assert state.level == max(TABLE[first].level, TABLE[second].level)
    assert state.drops_plan == (TABLE[first].drops_plan or TABLE[second].drops_plan)


def test_nothing_raised_is_run() -> None:
    state = Failsafe().assess({}, 0)
    assert (state.level, state.flag, state.reason) == (Level.RUN, None, "")


def test_a_hold_for_observations_clears_after_three_good_frames() -> None:
    failsafe = Failsafe()
    assert failsafe.assess({Flag.OBSERVATION: "top is gone"}, 10).level is Level.HOLD
    for frames in (10, 11, 12):
        state = failsafe.assess({}, frames)
        assert state.level is Level.HOLD
        assert not state.drops_plan  # a chunk from a good frame may be kept for the end of the hold
        assert state.reason == f"top is gone; {frames - 10} of 3 good frames since"
    assert failsafe.assess({}, 13).level is Level.RUN
    # A bad frame in between starts the count anew.
    failsafe.assess({Flag.OBSERVATION: ""}, 20)
    failsafe.assess({}, 22)
    failsafe.assess({Flag.OBSERVATION: ""}, 22)
    assert failsafe.assess({}, 24).level is Level.HOLD
    assert failsafe.assess({}, 25).level is Level.RUN


def test_no_plan_clears_at_once() -> None:
    failsafe = Failsafe()
    assert failsafe.assess({Flag.NO_PLAN: ""}, 1).level is Level.HOLD
    assert failsafe.assess({}, 1).level is Level.RUN


def test_the_emergency_stop_outlasts_activation_and_only_a_reset_clears_it() -> None:
    failsafe = Failsafe()
    failsafe.latch(Flag.EMERGENCY_STOP, "button")
    failsafe.latch(Flag.EMERGENCY_STOP, "again")
    for _ in range(3):
        state = failsafe.assess({}, 100)
        assert (state.level, state.flag, state.reason) == (Level.DEACTIVATE, Flag.EMERGENCY_STOP, "button")
        failsafe.activate()
        failsafe.inferred()
    assert failsafe.stopped
    failsafe.reset()
    assert not failsafe.stopped
    assert failsafe.assess({}, 100).level is Level.RUN


def test_a_reset_clears_nothing_else() -> None:
    failsafe = Failsafe()
    failsafe.latch(Flag.TRIPPED, "joint")
    failsafe.reset()
    assert failsafe.assess({}, 0).level is Level.DEACTIVATE
    failsafe.activate()
    assert failsafe.assess({}, 0).level is Level.RUN


def test_three_failures_in_a_row_need_an_operator() -> None:
    failsafe = Failsafe()
    failsafe.engine_failed("a")
    assert failsafe.assess({}, 0).level is Level.HOLD
    failsafe.engine_failed("b")
    failsafe.inferred()
    assert failsafe.assess({}, 0).level is Level.RUN
    for reason in "abc":
        failsafe.engine_failed(reason)
    failsafe.inferred()
    state = failsafe.assess({}, 0)
    assert (state.level, state.flag) == (Level.DEACTIVATE, Flag.ENGINE_GONE)
    assert state.reason == "3 inferences failed in a row: c"
    failsafe.activate()
    assert failsafe.assess({}, 0).level is Level.RUN


def test_a_lost_device_exits_at_the_first_failure() -> None:
    failsafe = Failsafe()
    failsafe.engine_failed("the GPU has fallen off the bus", lost=True)
    state = failsafe.assess({}, 0)
    assert (state.level, state.flag) == (Level.EXIT, Flag.DEVICE_LOST)


def test_only_flags_that_latch_can_be_latched() -> None:
    for flag in FLEETING:
        with pytest.raises(ValueError, match="no flag that latches"):
            Failsafe().latch(flag, "")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["raise", "latch", "frame", "activate", "reset", "fail", "work"]),
            st.sampled_from(list(Flag)),
        ),
        max_size=60,
    )
)
def test_never_better_than_anything_in_force(events: list[tuple[str, Flag]]) -> None:
    """A second bookkeeping, kept simple: the level is the maximum over what should be in force."""
    failsafe, frames, failures = Failsafe(FailsafeOptions(engine_tries=2)), 0, 0
    latched: set[Flag] = set()
    waiting: dict[Flag, int] = {}
    for kind, flag in events:
        raised: dict[Flag, str] = {}
        if kind == "raise" and flag in FLEETING:
            raised = {flag: "why"}
            if TABLE[flag].clears is Clears.FRAMES:
                waiting[flag] = frames
        elif kind == "latch" and flag in LATCHING:
            failsafe.latch(flag, "why")
            latched.add(flag)
        elif kind == "frame":
            frames += 1
        elif kind == "activate":
            failsafe.activate()
            latched &= {Flag.EMERGENCY_STOP}
            waiting.clear()
            failures = 0
        elif kind == "reset":
            failsafe.reset()
            latched -= {Flag.EMERGENCY_STOP}
        elif kind == "fail":
            failsafe.engine_failed("x")
            failures += 1
            latched |= {Flag.ENGINE_GONE} if failures >= 2 else set()
        elif kind == "work":
            failsafe.inferred()
            failures = 0
        waiting = {flag: since for flag, since in waiting.items() if frames - since < 3}
        force = latched | set(raised) | set(waiting) | ({Flag.ENGINE} if failures else set())
        expected = max((TABLE[flag].level for flag in force), default=Level.RUN)
        assert failsafe.assess(raised, frames).level is expected
