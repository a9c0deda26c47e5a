"""What the demonstration sees of the running node from outside: commands, diagnostics, a simulation's successes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from vla_infer.contract import DRY_SUFFIX, Contract
from vla_infer.demo.figures import Diagnostics, live_line, successes, table, ticks

START_LIMIT = 60.0  # s until the first command


class _Listener:
    """Keeps the publication stamps of the commands, and the newest diagnostics of the node and the simulation."""

    def __init__(self, node: Any, contract: Contract, *, dry_run: bool) -> None:
        from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus

        from vla_infer.demo.player import message_class

        self.stamps: list[int] = []  # ns, by the publisher's DDS writer
        self.diagnostics: Diagnostics = {}
        self.simulation: dict[str, str] = {}
        sink = contract.commands[0]
        topic = sink.topic + (DRY_SUFFIX if dry_run else "")
        node.create_subscription(message_class(sink.type), topic, self._on_command, 100)
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        node.create_subscription(DiagnosticStatus, "simulation/status", self._on_simulation, 10)

    def _on_command(self, _: Any, info: dict[str, Any]) -> None:
        self.stamps.append(info["source_timestamp"])

    def _on_diagnostics(self, message: Any) -> None:
        self.diagnostics = {
            status.name.rpartition(": ")[2]: {item.key: item.value for item in status.values}
            for status in message.status
        }

    def _on_simulation(self, message: Any) -> None:
        self.simulation = {item.key: item.value for item in message.values}


def watch(
    contract: Contract, ended: Callable[[], str], duration: float, *, dry_run: bool, show: bool
) -> tuple[list[str], str]:
    """Listen for `duration` seconds from the first command, 0 for no end but Ctrl-C.

    ended: says which program ended by itself. show: a live line meanwhile. Returns the rows of the closing table, and
    what went wrong or nothing.
    """
    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    context = rclpy.Context()
    rclpy.init(context=context, signal_handler_options=rclpy.signals.SignalHandlerOptions.NO)
    ros = rclpy.create_node("demo_view", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(ros)
    listener = _Listener(ros, contract, dry_run=dry_run)
    shown = _Line() if show else None
    begun = time.monotonic()
    first: float | None = None
    try:
        while first is None or not duration or time.monotonic() < first + duration:
            executor.spin_once(timeout_sec=0.05)
            problem = ended()
            if problem:
                return [], problem
            now = time.monotonic()
            if first is None:
                if listener.stamps:
                    first, listener.stamps = now, listener.stamps[-1:]
                elif now > begun + START_LIMIT:
                    return [], f"no command in the first {START_LIMIT:g} s"
                elif shown:
                    shown.show(partial("waiting for the node {:4.0f} s".format, now - begun))
                continue
            if shown:
                shown.show(partial(_now, listener, contract.control_rate, now - first, duration))
    except KeyboardInterrupt:
        if first is None:
            return [], "stopped before the first command"
    finally:
        if shown:
            shown.end()
        ros.destroy_node()
        rclpy.shutdown(context=context)
    rows = table(ticks(listener.stamps, contract.control_rate), contract.control_rate, listener.diagnostics)
    rows += successes(listener.simulation)
    seconds = min(duration or float("inf"), time.monotonic() - first) if first is not None else 0.0
    count, rate = len(listener.stamps), contract.control_rate
    few = count < seconds * rate / 2
    return rows, f"{count} commands in {seconds:.0f} s: less than half of {rate:g} Hz" if few else ""


def _now(listener: _Listener, rate: float, elapsed: float, duration: float) -> str:
    recent = ticks(listener.stamps[-int(2 * rate) :], rate)
    task = "".join(successes(listener.simulation))
    return live_line(elapsed, duration, recent, listener.diagnostics) + task


class _Line:
    """A line that is written over itself on a terminal, and once a second elsewhere. Made only when it is due."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._last = -1e9

    def show(self, text: Callable[[], str]) -> None:
        now = time.monotonic()
        if now < self._last + (0.2 if self._terminal else 1.0):
            return
        self._last = now
        if self._terminal:
            width = os.get_terminal_size().columns
            print(f"\r{text()[: width - 1]:<{width - 1}}", end="", flush=True)
        else:
            print(text(), flush=True)

    def end(self) -> None:
        if self._terminal:
            print()
