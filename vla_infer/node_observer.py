"""What a benchmark may watch in the node. Each call is made by the thread in which it happens, in its time: an observer
keeps what it is given and returns."""

from __future__ import annotations

from typing import Protocol

from .chunk import Chunk
from .frame import Frame, Now, Readiness
from .motion import Motion, Outgoing
from .stats import Counts


class Observer(Protocol):
    def configured(self, motion: Motion, counts: Counts) -> None:
        """The node is configured; both objects live as long as the configuration."""

    def received(self, topic: str, stamp: int, now: Now) -> None:
        """A camera's message has come to its callback; stamp: ns, of its header."""

    def inferred(self, frame: Frame, chunk: Chunk, taken: Now, ready: Now, decode: float) -> None:
        """A chunk was made of a frame. decode: s that decoding its images took, after `taken`."""

    def ticked(self, now: Now, lateness: float, out: Outgoing, readiness: Readiness) -> None:
        """A control tick is over and what it decided is published. lateness: s after its due time."""
