"""What the parts of vla_node share: its clock, its log lines, its guard against our own mistakes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from rclpy.clock import Clock, ClockType

from .contract_parse import one_line
from .errors import VlaInferError
from .frame import Now
from .node_observer import Observer
from .stats import Counts, Spacing
from .time_slice import ask_for_usual_slice

T = TypeVar("T")


class NodeClock:
    """`Now` on both clocks. Under use_sim_time durations are simulated time too, else the steady clock's.

    Python's own calls, which read the clocks that rclpy reads, take a tenth of the time of rclpy's.
    """

    def __init__(self, ros_clock: Any) -> None:
        self._ros = ros_clock
        #: For timers: runs whether time is simulated or not.
        self.steady_clock = Clock(clock_type=ClockType.STEADY_TIME)

    @staticmethod
    def steady() -> float:
        """Seconds of the steady clock, simulated time or not: for figures about this process."""
        return time.monotonic()

    @staticmethod
    def thread_time() -> float:
        """Seconds of processor time that the calling thread has taken."""
        return time.thread_time()

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(seconds)

    def now(self) -> Now:
        if self._ros.ros_time_is_active:
            simulated = self._ros.now().nanoseconds
            return Now(simulated * 1e-9, simulated)
        return Now(time.monotonic(), time.time_ns())


class Reporter:
    """Log lines that do not flood: each kind at once, then at most every five seconds with a count."""

    def __init__(self, logger: Any, clock: NodeClock) -> None:
        self._logger = logger
        self.clock = clock
        self._spacing = Spacing()
        self.counts = Counts()
        self.observer: Observer | None = None

    def info(self, text: str) -> None:
        self._logger.info(text)

    def note(self, kind: str, text: str) -> None:
        """A line of information that may come often."""
        held = self._spacing.pass_on(kind, self.clock.steady())
        if held is not None:
            self._logger.info(text + (f" ({held} more of these)" if held else ""))

    def warn(self, kind: str, text: str) -> None:
        held = self._spacing.pass_on(kind, self.clock.steady())
        if held is not None:
            self._logger.warning(text + (f" ({held} more of these)" if held else ""))

    def error(self, kind: str, text: str) -> None:
        held = self._spacing.pass_on(kind, self.clock.steady())
        if held is not None:
            self._logger.error(text + (f" ({held} more of these)" if held else ""))

    def guarded(self, where: str, function: Callable[..., None]) -> Callable[..., None]:
        """`function` for use as a callback: an exception becomes a line and a count, never the node's end."""

        def call(*arguments: Any) -> None:
            try:
                function(*arguments)
            except Exception as error:
                self.counts.add("internal_errors")
                self.error(where, f"{where}: {describe(error)}")

        return call


def describe(error: BaseException) -> str:
    """One line for an exception: its text when it is ours, with its type otherwise."""
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, VlaInferError) else f"{type(error).__name__}: {one_line(text, limit=300)}"
    )


class Interrupted(Exception):
    """The node was told to stop while it was waiting."""


def run_interruptible(function: Callable[[], T], stop: threading.Event, *, discard: Callable[[T], None]) -> T:
    """`function()` in a thread of its own, so that a signal can end the wait for it.

    Raises what it raises, or Interrupted once `stop` is set; a result that comes after that goes to
    `discard`.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    lock = threading.Lock()
    abandoned = False

    def work() -> None:
        ask_for_usual_slice()  # for this thread and the engine's, which it starts
        try:
            result = function()
        except BaseException as error:
            errors.append(error)
            return
        with lock:
            if not abandoned:
                results.append(result)
                return
        discard(result)

    thread = threading.Thread(target=work, name="vla_load", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.05)
        if stop.is_set() and thread.is_alive():
            with lock:
                abandoned = not results
            if abandoned:
                raise Interrupted("told to stop while loading the policy")
    if errors:
        raise errors[0]
    return results[0]


def make_executor(context: Any = None) -> Any:
    """EventsExecutor, which has the least timer error, where this rclpy has it; else the standard one."""
    try:
        from rclpy.experimental import EventsExecutor
    except ImportError:  # before Jazzy
        from rclpy.executors import SingleThreadedExecutor

        return SingleThreadedExecutor(context=context)
    return EventsExecutor(context=context)
