"""Real-time chunking's inputs: weights along the horizon, gains along the steps, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vla_infer
from vla_infer.errors import ObservationError
from vla_infer.rtc import SCHEDULES, Rtc, gains, tape_inputs, weights

E = np.e


def held(n: int, delay: int, execution: int, schedule: str, horizon: int = 10) -> list[float]:
    rtc = Rtc(np.ones((n, 4), np.float32), delay, execution, schedule)
    values = weights(rtc, horizon)
    assert values.shape == (horizon, 1)
    assert values.dtype == np.float32
    return [float(v) for v in values[:, 0]]


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("LINEAR", [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0]),
        ("EXP", [1, 1, 1, *(w * (E**w - 1) / (E - 1) for w in (0.75, 0.5, 0.25)), 0, 0, 0, 0]),
        ("ONES", [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]),
        ("ZEROS", [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_schedules(schedule: str, want: list[float]) -> None:
    assert held(8, 3, 6, schedule) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "delay", "execution", "want"),
    [
        (4, 1, 8, [1, 0.75, 0.5, 0.25, 0, 0]),  # nothing to hold beyond the last chunk's end
        (6, 5, 3, [1, 1, 1, 0, 0, 0]),  # the delay is cut at the end
        (6, 0, 2, [2 / 3, 1 / 3, 0, 0, 0, 0]),
        (6, 0, 60, [6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        (6, 60, 60, [1, 1, 1, 1, 1, 1]),
        (0, 3, 6, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_edges(n: int, delay: int, execution: int, want: list[float]) -> None:
    assert held(n, delay, execution, "LINEAR", horizon=6) == pytest.approx(want, abs=1e-6)


@given(st.integers(0, 12), st.integers(0, 15), st.integers(1, 15), st.sampled_from(SCHEDULES))
def test_weights_fall(n: int, delay: int, execution: int, schedule: str) -> None:
    w = np.array(held(n, delay, execution, schedule, horizon=12))
    end = min(n, execution)
    assert (np.diff(w) <= 1e-7).all()
    assert (w[: min(delay, end)] == 1).all()
    assert (w[end:] == 0).all()
    assert ((w >= 0) & (w <= 1)).all()


def test_gains() -> None:
    """At tau = 1 - time: time / tau * (time^2 + tau^2) / time^2, bounded."""
    got = gains(10, 10.0)
    assert got.shape == (10, 1)
    assert got[0, 0] == 10.0
    assert got[1, 0] == pytest.approx(9 * 0.82 / 0.81)
    assert got[5, 0] == pytest.approx(2.0)
    assert got[9, 0] == pytest.approx(0.1 / 0.9 * 0.82 / 0.01)
    assert gains(10, 3.0).max() == 3.0
    assert gains(1, 7.0).tolist() == [[7.0]]


def test_tape_inputs_pad_with_zeros() -> None:
    rtc = vla_infer.Rtc(np.full((2, 3), 5.0, np.float32), 1, 2)
    values = tape_inputs(rtc, rtc.previous, horizon=4, width=6, steps=3)
    assert values["rtc_previous"].shape == (4, 6)
    assert values["rtc_previous"].sum() == 30
    assert values["rtc_gain"].shape == (3, 1)
    with pytest.raises(ObservationError, match=r"at most \(1, 6\), got \(2, 3\)"):
        tape_inputs(rtc, rtc.previous, horizon=1, width=6, steps=3)
    with pytest.raises(ObservationError, match=r"at most \(4, 2\), got \(2, 3\)"):
        tape_inputs(rtc, rtc.previous, horizon=4, width=2, steps=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"previous": np.zeros(3)}, r"finite matrix \(n, actions\), got \(3,\)"),
        ({"previous": np.full((2, 2), np.nan)}, "finite matrix"),
        ({"previous": np.array([["a"]])}, "finite matrix"),
        ({"previous": None}, "finite matrix"),
        ({"inference_delay": -1}, "inference_delay: expected 0 or more, got -1"),
        ({"inference_delay": 1.5}, "inference_delay: expected an integer, got 1.5"),
        ({"execution_horizon": 0}, "execution_horizon: expected 1 or more, got 0"),
        ({"schedule": "linear"}, "schedule: expected one of LINEAR, EXP, ONES, ZEROS, got 'linear'"),
        ({"max_guidance_weight": 0.0}, "max_guidance_weight: expected a number above 0"),
        ({"max_guidance_weight": float("inf")}, "max_guidance_weight"),
        ({"max_guidance_weight": float("nan")}, "max_guidance_weight"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"previous": np.zeros((2, 2)), "inference_delay": 1, "execution_horizon": 2}
    Rtc(**good)
    with pytest.raises(ObservationError, match=message):
        Rtc(**(good | change))
