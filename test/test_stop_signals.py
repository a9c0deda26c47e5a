"""SIGINT and SIGTERM become an event, whatever the main thread was doing."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# The lock is that of Event.wait: a signal can come while the main thread holds it.
PROGRAM = """
import signal, sys
from vla_infer.stop_signals import ignore_signals, stop_on_signals
number = signal.Signals[sys.argv[1]]
stop = stop_on_signals()
assert not stop.is_set()
with stop._cond:
    signal.raise_signal(number)
assert stop.wait(10)
ignore_signals()
signal.raise_signal(number)
print("stopped")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_the_wait_for_it_is_no_deadlock(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, number.name], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
