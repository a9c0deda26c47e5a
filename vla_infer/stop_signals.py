"""SIGINT and SIGTERM as an event."""

from __future__ import annotations

import _thread
import os
import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_on_signals() -> None:
    """Let SIGINT and SIGTERM end the process at once, with status 0: for a start that has made nothing yet.

    Without the interpreter's own end, which a signal in the middle of an import would turn into a traceback.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(0))


def stop_on_signals() -> threading.Event:
    """An event that SIGINT and SIGTERM set from now on. Call it in the main thread.

    A handler runs in the main thread between any two instructions, so also inside `Event.wait`, where that thread
    holds the very lock that `Event.set` takes and would wait for itself for ever. So the handler leaves the setting
    to a thread of its own, started by the one call that takes no lock of Python's.
    """
    stop = threading.Event()
    for number in SIGNALS:
        signal.signal(number, lambda *_: _thread.start_new_thread(stop.set, ()))
    return stop


def ignore_signals() -> None:
    """Let SIGINT and SIGTERM pass: the process is ending, and a second Ctrl-C must not change how."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
