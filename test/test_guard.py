"""Nothing beyond a limit leaves the guard: wide arrays of seeded cases, and each response on its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_infer.chunk import Chunk
from vla_infer.contract import load_contract, parse_contract
from vla_infer.errors import ContractError
from vla_infer.guard import Guard, braking_step
from vla_infer.limits import UNLIMITED, LimitArrays, limit_arrays
from vla_infer.safety_options import GuardOptions, Response

P = 0.02
CONFIG = Path(__file__).resolve().parent.parent / "config"
NAN = math.nan


def limits(count: int = 1, **given: Any) -> LimitArrays:
    values: dict[str, Any] = {
        "position": True,
        "low": -UNLIMITED,
        "high": UNLIMITED,
        "velocity": UNLIMITED,
        "acceleration": UNLIMITED,
        "step": UNLIMITED,
        **given,
    }
    arrays = {key: np.broadcast_to(np.asarray(value), (count,)).copy() for key, value in values.items()}
    return LimitArrays(names=tuple(f"joint{i}" for i in range(count)), period=P, **arrays)


def random_limits(rng: np.random.Generator, count: int) -> LimitArrays:
    """Every third limit is not given; positions, velocities and efforts mixed."""

    def some(values: np.ndarray) -> np.ndarray:
        return np.where(rng.random(count) < 1 / 3, UNLIMITED, values)

    middle = rng.uniform(-2, 2, count)
    width = some(rng.uniform(0.01, 3, count))
    position = rng.random(count) < 0.7
    return LimitArrays(
        names=tuple(f"joint{i}" for i in range(count)),
        position=position,
        low=np.where(position, middle, 0) - width,
        high=np.where(position, middle, 0) + width,
        velocity=some(10 ** rng.uniform(-2, 1.5, count)),
        acceleration=some(10 ** rng.uniform(-1, 2, count)),
        step=some(10 ** rng.uniform(-3, 0, count)),
        period=P,
    )


def targets(rng: np.random.Generator, count: int, ticks: int) -> np.ndarray:
    """(ticks, count): walks, jumps, spikes, constants and absurd magnitudes, joint by joint."""
    walk = np.cumsum(rng.normal(0, 10 ** rng.uniform(-4, 0, count), (ticks, count)), axis=0)
    jumps = np.repeat(rng.normal(0, 3, (ticks // 10 + 1, count)), 10, axis=0)[:ticks]
    spikes = np.where(rng.random((ticks, count)) < 0.05, rng.choice([-1, 1], (ticks, count)) * 1e3, 0)
    huge = rng.choice([0.0, 1e308, -1e308, 1e-300], (ticks, count))
    kind = rng.integers(0, 4, count)
    result: np.ndarray = np.choose(kind, [walk, jumps, walk + spikes, huge])
    return result


def limited(values: np.ndarray) -> np.ndarray:
    return np.where(values < UNLIMITED, values, np.inf)


def bad(limit: LimitArrays, sent: np.ndarray) -> np.ndarray:
    """(ticks, A): which of the commands break a limit, the rules written out anew."""
    wrong = ~np.isfinite(sent) | (sent < limit.low) | (sent > limit.high)
    first = np.abs(np.diff(sent, axis=0))
    second = np.abs(np.diff(sent, n=2, axis=0))
    wrong[1:] |= first > limit.step
    wrong[1:] |= limit.position & (first > limited(limit.velocity) * limit.period)
    wrong[1:] |= ~limit.position & (first > limited(limit.acceleration) * limit.period)
    # Rounding of a difference of differences: some units in the last place of the values.
    slack = 1e-14 * (1 + np.abs(sent[2:]).clip(max=1e90))
    wrong[2:] |= limit.position & (second > limited(limit.acceleration) * limit.period**2 + slack)
    return wrong


@pytest.mark.parametrize("seed", range(5))
def test_no_bad_command_in_a_million_cases(seed: int) -> None:
    """5 seeds x 1000 joints with limits of their own x 200 ticks: 10^6 commands of one number."""
    rng = np.random.default_rng(seed)
    limit = random_limits(rng, 1000)
    guard = Guard(limit)
    start = np.clip(rng.normal(0, 1, 1000), limit.low, limit.high)
    assert guard.start(np.where(limit.position, start, NAN)) == ""
    wanted = targets(rng, 1000, 200)
    sent = [np.where(limit.position, start, 0.0)]
    for row in wanted:
        checked = guard.command(row)
        assert checked.values is not None
        sent.append(checked.values)
    assert not bad(limit, np.array(sent)).any()


def test_what_is_within_the_limits_passes_unchanged() -> None:
    limit = limits(low=-1, high=1, velocity=1.0, acceleration=10.0, step=0.1)
    guard = Guard(limit)
    guard.start(np.array([0.0]))
    for tick in range(300):
        target = 0.5 - 0.5 * math.cos(0.03 * tick)  # at most 0.75 1/s and 1.1 1/s²
        checked = guard.command(np.array([target]))
        assert checked.values is not None
        assert checked.values[0] == pytest.approx(target, abs=1e-12)
        assert checked.outcome is None


@pytest.mark.parametrize("acceleration", [UNLIMITED, 20.0, 2.0])
def test_a_jump_is_closed_without_overshoot(acceleration: float) -> None:
    guard = Guard(limits(velocity=2.0, acceleration=acceleration))
    guard.start(np.array([0.0]))
    path = [float(guard.command(np.array([1.0])).values[0]) for _ in range(200)]  # type: ignore[index]
    assert max(path) <= 1.0 + 1e-9
    assert path[-1] == pytest.approx(1.0)
    assert (np.diff(path) >= -1e-12).all()
    assert guard.counts["velocity"] + guard.counts["acceleration"] > 0


def test_braking_step_is_the_largest_that_can_stop() -> None:
    rng = np.random.default_rng(3)
    distance, second = 10 ** rng.uniform(-6, 2, 1000), 10 ** rng.uniform(-5, 1, 1000)
    step = braking_step(distance, second)
    for scale, fits in ((1.0, True), (1.001, False)):
        run = np.zeros(1000)
        current = step * scale
        while (current > 0).any():
            run += current
            current = np.maximum(current - second, 0.0)
        assert (run <= distance * (1 + 1e-9)).all() == fits


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    for response in (Response.REJECT, Response.TRIP):
        guard = Guard(limits(3, low=-1, high=1), GuardOptions(not_finite=response))
        assert guard.command(np.array([0.1, value, 0.1])).values is None  # nothing is known to stay at
        guard.start(np.array([0.5, 0.5, 0.5]))
        checked = guard.command(np.array([0.1, value, 0.1]))
        assert checked.outcome is response
        np.testing.assert_array_equal(checked.values, [0.5, 0.5, 0.5])
        assert guard.counts["not_finite"] == 2


def test_a_chunk_with_one_number_that_is_not_finite_is_refused_whole() -> None:
    """10^6 cases: any place of a chunk, any of the three, over thousands of chunks."""
    rng = np.random.default_rng(0)
    guard = Guard(limits(6, low=-1, high=1, velocity=1.0))
    for chunks in range(2_000):
        commands = rng.normal(0, 10 ** rng.uniform(-3, 300), (8, 6))
        chunk = Chunk(np.zeros((8, 6), np.float32), commands, 1.0, 0.1, 1)
        flat = commands.reshape(-1)
        for place, value in zip(
            rng.integers(flat.size, size=500), rng.choice([NAN, math.inf, -math.inf], 500), strict=True
        ):
            right, flat[place] = flat[place], value
            checked = guard.check(chunk)
            flat[place] = right
            assert checked.chunk is None
            assert checked.outcome is Response.REJECT
        assert guard.counts["chunk_not_finite"] == 500 * (chunks + 1)


def test_a_chunk_is_clamped_refused_or_trips_kind_by_kind() -> None:
    limit = limits(2, low=-1, high=1, velocity=1.0, acceleration=5.0, step=0.5)
    smooth = np.linspace(0, 0.1, 10)[:, None] * np.ones(2)
    cases = {
        "position": smooth + np.array([0.0, 1.5]),
        "velocity": smooth * 5,
        "acceleration": smooth * np.array([[1, -1] * 5]).T,
        "step": smooth + np.where(np.arange(10) > 5, 0.9, 0)[:, None] * np.array([0.0, 1.0]),
    }
    period = 0.02
    for kind, commands in cases.items():
        chunk = Chunk(commands.astype(np.float32), commands, 1.0, period, 7)
        others = {name: Response.CLAMP for name in ("position", "velocity", "acceleration", "step")}
        for response in (Response.REJECT, Response.TRIP):
            guard = Guard(limit, GuardOptions(**{**others, kind: response}))
            checked = guard.check(chunk)
            assert checked.chunk is None, kind
            assert checked.outcome is response
            assert checked.reason.startswith("chunk 7: row ")
            assert "joint" in checked.reason
            assert guard.counts[f"chunk_{kind}"] == 1
        guard = Guard(limit, GuardOptions(**others))
        clamped = guard.check(chunk)
        assert clamped.chunk is not None
        assert (np.abs(clamped.chunk.commands) <= 1).all()
        assert guard.counts[f"chunk_{kind}"] == 1
    fine = Guard(limit)
    same = fine.check(Chunk(smooth.astype(np.float32), smooth, 1.0, period, 1))
    np.testing.assert_array_equal(same.chunk.commands, smooth)  # type: ignore[union-attr]
    assert not fine.counts


@pytest.mark.parametrize("kind", ["position", "velocity", "acceleration", "step"])
def test_a_command_is_clamped_rejected_or_trips_kind_by_kind(kind: str) -> None:
    limit = {"position": {"low": -1, "high": 1}, "velocity": {"velocity": 1.0}, "step": {"step": 0.1}}
    given = limit.get(kind, {"acceleration": 1.0})
    target = np.array([0.9 if kind != "position" else 1.5])
    for response in Response:
        guard = Guard(limits(**given), GuardOptions(**{kind: response}))
        guard.start(np.array([0.0]))
        checked = guard.command(target)
        assert checked.outcome is response
        assert checked.values is not None
        assert guard.counts[kind] == 1
        assert checked.reason.startswith(f"'joint0' exceeds its {kind}")
        if response is Response.CLAMP:
            assert 0 < checked.values[0] <= 1.0
        else:
            assert checked.values[0] == 0.0


def test_velocities_and_efforts_are_bounded_and_ramped() -> None:
    guard = Guard(limits(position=False, low=-1, high=1, acceleration=5.0))
    path = [float(guard.command(np.array([3.0])).values[0]) for _ in range(15)]  # type: ignore[index]
    np.testing.assert_allclose(path[:5], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    assert path[-1] == 1.0
    assert guard.counts["velocity"] == 15
    rejected = Guard(limits(position=False, low=-1, high=1), GuardOptions(velocity=Response.REJECT))
    rejected.command(np.array([0.5]))
    assert rejected.command(np.array([3.0])).values == np.array([0.0])


def test_start_outside_the_limits_may_not_move() -> None:
    guard = Guard(limits(2, low=-1, high=1, velocity=1.0))
    assert guard.start(np.array([0.0, 1.01])) == ""  # within a step: taken as being at the limit
    assert "'joint1' is at 1.5, outside [-1, 1]" in guard.start(np.array([0.0, 1.5]))
    assert guard.start(np.array([NAN, 0.0])) == ""
    assert guard.last is None


def test_unknown_start_takes_the_first_command_within_its_limits() -> None:
    guard = Guard(limits(low=-1, high=1, velocity=1.0))
    first = guard.command(np.array([5.0]))
    assert first.values == np.array([1.0])
    second = guard.command(np.array([-1.0]))
    assert second.values is not None
    assert second.values[0] >= 1.0 - 1.0 * P


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=40), st.integers(0, 99))
def test_any_floats_at_all(values: list[float], seed: int) -> None:
    limit = random_limits(np.random.default_rng(seed), 1)
    guard = Guard(limit)
    sent = [float(np.clip(0.0, limit.low, limit.high)[0])]
    guard.start(np.array(sent))
    for value in values:
        checked = guard.command(np.array([value]))
        assert checked.values is not None
        if checked.outcome is Response.REJECT:  # a stop may be sudden
            assert checked.values[0] == (sent[-1] if limit.position[0] else 0.0)
            sent = [float(checked.values[0])]
        else:
            sent.append(float(checked.values[0]))
            assert not bad(limit, np.array(sent)[:, None]).any()


def test_limits_of_a_contract() -> None:
    found = limit_arrays(load_contract("lekiwi"), 0.02)
    assert found.names[:2] == ("shoulder_pan", "shoulder_lift")
    assert found.names[6:] == ("linear.x", "linear.y", "angular.z")
    np.testing.assert_array_equal(found.position, [True] * 6 + [False] * 3)
    assert (found.low[6], found.high[6]) == (-0.3, 0.3)
    assert found.rate[0] == pytest.approx(0.06)
    assert found.rate[6] == pytest.approx(0.01)
    assert found.second[0] == pytest.approx(0.008)
    assert found.unlimited == ()


URDF = """<?xml version="1.0"?><robot name="arm">
  <link name="base"/>
  <joint name="shoulder_pan" type="revolute"><limit lower="-1" upper="0.5" velocity="2" effort="9"/></joint>
  <joint name="shoulder_lift" type="continuous"><limit velocity="1.5" effort="9"/></joint>
  <joint name="elbow_flex" type="revolute"><limit lower="0" upper="0" velocity="0" effort="0"/></joint>
</robot>"""


def with_urdf(tmp_path: Path, text: str) -> Any:
    document: dict[str, Any] = yaml.safe_load((CONFIG / "so101.yaml").read_text())
    (tmp_path / "arm.urdf").write_text(text)
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump({**document, "urdf": "arm.urdf"}))
    return load_contract(tmp_path / "robot.yaml")


def test_urdf_limits_hold_where_they_are_narrower(tmp_path: Path) -> None:
    pan, lift, elbow = with_urdf(tmp_path, URDF).commands[0].limits[:3]
    assert pan.position == (-1.0, 0.5)
    assert pan.velocity == 2.0
    assert pan.acceleration == 20.0
    assert lift.position == (-1.74533, 1.74533)
    assert lift.velocity == 1.5
    assert elbow.position == (-1.69, 1.69)


BOMB = '<!DOCTYPE r [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><robot>&b;</robot>'
FILE = '<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><robot><joint name="&x;"/></robot>'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "document type"),
        (FILE, "document type"),
        ("<robot><joint", "not valid XML"),
        ("", "not valid XML"),
        ("<sdf/>", "expected <robot>"),
        ("<robot>" + "<a>" * 200, "nested more than 100"),
        (URDF.replace('lower="-1"', 'lower="nan"'), "joint 'shoulder_pan': limit lower: expected a number"),
        (URDF.replace('lower="-1"', 'lower="2"'), "lower 2 is above upper 0.5"),
        (URDF.replace('lower="-1" upper="0.5"', 'lower="3" upper="4"'), "do not overlap"),
        ("<robot>" + " " * (17 << 20) + "</robot>", "larger than 16 MiB"),
    ],
)
def test_a_bad_urdf_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ContractError, match=says.replace("[", r"\[")) as raised:
        with_urdf(tmp_path, text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"guard": {"not_finite": "clamp"}}, "guard.not_finite: expected one of reject, trip"),
        ({"guard": {"positon": "clamp"}}, "guard.positon: unknown key; did you mean 'position'"),
        ({"scheduler": {"mode": "newest"}}, "scheduler.mode"),
        ({"scheduler": {"mod": "rtc"}}, "did you mean 'mode'"),
        ({"failsafe": {"good_frames": 0}}, "failsafe.good_frames"),
        ({"instruction": {"default": "a", "allow": ["b"]}}, "instruction.default"),
    ],
)
def test_wrong_options_are_one_line(change: dict[str, Any], says: str) -> None:
    document: dict[str, Any] = yaml.safe_load((CONFIG / "so101.yaml").read_text())
    with pytest.raises(ContractError, match=says):
        parse_contract({**document, **change}, file="f.yaml")


def test_options_are_read() -> None:
    document: dict[str, Any] = yaml.safe_load((CONFIG / "so101.yaml").read_text())
    change = {
        "guard": {"position": "trip"},
        "scheduler": {"mode": "rtc", "interpolation": "none", "on_instruction": "keep"},
        "failsafe": {"good_frames": 5},
    }
    contract = parse_contract({**document, **change}, file="f.yaml")
    assert contract.guard.position is Response.TRIP
    assert (contract.scheduler.mode, contract.scheduler.linear) == ("rtc", False)
    assert not contract.scheduler.flush_on_instruction
    assert contract.failsafe.good_frames == 5
