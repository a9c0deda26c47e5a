"""Flags in, worst action out. Pure: the time and the count of frames are arguments.

Every fault is a row of one table with how severe it is and what ends it. The worst that is raised, latched
or not yet cleared decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum

from .safety_options import FailsafeOptions


class Level(IntEnum):
    """Severity and action. RUN, WARN: commands follow the plan. HOLD: the last position is repeated,
    velocities go to zero. DEACTIVATE: hold, then the node deactivates; an operator activates it again.
    EXIT: hold, then the process ends and whoever launched it starts it anew.
    """

    RUN = 0
    WARN = 1
    HOLD = 2
    DEACTIVATE = 3
    EXIT = 4


class Clears(Enum):
    """What ends the effect of a flag that is raised no more."""

    AT_ONCE = "at once"
    FRAMES = "after good frames"
    ACTIVATION = "when an operator activates the node"
    RESET = "when an operator resets the emergency stop"


@dataclass(frozen=True)
class Row:
    """drops_plan: what was planned means nothing after it; the next chunk has to be from a later frame."""

    level: Level
    clears: Clears = Clears.AT_ONCE
    drops_plan: bool = False


class Flag(Enum):
    """One fault. The value is its name in logs and diagnostics."""

    CLAMPED = "clamped"
    CHUNK_REFUSED = "chunk refused"
    COMMAND_REFUSED = "command refused"
    NO_PLAN = "no chunk is due"
    STOPPED = "stopped"
    OBSERVATION = "observation"
    CLOCK = "clock"
    ENGINE = "inference failed"
    UNSAFE_START = "unsafe start"
    ENGINE_GONE = "inference keeps failing"
    TRIPPED = "guard tripped"
    EMERGENCY_STOP = "emergency stop"
    INFERENCE_HANGS = "inference hangs"
    DEVICE_LOST = "device lost"


TABLE: Mapping[Flag, Row] = {
    Flag.CLAMPED: Row(Level.WARN),
    Flag.CHUNK_REFUSED: Row(Level.WARN),
    Flag.COMMAND_REFUSED: Row(Level.WARN),
    Flag.NO_PLAN: Row(Level.HOLD),
    Flag.STOPPED: Row(Level.HOLD, drops_plan=True),
    Flag.OBSERVATION: Row(Level.HOLD, Clears.FRAMES, drops_plan=True),
    Flag.CLOCK: Row(Level.HOLD, Clears.FRAMES, drops_plan=True),
    Flag.ENGINE: Row(Level.HOLD, drops_plan=True),
    Flag.UNSAFE_START: Row(Level.DEACTIVATE, Clears.ACTIVATION, drops_plan=True),
    Flag.ENGINE_GONE: Row(Level.DEACTIVATE, Clears.ACTIVATION, drops_plan=True),
    Flag.TRIPPED: Row(Level.DEACTIVATE, Clears.ACTIVATION, drops_plan=True),
    Flag.EMERGENCY_STOP: Row(Level.DEACTIVATE, Clears.RESET, drops_plan=True),
    Flag.INFERENCE_HANGS: Row(Level.EXIT, Clears.ACTIVATION, drops_plan=True),
    Flag.DEVICE_LOST: Row(Level.EXIT, Clears.ACTIVATION, drops_plan=True),
}


@dataclass(frozen=True)
class State:
    """level: what is to be done; flag and reason: because of what, None and empty for RUN."""

    level: Level
    flag: Flag | None
    reason: str
    drops_plan: bool


_RUN = State(Level.RUN, None, "", drops_plan=False)


class Failsafe:
    """Keeps what is latched and what still waits for good frames."""

    def __init__(self, options: FailsafeOptions | None = None) -> None:
        self.options = options or FailsafeOptions()
        self._latched: dict[Flag, str] = {}
        self._waiting: dict[Flag, tuple[int, str]] = {}  # frames seen when it was last raised, reason
        self._failures = 0
        self._failure = ""

    @property
    def stopped(self) -> bool:
        """Whether the emergency stop is latched."""
        return Flag.EMERGENCY_STOP in self._latched

    def latch(self, flag: Flag, reason: str) -> None:
        """Raise a flag that only an operator clears. The first reason stays."""
        if TABLE[flag].clears not in (Clears.ACTIVATION, Clears.RESET):
            raise ValueError(f"{flag.name} is no flag that latches")
        self._latched.setdefault(flag, reason)

    def reset(self) -> None:
        """An operator resets the emergency stop. Nothing moves by this alone."""
        self._latched.pop(Flag.EMERGENCY_STOP, None)

    def activate(self) -> None:
        """An operator activates the node: all but the emergency stop is forgotten."""
        self._latched = {
            flag: why for flag, why in self._latched.items() if TABLE[flag].clears is Clears.RESET
        }
        self._waiting.clear()
        self.inferred()

    def engine_failed(self, reason: str, *, lost: bool = False) -> None:
        """An inference raised. lost: the device is gone and no further try can succeed."""
        self._failures += 1
        self._failure = reason
        if lost:
            self.latch(Flag.DEVICE_LOST, reason)
        elif self._failures >= self.options.engine_tries:
            self.latch(Flag.ENGINE_GONE, f"{self._failures} inferences failed in a row: {reason}")

    def inferred(self) -> None:
        """An inference succeeded."""
        self._failures, self._failure = 0, ""

    def assess(self, raised: Mapping[Flag, str], frames: int) -> State:
        """The worst of what is raised now (flag -> reason), latched, or waiting for good frames.

        frames: observations that arrived so far, a number that never decreases.
        """
        for flag, reason in raised.items():
            if TABLE[flag].clears is Clears.FRAMES:
                self._waiting[flag] = frames, reason
        worst = _RUN
        for flag, reason in raised.items():
            worst = _worse(worst, flag, reason, drops=TABLE[flag].drops_plan)
        if self._failures:
            worst = _worse(worst, Flag.ENGINE, self._failure, drops=True)
        for flag, reason in self._latched.items():
            worst = _worse(worst, flag, reason, drops=True)
        for flag, (since, reason) in list(self._waiting.items()):
            good = max(0, frames - since)
            if flag in raised:
                continue
            if good >= self.options.good_frames:
                del self._waiting[flag]
            else:
                text = f"{reason}; {good} of {self.options.good_frames} good frames since"
                # What is planned from a good frame may stay for when the hold ends.
                worst = _worse(worst, flag, text, drops=False)
        return worst


def _worse(worst: State, flag: Flag, reason: str, *, drops: bool) -> State:
    level = TABLE[flag].level
    drops = drops or worst.drops_plan
    if level > worst.level:
        return State(level, flag, reason or flag.value, drops_plan=drops)
    return (
        worst if drops == worst.drops_plan else State(worst.level, worst.flag, worst.reason, drops_plan=drops)
    )
