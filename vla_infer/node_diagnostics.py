"""What vla_node says about itself on /diagnostics, once a second and in every lifecycle state."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from .node_assembly import Running
from .node_support import NodeClock
from .scheduler import Verdict
from .stats import Window


def describe_state(label: str, problem: str, running: Running | None) -> DiagnosticStatus:
    """Lifecycle state, what the node is set up with, and the last problem of configuration."""
    level = DiagnosticStatus.ERROR if problem else DiagnosticStatus.OK
    message = problem or label
    values: dict[str, object] = {"lifecycle": label}
    if running is not None:
        values |= {
            "robot": running.contract.robot,
            "contract": running.contract.path,
            "dry_run": str(running.settings.dry_run).lower(),
            "command_topics": ", ".join(running.control.topics),
            "instruction": running.slot.text or "none",
        }
        if label == "active":
            holding = running.control.holding
            if holding:
                level, message = DiagnosticStatus.WARN, holding
            elif running.settings.dry_run:
                message = "active, dry run: commands go to " + values["command_topics"].__str__()
    return _status("state", level, message, values)


def describe_running(running: Running, counts: dict[str, int], clock: NodeClock) -> list[DiagnosticStatus]:
    """Observations, inference, control and policy, each with its figures."""
    return [
        _observations(running, counts, clock),
        _inference(running, counts),
        _control(running, counts),
        _status("policy", DiagnosticStatus.OK, running.info.family, _fields(running.worker.policy_info)),
    ]


def _observations(running: Running, counts: dict[str, int], clock: NodeClock) -> DiagnosticStatus:
    readiness = running.buffer.readiness(clock.now())
    values: dict[str, object] = {"readiness": readiness.kind, "age_ms": f"{readiness.age * 1e3:.1f}"}
    topics = [camera.topic for camera in running.contract.cameras]
    topics += [state.topic for state in running.contract.states] + [running.contract.instruction.topic]
    for topic in topics:
        values[f"received {topic}"] = counts.get(f"received {topic}", 0)
        values[f"rejected {topic}"] = counts.get(f"rejected {topic}", 0)
        if topic in running.inputs.refusals:
            values[f"why {topic} was rejected"] = running.inputs.refusals[topic]
    values["dropped_images"] = running.buffer.dropped
    values["rejected_observations"] = counts.get("frames_rejected", 0)
    for kind in ("missing", "stale", "unsynchronised"):
        values[f"ticks_{kind}"] = counts.get(f"ticks_{kind}", 0)
    values |= _milliseconds("image age at callback", running.inputs.image_age)
    level = DiagnosticStatus.OK if readiness.ready else DiagnosticStatus.WARN
    return _status("observations", level, readiness.reason or "fresh", values)


def _inference(running: Running, counts: dict[str, int]) -> DiagnosticStatus:
    worker, motion = running.worker, running.control.motion
    verdicts = motion.scheduler.verdicts
    values: dict[str, object] = {
        "inferences": counts.get("inferences", 0),
        "inferences_failed": counts.get("inferences_failed", 0),
    }
    for verdict in Verdict:
        values[f"chunks_{verdict.name.lower()}"] = verdicts[verdict]
    for name, count in motion.guard.counts.items():
        if name.startswith("chunk_"):
            values[f"chunks_{name.removeprefix('chunk_')}"] = count
    values["delay estimate ms"] = f"{motion.scheduler.delay.seconds * 1e3:.1f}"
    for stage, window in worker.stages.items():
        values |= _milliseconds(stage, window)
    if worker.last_error:
        return _status("inference", DiagnosticStatus.ERROR, worker.last_error, values)
    return _status(
        "inference", DiagnosticStatus.OK, "running" if values["inferences"] else "no inference yet", values
    )


def _control(running: Running, counts: dict[str, int]) -> DiagnosticStatus:
    control = running.control
    ticks = control.ticks
    values: dict[str, object] = {
        "control_rate": f"{1.0 / control.period:g}",
        "failsafe": control.level.name,
        "commands_played": counts.get("commands_played", 0),
        "commands_held": counts.get("commands_held", 0),
        "ticks": ticks.ticks,
        "ticks_late": ticks.late,
        "ticks_missed": ticks.missed,
        "internal_errors": counts.get("internal_errors", 0),
    }
    guard = control.motion.guard
    values |= {
        f"guard_{name}": count for name, count in guard.counts.items() if not name.startswith("chunk_")
    }
    values["unlimited_joints"] = ", ".join(control.motion.unlimited) or "none"
    values |= _milliseconds("tick lateness", ticks.lateness)
    values |= _milliseconds("tick duration", control.tick_time)
    values |= _milliseconds("observation age at publication", control.age)
    # One tick in a hundred late is what this node promises on a machine that is not overloaded.
    overloaded = ticks.ticks > 100 and ticks.late + ticks.missed > 0.01 * ticks.ticks
    level = DiagnosticStatus.WARN if overloaded or values["internal_errors"] else DiagnosticStatus.OK
    message = f"{ticks.late} of {ticks.ticks} ticks more than 2 ms late"
    return _status("control", level, message, values)


def _milliseconds(name: str, window: Window) -> dict[str, object]:
    figures = window.percentiles()
    return (
        {}
        if figures is None
        else {f"{name} {key} ms": f"{value * 1e3:.2f}" for key, value in figures.items()}
    )


def _fields(info: Any) -> dict[str, object]:
    return asdict(info) if is_dataclass(info) and not isinstance(info, type) else dict(vars(info))


def _status(name: str, level: bytes, message: str, values: dict[str, object]) -> DiagnosticStatus:
    return DiagnosticStatus(
        name=name,
        level=level,
        message=message,
        values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
    )


def array(node_name: str, hardware: str, statuses: list[DiagnosticStatus], stamp: Any) -> DiagnosticArray:
    """The statuses as one message; their names start with the node's, as diagnostic tools expect."""
    message = DiagnosticArray()
    message.header.stamp = stamp
    for status in statuses:
        status.name = f"{node_name}: {status.name}"
        status.hardware_id = hardware
    message.status = statuses
    return message
