"""What the demonstration measures and shows."""

from __future__ import annotations

import numpy as np
import pytest

from vla_infer.demo.figures import live_line, progress, table, ticks

RATE, PERIOD = 50.0, 20_000_000  # Hz, ns


def grid(count: int, *, jitter: int = 100_000, start: int = 1_700_000_000_000_000_000) -> np.ndarray:
    noise = np.random.default_rng(1).integers(0, jitter, count)
    return start + np.arange(count, dtype=np.int64) * PERIOD + noise


def test_a_steady_timer_is_never_late() -> None:
    measured = ticks(grid(1000).tolist(), RATE)
    assert (measured.late, measured.missed, measured.due) == (0, 0, 1000)
    assert measured.rate == pytest.approx(50, rel=1e-3)
    assert measured.lateness.max() < 0.2


def test_each_late_tick_counts_once() -> None:
    stamps = grid(1000)
    stamps[[10, 500, 700]] += 5_000_000
    stamps[300] += 1_500_000  # within the 2 ms
    measured = ticks(stamps.tolist(), RATE)
    assert measured.late == 3
    assert measured.missed == 0
    assert measured.lateness.max() == pytest.approx(5, abs=0.2)


def test_ticks_that_never_came_count_as_late() -> None:
    measured = ticks(np.delete(grid(1000), [400, 401, 402]).tolist(), RATE)
    assert (measured.late, measured.missed, measured.due) == (3, 3, 1000)


def test_a_stall_made_up_for_in_a_burst_does_not_shift_the_grid() -> None:
    stamps = grid(1000)
    stamps[200:203] = stamps[203] - np.array([300_000, 200_000, 100_000])  # three at once, with the fourth
    measured = ticks(np.sort(stamps).tolist(), RATE)
    assert 3 <= measured.late <= 4
    assert np.percentile(measured.lateness, 99) < 1


def test_a_first_command_off_the_grid_changes_nothing_for_the_others() -> None:
    stamps = grid(500)
    stamps[0] += 9_000_000
    assert ticks(stamps.tolist(), RATE).late == 1


def test_a_clock_that_runs_apart_is_followed() -> None:
    stamps = grid(30_000)
    drifting = stamps[0] + ((stamps - stamps[0]) * (1 + 30e-6)).astype(np.int64)  # 18 ms in ten minutes
    assert ticks(drifting.tolist(), RATE).late_share < 0.001


def test_half_the_rate_is_half_missed() -> None:
    assert ticks(grid(1000)[::2].tolist(), RATE).late_share == pytest.approx(0.5, abs=0.01)


def test_no_command_yet() -> None:
    measured = ticks([], RATE)
    assert (measured.due, measured.rate, measured.late_share) == (0, 0.0, 0.0)
    assert "commands   0.0 Hz" in live_line(0.0, 20, measured, {})
    assert table(measured, RATE, {})


def test_progress_bar() -> None:
    assert progress(5, 20) == "[#####...............]  5/20 s"
    assert progress(99, 20) == "[####################] 20/20 s"


def test_table_shows_what_the_node_reports() -> None:
    stamps = grid(1000)
    stamps[20:40] += 4_000_000
    text = "\n".join(
        table(
            ticks(stamps.tolist(), RATE),
            RATE,
            {
                "control": {
                    "observation age at publication p50 ms": "26.10",
                    "commands_held": "7",
                    "ticks": "990",
                    "ticks_late": "5",
                    "ticks_missed": "10",
                },
                "observations": {
                    "received top/image_raw": "601",
                    "rejected top/image_raw": "2",
                    "ticks_stale": "5",
                },
                "inference": {"inferences": "300", "predict p50 ms": "18.00", "predict max ms": "31.00"},
            },
        )
    )
    for part in (
        "50.00 Hz of 50 Hz",
        "20 of 1000 (2.00%)",
        "15 of 1000 (1.50%, asked: at most 1%): MISSED",
        "p50 26.10",
        "601 received, 2 rejected",
        "300 done",
        "p50 18.00   max 31.00 ms",
        "7 held",
        "5 ticks stale",
    ):
        assert part in text
