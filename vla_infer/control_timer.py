"""When a control tick runs: at its time, whatever messages wait.

An executor takes events in the order they come, so a tick behind a thousand joint states would be a thousand
callbacks late. So `turn`, which makes the tick if it is due, is called by the executor's timer and also between any
two callbacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Of each period, the processor time that the executor's thread may spend on messages. What is left belongs to
#: inference, which shares the interpreter's lock; messages beyond it wait in the middleware, which keeps the newest.
SHARE = 0.75
#: s: with less than this to go the tick is waited for, since a callback may take longer.
_CLOSE = 0.0005


class ControlTimer:
    """Calls `tick` every `period` seconds of the steady clock, on the grid of the node's timer.

    A tick that comes late is made once, and the grid stays.
    """

    def __init__(self, node: Any, period: float, tick: Callable[[], None], *, clock: Any) -> None:
        """clock: steady() and thread_time() in seconds, sleep(seconds), and steady_clock for the node's timer."""
        self._node = node
        self._period = period
        self._tick = tick
        self._clock = clock
        self._timer = node.create_timer(period, self.turn, clock=clock.steady_clock)
        self._due: float = clock.steady() + self._timer.time_until_next_call() * 1e-9
        self._spent_before: float = clock.thread_time()

    def turn(self) -> None:
        """The tick, if it is due. In the executor's thread, as often as can be."""
        left = self._due - self._clock.steady()
        if left > _CLOSE and self._clock.thread_time() - self._spent_before < SHARE * self._period:
            return
        if left > 0.0:
            self._clock.sleep(left)
        self._tick()
        behind = (self._clock.steady() - self._due) / self._period
        self._due += self._period * (1 + max(0, int(behind + 1e-6)))
        self._spent_before = self._clock.thread_time()

    def destroy(self) -> None:
        self._node.destroy_timer(self._timer)
