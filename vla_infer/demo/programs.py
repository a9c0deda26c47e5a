"""The programs of the demonstration: what is started, what a page says of itself, and how they end."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

STOP_LIMIT = 5.0  # s for a process to end


@dataclass(frozen=True)
class Program:
    """A program to start. talks: its standard output is for the user; what others print goes to the log."""

    command: tuple[str, ...]
    talks: bool = False
    environment: Mapping[str, str] | None = None


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """The command of a module of this package, run by this Python."""
    return (sys.executable, "-m", f"vla_infer.{module}", *arguments)


def parameters(**values: object) -> tuple[str, ...]:
    """ROS arguments that set a node's parameters."""
    found: list[str] = ["--ros-args"]
    for name, value in values.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        found += ["-p", f"{name}:={text}"]
    return tuple(found)


class Programs:
    """Running programs by name. Ended in the order in which they were started."""

    def __init__(self, log: IO[bytes]) -> None:
        self._log = log
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, program: Program) -> None:
        self._running[name] = subprocess.Popen(
            program.command,
            stdin=subprocess.DEVNULL,
            stdout=None if program.talks else self._log,
            stderr=self._log,
            env={**os.environ, **(program.environment or {})},
        )

    def start_page(self, program: Program, limit: float) -> str:
        """Start the page's server and wait for the line that says where it is. Returns that line, empty when it ended
        or took longer than `limit` seconds."""
        process = subprocess.Popen(
            program.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(program.environment or {})},
        )
        self._running["page"] = process
        said: queue.Queue[bytes] = queue.Queue()
        # A read has no time-out; the thread ends with the process, at the latest.
        threading.Thread(target=_first_line, args=(process, said), daemon=True).start()
        try:
            line = said.get(timeout=limit).decode(errors="replace").strip()
        except queue.Empty:
            return ""
        if not line:
            process.wait(limit)  # its output has ended, and so does it
        return line

    def ended(self) -> str:
        """What to say of a program that ended by itself; empty while all run."""
        for name, process in self._running.items():
            if process.poll() is not None:
                return f"the {name} ended with status {process.returncode} before its time"
        return ""

    def stop(self, *order: str) -> dict[str, tuple[int, float]]:
        """End them all, those in `order` first. Exit status and the seconds it took, by name."""
        names = [name for name in order if name in self._running]
        names += [name for name in self._running if name not in names]
        return {name: _stop(self._running[name]) for name in names}


def _first_line(process: subprocess.Popen[bytes], said: queue.Queue[bytes]) -> None:
    assert process.stdout is not None
    said.put(process.stdout.readline())
    while process.stdout.read(4096):  # a full pipe would stop it
        pass


def _stop(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """End a process by SIGINT, then by force. Returns its exit status and the seconds it took."""
    begun = time.monotonic()
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        status = process.wait(STOP_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    return status, time.monotonic() - begun


def last_lines(log: Path, count: int = 8) -> list[str]:
    """The end of a log, indented."""
    lines = log.read_text(errors="replace").splitlines()
    return [f"    {line}" for line in lines[-count:]]
