"""Figures for diagnostics: percentiles over a window, counters, lateness of a periodic tick."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np


class Window:
    """The last `capacity` values of one quantity. Any thread may add; memory is fixed."""

    def __init__(self, capacity: int = 1024) -> None:
        self._values = np.zeros(capacity)
        self._count = 0
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        with self._lock:
            self._values[self._count % len(self._values)] = value
            self._count += 1

    @property
    def count(self) -> int:
        return self._count

    def percentiles(self) -> dict[str, float] | None:
        """p50, p95, p99 and max of the window; None while it is empty."""
        with self._lock:
            kept = self._values[: min(self._count, len(self._values))].copy()
        if not kept.size:
            return None
        p50, p95, p99 = np.percentile(kept, [50, 95, 99])
        return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(kept.max())}


class Counts:
    """Named counters that any thread may increase."""

    def __init__(self) -> None:
        self._counter: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counter[name] += count

    def __getitem__(self, name: str) -> int:
        return self._counter[name]

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counter)


class TickClock:
    """How late each tick of a fixed rate is, against a grid on which no tick so far was early.

    A timer fires after its time, never before, so a tick ahead of the grid shows that the first one was late.
    """

    def __init__(self, period: float, *, late: float = 0.002) -> None:
        self._period = period
        self._late = late
        self._start: float | None = None
        self._slot = 0
        self.lateness = Window()
        self.ticks = 0
        self.late = 0  # ticks more than `late` seconds behind the grid
        self.missed = 0  # grid times without a tick of their own

    def tick(self, now: float) -> float:
        """Note a tick at `now` (s, steady clock); its lateness in seconds."""
        first = now - self._slot * self._period
        if self._start is None or first < self._start:
            self._start = first
        lateness = first - self._start
        self.ticks += 1
        self.lateness.add(lateness)
        if lateness > self._late:
            self.late += 1
        # A tick more than a period late stands for those that should have been.
        skipped = max(0, int(lateness / self._period))
        self.missed += skipped
        self._slot += 1 + skipped
        return lateness


class Spacing:
    """Lets a message through at once, then at most one of its kind each `interval` seconds."""

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._last: dict[str, float] = {}
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def pass_on(self, kind: str, now: float) -> int | None:
        """How many of this kind were held back since the last that passed, or None to hold this one too."""
        with self._lock:
            last = self._last.get(kind)
            if last is not None and now - last < self._interval:
                self._held[kind] += 1
                return None
            self._last[kind] = now
            return self._held.pop(kind, 0)
