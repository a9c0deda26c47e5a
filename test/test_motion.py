"""Scheduler, ramp, guard and failsafe together, as the node uses them: what reaches the wire."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_infer.chunk import Chunk
from vla_infer.contract import Contract, parse_contract
from vla_infer.failsafe import Flag, Level
from vla_infer.motion import TRAJECTORY_END, Motion, Outgoing, measured_positions
from vla_infer.safety_options import MODES
from vla_infer.scheduler import Verdict

CONFIG = Path(__file__).resolve().parent.parent / "config"
P = 0.02
STEP = 1 / 30
V_MAX = 3.0
_frames = itertools.count(1)


@cache
def document(name: str) -> Any:
    return yaml.safe_load((CONFIG / f"{name}.yaml").read_text())


def contract(name: str = "so101", **change: Any) -> Contract:
    return parse_contract({**document(name), **change}, file="f.yaml")


def wide(joints: int, **change: Any) -> Contract:
    """One command of many joints, all of them with the same limits: each is a case of its own."""
    names = [f"j{i}" for i in range(joints)]
    limit = {"position": [-2.0, 2.0], "velocity": V_MAX, "acceleration": 60.0, "step": 0.1}
    command = {"topic": "c", "joints": names, "limits": dict.fromkeys(names, limit)}
    return contract(command=command, **change)


def chunk(commands: Any, observed_at: float) -> Chunk:
    values = np.asarray(commands, dtype=np.float64)
    return Chunk(np.clip(values, -1e30, 1e30).astype(np.float32), values, observed_at, STEP, next(_frames))


def constant(value: float, observed_at: float, *, rows: int = 50, width: int = 6) -> Chunk:
    return chunk(np.full((rows, width), value), observed_at)


def started(at: float = 1.0, made: Contract | None = None, **change: Any) -> Motion:
    made = made or contract(**change)
    motion = Motion(made, P)
    motion.start(at)
    motion.stand(np.zeros(made.action_dim))
    return motion


def test_nothing_is_sent_before_the_first_chunk() -> None:
    motion = started()
    for flags in ({}, {Flag.OBSERVATION: "x"}):
        out = motion.tick(1.0, flags, 0)
        assert out.values is None
        assert out.state.level is Level.HOLD
    assert motion.still(1.0) is None


def test_the_first_motion_starts_where_the_robot_stands_and_is_ramped() -> None:
    motion = started()
    motion.take(constant(0.05, 1.0), 1.0)
    path = [motion.tick(1.0 + P * i, {}, i).values for i in range(40)]
    first = np.array([values[0] for values in path if values is not None])
    assert len(first) == 40
    assert 0 < first[0] < 0.05 * P / 0.3 * 1.01
    assert (np.diff(first) >= -1e-12).all()
    assert first[16] == pytest.approx(0.05, rel=0.05)
    assert first[-1] == pytest.approx(0.05)


def test_hold_repeats_the_last_sent_position_exactly() -> None:
    motion = started()
    motion.take(chunk(np.linspace(0, 1, 50)[:, None] * np.ones(6), 1.0), 1.0)
    for i in range(30):
        out = motion.tick(1.0 + P * i, {}, i)
    sent = out.values
    for i in range(30, 60):
        held = motion.tick(1.0 + P * i, {Flag.OBSERVATION: "top is stale"}, 30)
        assert held.held
        assert held.state.reason == "top is stale"
        np.testing.assert_array_equal(held.values, sent)
    assert motion.at_rest


def test_resuming_takes_three_frames_a_chunk_and_a_ramp() -> None:
    motion = started()
    motion.take(constant(0.3, 1.0), 1.0)
    for i in range(50):
        out = motion.tick(1.0 + P * i, {}, i)
    stood = out.values
    motion.tick(2.0, {Flag.OBSERVATION: "gone"}, 50)
    assert motion.take(constant(0.6, 1.99), 2.01)[0] is Verdict.BEFORE_RESET
    held = motion.tick(2.02, {}, 51)
    assert motion.take(constant(0.6, 2.03), 2.03)[0] is Verdict.ACCEPTED
    for frames, now in ((51, 2.04), (52, 2.06)):
        held = motion.tick(now, {}, frames)
        assert held.held
        np.testing.assert_array_equal(held.values, stood)
    path = [motion.tick(2.08 + P * i, {}, 53 + i) for i in range(30)]
    assert not any(out.held for out in path)
    moved = np.array([out.values[0] for out in path])  # type: ignore[index]
    assert stood is not None
    steps = np.diff(np.concatenate([stood[:1], moved]))
    assert steps[0] < 0.3 * P / 0.3 * 1.01  # the gap of 0.3 rad over 0.3 s, not at v_max
    assert moved[-1] == pytest.approx(0.6, abs=1e-3)


def test_velocities_ramp_to_zero_and_an_emergency_stop_is_at_once() -> None:
    for flag, expected in (
        (Flag.OBSERVATION, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0]),
        (None, [0.0]),
    ):
        motion = started(made=contract("lekiwi"))
        row = np.zeros(9)
        row[6] = 0.2
        motion.take(chunk(np.tile(row, (50, 1)), 1.0), 1.0)
        for i in range(40):
            out = motion.tick(1.0 + P * i, {}, i)
        assert out.values is not None
        assert out.values[6] == pytest.approx(0.2)
        if flag is None:
            motion.failsafe.latch(Flag.EMERGENCY_STOP, "button")
        held = [motion.tick(1.8 + P * i, {flag: ""} if flag else {}, 40) for i in range(len(expected))]
        np.testing.assert_allclose([o.values[6] for o in held], 0.2 * np.array(expected), atol=1e-6)  # type: ignore[index]
        assert motion.at_rest


def test_a_velocity_starts_from_zero_after_a_hold() -> None:
    motion = started(made=contract("lekiwi", failsafe={"resume_ramp": 0.0}))
    row = np.zeros(9)
    row[6] = 0.2
    motion.take(chunk(np.tile(row, (90, 1)), 1.0), 1.0)
    for i in range(40):
        motion.tick(1.0 + P * i, {}, i)
    for i in range(40, 55):
        motion.tick(1.0 + P * i, {Flag.NO_PLAN: ""}, i)
    out = motion.tick(2.1, {}, 55)
    assert out.values is not None
    assert 0 < out.values[6] <= 0.5 * P  # acceleration limit 0.5 m/s²


@pytest.mark.parametrize("mode", MODES)
def test_seams_a_hundred_thousand(mode: str) -> None:
    """400 joints, at least 250 chunks that are taken, in every mode: 10^5 seams each with step <= v_max P."""
    joints, rng = 400, np.random.default_rng(MODES.index(mode))
    motion = started(made=wide(joints, scheduler={"mode": mode}))
    now, seams, before = 1.0, 0, np.zeros(joints)
    for number in range(400):
        latency = rng.uniform(0.0, 0.3) if number else 0.0
        walk = rng.uniform(-3, 3, joints) + np.cumsum(rng.normal(0, 0.1, (20, joints)), axis=0)
        verdict, _ = motion.take(chunk(walk, now - latency), now)
        seams += joints if verdict is Verdict.ACCEPTED and number else 0
        for _ in range(int(rng.integers(1, 14))):
            now += P
            values = motion.tick(now, {}, number).values
            assert values is not None
            assert (np.abs(values - before) <= V_MAX * P).all()
            assert (np.abs(values) <= 2.0).all()
            before = values
    assert seams >= 100_000


@pytest.mark.parametrize("mode", MODES)
def test_spikes_anywhere_in_a_chunk(mode: str) -> None:
    """Each joint has a spike of up to 1e307 in a row of its own: 250 000 cases a mode, no bad command."""
    joints, rng = 5000, np.random.default_rng(7)
    motion = started(made=wide(joints, scheduler={"mode": mode}))
    now, before, change = 1.0, np.zeros(joints), np.zeros(joints)
    for number in range(50):
        values = np.sin(now + np.arange(12)[:, None] * STEP + np.arange(joints))
        spike = rng.choice([-1, 1], joints) * 10 ** rng.uniform(-1, 307, joints)
        values[rng.integers(0, 12, joints), np.arange(joints)] += spike
        motion.take(chunk(values, now), now)
        for _ in range(8):
            now += P
            out = motion.tick(now, {}, number)
            assert out.values is not None
            assert np.isfinite(out.values).all()
            assert (np.abs(out.values) <= 2.0).all()
            step = out.values - before
            assert (np.abs(step) <= min(V_MAX * P, 0.1)).all()
            assert out.held or (np.abs(step - change) <= 60.0 * P**2 + 1e-12).all()
            before, change = out.values, np.zeros(joints) if out.held else step


def test_a_nan_anywhere_refuses_the_chunk_and_the_old_one_plays_on() -> None:
    """Every place of a chunk, every kind: the command stream is the same as without the chunk."""
    clean, spoilt = started(), started()
    path = np.linspace(0, 0.5, 50)[:, None] * np.ones(6)
    for motion in (clean, spoilt):
        motion.take(chunk(path, 1.0), 1.0)
    for place, bad in itertools.product(range(300), (math.nan, math.inf, -math.inf)):
        values = path + 0.3
        values.flat[place] = bad
        now = 1.0 + P * (place % 20) / 20
        verdict, reason = spoilt.take(chunk(values, now), now)
        assert verdict is None
        assert "not finite" in reason
    for i in range(60):
        np.testing.assert_array_equal(
            clean.tick(1.0 + P * i, {}, i).values,
            spoilt.tick(1.0 + P * i, {}, i).values,
        )


def test_a_trip_holds_and_waits_for_an_operator() -> None:
    motion = started(guard={"position": "trip"})
    motion.take(constant(0.1, 1.0), 1.0)
    for i in range(25):
        out = motion.tick(1.0 + P * i, {}, i)
    stood = out.values
    assert motion.take(constant(3.0, 1.4), 1.5)[0] is None
    for i in range(25, 60):
        held = motion.tick(1.0 + P * i, {}, i)
        assert (held.state.level, held.state.flag) == (Level.DEACTIVATE, Flag.TRIPPED)
        np.testing.assert_array_equal(held.values, stood)
    motion.start(3.0)
    motion.stand(np.zeros(6))
    motion.take(constant(0.1, 3.0), 3.0)
    assert motion.tick(3.0, {}, 0).state.level is Level.RUN


def test_standing_outside_the_limits_deactivates() -> None:
    made = contract()
    motion = Motion(made, P)
    motion.start(1.0)
    motion.stand(np.array([2.5, 0, 0, 0, 0, 0]))
    motion.take(constant(0.1, 1.0), 1.0)
    out = motion.tick(1.0, {}, 0)
    assert out.values is None
    assert (out.state.level, out.state.flag) == (Level.DEACTIVATE, Flag.UNSAFE_START)
    assert "'shoulder_pan' is at 2.5" in out.state.reason


def test_a_preview_is_what_follows_and_ends_in_time() -> None:
    rng = np.random.default_rng(2)
    motion = started(made=wide(50))
    motion.take(chunk(np.cumsum(rng.normal(0, 0.2, (30, 50)), axis=0), 1.0), 1.0)
    for i in range(20):
        out = motion.tick(1.0 + P * i, {}, i)
    assert out.values is not None
    values, times = motion.preview(1.0 + P * 19, out.values)
    assert times[-1] <= TRAJECTORY_END + 1e-9
    assert len(times) == 9
    np.testing.assert_allclose(np.diff(times), P)
    np.testing.assert_array_equal(values[0], out.values)
    for i, row in enumerate(values[1:], start=20):
        # Instants computed in another order differ in their last bit.
        np.testing.assert_allclose(motion.tick(1.0 + P * i, {}, i).values, row, rtol=0, atol=1e-12)
    nearly = motion.preview(1.0 + 30 * STEP - 0.05, values[0])
    assert nearly[1][-1] <= 0.05 + P + 1e-9  # nothing beyond the plan


def test_a_preview_leaves_no_trace() -> None:
    one, two = started(), started()
    for motion in (one, two):
        motion.take(constant(1.0, 1.0), 1.0)
    for i in range(60):
        a, b = (motion.tick(1.0 + P * i, {}, i) for motion in (one, two))
        assert a.values is not None
        one.preview(1.0 + P * i, a.values)
        np.testing.assert_array_equal(a.values, b.values)


def test_where_the_robot_stands_comes_from_the_state_by_name() -> None:
    so101 = contract()
    vector = so101.states[0].units.to_policy(np.arange(6) * 0.1).astype(np.float32)
    np.testing.assert_allclose(measured_positions(so101, [vector]), np.arange(6) * 0.1, atol=1e-6)
    assert np.isnan(measured_positions(so101, [None])).all()
    base = measured_positions(contract("lekiwi"), [vector, np.zeros(3, dtype=np.float32)])
    np.testing.assert_array_equal(np.isnan(base), [False] * 6 + [True] * 3)
    aloha = contract("aloha")  # the same joint names on the left and on the right
    left, right = (
        s.units.to_policy(np.full(7, v)).astype(np.float32)
        for s, v in zip(aloha.states, (0.02, 0.05), strict=True)
    )
    np.testing.assert_allclose(measured_positions(aloha, [left, right]), [0.02] * 7 + [0.05] * 7, atol=1e-6)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["chunk", "nan", "stale", "estop", "reset", "start", "fail", "tick", "tick", "tick"]),
        st.floats(0, 0.2),
        st.floats(-4, 4),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MODES), EVENTS)
def test_any_history_keeps_the_limits(mode: str, events: list[tuple[str, float, float]]) -> None:
    motion = started(scheduler={"mode": mode})
    pan = contract().commands[0].limits[0]
    now, frames, last, at = 1.0, 0, 0.0, np.zeros(6)
    for kind, pause, value in events:
        now += pause
        frames += 1
        raised = {}
        if kind in ("chunk", "nan"):
            item = constant(math.nan if kind == "nan" else value, now - 0.05, rows=20)
            motion.take(item, now)
        elif kind == "stale":
            raised = {Flag.OBSERVATION: "gone"}
        elif kind == "estop":
            motion.failsafe.latch(Flag.EMERGENCY_STOP, "button")
        elif kind == "reset":
            motion.failsafe.reset()
        elif kind == "fail":
            motion.failsafe.engine_failed("x")
        elif kind == "start":
            motion.start(now)
            motion.stand(at)
        out: Outgoing = motion.tick(now, raised, frames)
        if out.values is None:
            continue
        assert np.isfinite(out.values).all()
        assert pan.position is not None
        assert pan.velocity is not None
        assert pan.position[0] <= out.values[0] <= pan.position[1]
        assert abs(out.values[0] - last) <= pan.velocity * P
        if motion.failsafe.stopped or raised:
            assert out.held
            assert out.values[0] == last
        last, at = float(out.values[0]), out.values
