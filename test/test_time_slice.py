"""Time slices: by thread, inherited, and given back."""

from __future__ import annotations

import os
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


def test_real_time_in_one_thread_only_and_usual_again() -> None:
    def work() -> tuple[object, ...]:
        refused = time_slice.ask_for_realtime(5)
        if refused:
            return (refused,)
        mine = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
        child = in_thread(lambda: os.sched_getscheduler(0))
        relieved = in_thread(lambda: (time_slice.ask_for_usual_slice(), os.sched_getscheduler(0))[1])
        return mine, child, relieved, os.sched_getscheduler(0)

    found = in_thread(work)
    if len(found) == 1:  # type: ignore[arg-type]
        pytest.skip(f"needs leave to use SCHED_FIFO ({found[0]})")  # type: ignore[index]
    assert found == ((os.SCHED_FIFO, 5), os.SCHED_FIFO, os.SCHED_OTHER, os.SCHED_FIFO)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_real_time_priority_that_is_refused_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(time_slice.os, "sched_setscheduler", refuse)
    assert time_slice.ask_for_realtime(5) == "Operation not permitted"


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_slice.platform, "machine", lambda: "riscv64")
    assert not time_slice.ask_for_short_slice()
    assert time_slice.time_slice() is None
