"""What is known of the node and of a simulation, as one document for whoever shows it. Pure: time is an argument."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SILENT = 3.0  # s without diagnostics after which the node counts as gone; it reports once a second

_REPORTS = 6  # that rates are taken over
_SHORTEST = 0.8  # s between the first and the last of them

Document = dict[str, Any]

#: How grave each level is, for its colour: ok, warn or bad. What is not named is idle.
_TONES = {"RUN": "ok", "WARN": "warn", "HOLD": "warn", "DEACTIVATE": "bad", "EXIT": "bad"}

# name in the document -> status and figure in /diagnostics, docs/node.md
_LATENCIES = {
    "inference": ("inference", "predict"),
    "chunk": ("inference", "observation to chunk"),
    "age": ("control", "observation age at publication"),
    "lateness": ("control", "tick lateness"),
}


class Status(NamedTuple):
    """One DiagnosticStatus. severity: 0 OK, 1 WARN, 2 ERROR, 3 STALE."""

    severity: int
    message: str
    values: Mapping[str, str]


_NOTHING = Status(0, "", {})


class Board:
    """Keeps the newest diagnostics of the node `name` and the newest status of a simulation. Times in seconds."""

    def __init__(self, name: str, instruction_topic: str) -> None:
        self._name = name
        self._topic = instruction_topic
        self._node: dict[str, Status] = {}
        self._heard = -math.inf
        self._past: deque[tuple[float, dict[str, float | None]]] = deque(maxlen=_REPORTS)
        self._rising: list[str] = []  # guard counters that rose in the last report
        self._simulation: Status | None = None
        self._simulation_heard = -math.inf

    def diagnostics(self, statuses: Mapping[str, Status], now: float) -> bool:
        """Take one DiagnosticArray by full status name. Returns whether the node is in it."""
        prefix = f"{self._name}: "
        ours = {name[len(prefix) :]: status for name, status in statuses.items() if name.startswith(prefix)}
        if not ours:
            return False
        self._compare(ours, now)
        self._node, self._heard = ours, now
        return True

    def simulation(self, status: Status, now: float) -> None:
        self._simulation, self._simulation_heard = status, now

    def _compare(self, new: Mapping[str, Status], now: float) -> None:
        """Rates over the last reports, and which guard counters rose since the last one."""
        old, self._rising = self._node, []
        for key in new.get("control", _NOTHING).values:
            was, count = _number(old, "control", key), _number(new, "control", key)
            if key.startswith("guard_") and was is not None and count is not None and count > was:
                self._rising.append(f"{key.removeprefix('guard_').replace('_', ' ')} {count:.0f}")
        counts = {
            "inferences": _number(new, "inference", "inferences"),
            "commands": _sum(new, "control", ("commands_played", "commands_held")),
        }
        if self._past and (now - self._past[-1][0] > SILENT or _fell(self._past[-1][1], counts)):
            self._past.clear()  # the node was started again
        self._past.append((now, counts))

    def _rate(self, key: str) -> float | None:
        """Of a counter in Hz, over the last reports: one alone comes too irregularly on a busy machine."""
        if len(self._past) < 2:
            return None
        (began, first), (ended, last) = self._past[0], self._past[-1]
        was, count = first[key], last[key]
        # Reports that were held up and come together say nothing of a rate.
        if was is None or count is None or ended - began < _SHORTEST:
            return None
        return (count - was) / (ended - began)

    def document(self, now: float) -> Document:
        """Everything, with None where nothing is known. Numbers are finite, rates in Hz, times in ms."""
        state = self._node.get("state", _NOTHING)
        control = self._node.get("control", _NOTHING)
        level, reason = self._level(now)
        return {
            "level": level,
            "tone": _TONES.get(level, "bad" if state.severity >= 2 and level != "OFFLINE" else "idle"),
            "reason": reason,
            "lifecycle": state.values.get("lifecycle"),
            "dry_run": {"true": True, "false": False}.get(state.values.get("dry_run", "")),
            "instruction": self._instruction(),
            "refused": _number(self._node, "observations", f"rejected {self._topic}"),
            "latency": {
                name: self._percentiles(status, figure) for name, (status, figure) in _LATENCIES.items()
            },
            "inference_rate": self._rate("inferences"),
            "command_rate": self._rate("commands"),
            "control_rate": _number(self._node, "control", "control_rate"),
            "due": _sum(self._node, "control", ("ticks", "ticks_missed")),
            "late": _sum(self._node, "control", ("ticks_late", "ticks_missed")),
            "held": _number(self._node, "control", "commands_held"),
            "policy": self._policy(),
            "unlimited": control.values.get("unlimited_joints", "none"),
            "simulation": self._task(now),
        }

    def _level(self, now: float) -> tuple[str, str]:
        """The failsafe's level while the node is active, else its lifecycle state; and why."""
        state, control = self._node.get("state", _NOTHING), self._node.get("control", _NOTHING)
        if not self._node:
            return "OFFLINE", f"nothing heard from {self._name} yet"
        if now - self._heard > SILENT:
            return "OFFLINE", f"{self._name} has been silent for {now - self._heard:.0f} s"
        lifecycle = state.values.get("lifecycle", "unknown")
        if lifecycle != "active":
            return lifecycle.upper(), state.message if state.severity else ""
        level = control.values.get("failsafe", "UNKNOWN")
        if state.severity:
            return level, state.message
        return level, "guard: " + ", ".join(self._rising) if self._rising else ""

    def _instruction(self) -> str | None:
        text = self._node.get("state", _NOTHING).values.get("instruction")
        return None if text is None else "" if text == "none" else text

    def _percentiles(self, status: str, figure: str) -> dict[str, float] | None:
        found = {name: _number(self._node, status, f"{figure} {name} ms") for name in ("p50", "p99")}
        return {name: value for name, value in found.items() if value is not None} or None

    def _policy(self) -> str | None:
        policy = self._node.get("policy")
        if policy is None:
            return None
        parts = (policy.message, policy.values.get("device"), policy.values.get("precision"))
        return ", ".join(part for part in parts if part)

    def _task(self, now: float) -> Document | None:
        """The simulation's own words, numbers as numbers; None when nobody publishes them."""
        if self._simulation is None or now - self._simulation_heard > SILENT:
            return None
        values = self._simulation.values
        return {
            "kind": values.get("kind", ""),
            "colour": values.get("colour", ""),
            "instruction": values.get("instruction", ""),
            "phase": values.get("phase", ""),
            "outcome": values.get("outcome", ""),
            "success": values.get("success", "").lower() in ("true", "1"),
            **{key: _finite(values.get(key)) for key in ("episode", "successes", "episodes", "seconds")},
        }


def _fell(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> bool:
    return any((after[key] or 0.0) < (count or 0.0) for key, count in before.items())


def _number(statuses: Mapping[str, Status], name: str, key: str) -> float | None:
    return _finite(statuses.get(name, _NOTHING).values.get(key))


def _sum(statuses: Mapping[str, Status], name: str, keys: Sequence[str]) -> float | None:
    found = [_number(statuses, name, key) for key in keys]
    return None if None in found else sum(value for value in found if value is not None)


def _finite(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
