"""The newest of everything that is shown, handed from the ROS thread to whoever shows it.

Nothing is queued: there is one picture for each camera, one document, and the samples of the last `SPAN` seconds. A
reader remembers what it has seen and takes what is newer, so one that is slow misses pictures and costs no memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .board import Document

SPAN = 20.0  # s of samples that are kept


class Sample(NamedTuple):
    """Joints at one time. measured, commanded: a number for each channel, None where there is none."""

    number: int
    time: float  # s, steady clock
    measured: list[float | None]
    commanded: list[float | None]


@dataclass(frozen=True)
class Picture:
    """One camera's newest JPEG stream; number grows by one with each."""

    number: int
    jpeg: bytes


class Feed:
    """Written by one thread, read by any. `woken` is called, in the writer's thread, when something is new."""

    def __init__(self, cameras: int, rate: float) -> None:
        self._lock = threading.Lock()
        self._pictures: list[Picture | None] = [None] * cameras
        self._samples: deque[Sample] = deque(maxlen=round(SPAN * rate))
        self._count = 0
        self._document: tuple[int, Document] = (0, {})
        self.woken: Callable[[], None] = lambda: None
        self._watchers = 0

    @property
    def watched(self) -> bool:
        """Whether anybody looks at the pictures; they are not made for nobody."""
        return self._watchers > 0

    def watch(self, change: int) -> None:
        """One reader more (1) or fewer (-1)."""
        with self._lock:
            self._watchers += change

    def put_picture(self, camera: int, jpeg: bytes) -> None:
        with self._lock:
            last = self._pictures[camera]
            self._pictures[camera] = Picture(1 + (last.number if last else 0), jpeg)

    def put_sample(self, time: float, measured: list[float | None], commanded: list[float | None]) -> None:
        with self._lock:
            self._count += 1
            self._samples.append(Sample(self._count, time, measured, commanded))

    def put_document(self, document: Document) -> None:
        with self._lock:
            self._document = (self._document[0] + 1, document)

    def picture(self, camera: int) -> Picture | None:
        return self._pictures[camera]

    def document(self) -> tuple[int, Document]:
        """Its number, 0 before the first, and the newest document."""
        return self._document

    def samples(self, after: int) -> list[Sample]:
        """Those of the last `SPAN` seconds with a number above `after`, oldest first."""
        with self._lock:
            if self._count <= after:
                return []
            new = min(self._count - after, len(self._samples))
            return [self._samples[index] for index in range(-new, 0)]


def reading(sample: Sample) -> list[Any]:
    """A sample as the page gets it: [s, [measured], [commanded]], four digits behind the point."""
    return [
        round(sample.time, 3),
        [None if value is None else round(value, 4) for value in sample.measured],
        [None if value is None else round(value, 4) for value in sample.commanded],
    ]
