"""Time slices: by thread, inherited, and given back."""

from __future__ import annotations

import threading

import pytest

from vla_infer import time_slice


def in_thread(function: object) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()))  # type: ignore[operator]
    thread.start()
    thread.join()
    return results[0]


def test_short_in_one_thread_only_and_usual_again() -> None:
    usual = time_slice.time_slice()

    def work() -> tuple[object, ...]:
        if not time_slice.ask_for_short_slice():
            return ()
        child = in_thread(time_slice.time_slice)
        relieved = in_thread(lambda: (time_slice.ask_for_usual_slice(), time_slice.time_slice()))
        mine = time_slice.time_slice()
        return mine, child, relieved, time_slice.ask_for_usual_slice(), time_slice.time_slice()

    found = in_thread(work)
    if not found:
        pytest.skip("needs a kernel that grants time slices (Linux 6.12)")
    assert found == (time_slice.SHORT, time_slice.SHORT, (True, usual), True, usual)
    assert time_slice.time_slice() == usual


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_slice.platform, "machine", lambda: "riscv64")
    assert not time_slice.ask_for_short_slice()
    assert time_slice.time_slice() is None
