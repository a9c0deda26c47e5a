"""Ends what a test process started and left behind, however that process ended: by a time-out, a signal or a crash.

    python test/orphans.py PID

Looks at the descendants of PID each second and, once PID has ended, kills those of its last look that are still there.
For Linux, by /proc; elsewhere it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def started(pid: int) -> str:
    """When a process started, in clock ticks; empty when it has ended. With it a pid names one process for ever."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def descendants(pid: int) -> dict[int, str]:
    """All processes below one, and when each started."""
    found: dict[int, str] = {}
    for file in (PROC / str(pid) / "task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, file.read_text().split()):
                found |= {child: started(child)} | descendants(child)
    return found


def main() -> None:
    parent = int(sys.argv[1])
    born = started(parent)
    family: dict[int, str] = {}
    while born and started(parent) == born and os.getppid() == parent:
        family = descendants(parent)
        time.sleep(1.0)
    family.pop(os.getpid(), None)
    for pid, when in family.items():
        if when and started(pid) == when:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
