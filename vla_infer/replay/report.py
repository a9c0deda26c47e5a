"""The report of one run as a JSON document; `schema.json` beside this file says what is in it."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer import __version__
from vla_infer.bench import commit, processor
from vla_infer.contract import Contract
from vla_infer.errors import ReplayError

from . import metrics
from .agreement import Recorded, agreement, open_loop_errors
from .bag import Bag
from .observe import TopicMap
from .resources import gpu_name
from .schema import check
from .trace import Trace

FORMAT = "vla_infer/replay/1"
KEPT_SAMPLES = 4096  # of each quantity, evenly spaced over the run, for comparisons with an interval
KEPT_CHUNKS = 64  # of a run, for comparisons of actions


@dataclass(frozen=True, eq=False)
class Subject:
    """What was replayed. contract_file: its bytes are hashed; info: the policy's PolicyInfo."""

    bag: Bag
    topics: TopicMap
    contract: Contract
    contract_file: Path
    info: Any


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of it. resources: as `Sampler.figures` gives them; extra: figures of one mode only;
    load: of the machine before the run."""

    trace: Trace
    recorded: Recorded | None
    resources: dict[str, float | None]
    settings: dict[str, Any]
    extra: dict[str, Any]
    load: float


def build(subject: Subject, outcome: Outcome, *, deadline: float, warmup: int) -> dict[str, Any]:
    """The document, checked against the schema. deadline: s, of an observation's age at actuation."""
    trace = outcome.trace
    samples = metrics.samples(trace, warmup=warmup)
    errors = open_loop_errors(trace, outcome.recorded)
    first = trace.inferences[0]
    document: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "mode": trace.mode,
        "settings": outcome.settings | {"warmup": warmup},
        "bag": describe_bag(subject.bag),
        "policy": describe_policy(subject.info),
        "contract": describe_contract(subject),
        "software": software(),
        "host": host(outcome.load),
        "duration_s": round(trace.duration, 4),
        "cold_start": {
            "load_s": round(trace.load, 4),
            "first_inference_ms": round((first.ready - first.taken) * 1e3, 4),
            "first_command_s": None if trace.cold_start is None else round(trace.cold_start, 4),
        },
        "ros2_benchmark": metrics.ros2_benchmark(trace),
        "latency_ms": {name: metrics.summary(values) for name, values in samples.items()},
        "control": metrics.control(trace, deadline=deadline),
        "frames": metrics.frames(trace),
        "agreement": agreement(trace, outcome.recorded),
        "resources": outcome.resources,
        "samples": {name: thin(values) for name, values in samples.items() if values.size}
        | ({"open_loop_error": thin(errors)} if errors.size else {}),
        "actions": keep_actions(trace),
        "trace": timeline(trace),
        "extra": outcome.extra,
    }
    check(document)
    return document


def describe_bag(bag: Bag) -> dict[str, Any]:
    return {
        "name": bag.path.name,
        "sha256": bag.digest(),
        "bytes": bag.size,
        "seconds": round(bag.duration * 1e-9, 4),
        "messages": bag.count,
        "topics": {topic: {"type": t.type, "count": t.count} for topic, t in sorted(bag.topics.items())},
    }


def describe_policy(info: Any) -> dict[str, Any]:
    names = (
        "family",
        "device",
        "precision",
        "state_dim",
        "action_dim",
        "horizon",
        "num_steps",
        "fingerprint",
    )
    values = {name: getattr(info, name) for name in names}
    return {
        "name": Path(str(info.path)).name,
        **values,
        "cameras": list(info.cameras),
        "weight_bytes": int(info.weight_bytes),
        "arena_bytes": int(info.arena_bytes),
    }


def describe_contract(subject: Subject) -> dict[str, Any]:
    contract = subject.contract
    return {
        "name": contract.path,
        "robot": contract.robot,
        "sha256": hashlib.sha256(subject.contract_file.read_bytes()).hexdigest(),
        "control_rate": contract.control_rate,
        "policy_rate": contract.policy_rate,
        "max_observation_age": contract.max_observation_age,
        "joints": [joint for sink in contract.commands for joint in sink.joints],
    }


def software() -> dict[str, str | None]:
    """Versions of what took part; None for what is not installed."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("numpy", "rosbags", "rclpy", "opencv-python-headless")
    return {
        "vla_infer": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{package: of(package) for package in packages},
        "ros_distro": os.environ.get("ROS_DISTRO"),
        "rmw": _rmw(),
    }


def _rmw() -> str | None:
    """The middleware in use: asked of ROS where this process has it, as ROS from wheels sets no variable."""
    if sys.modules.get("rclpy") is None:
        return os.environ.get("RMW_IMPLEMENTATION")
    from rclpy.utilities import get_rmw_implementation_identifier

    return str(get_rmw_implementation_identifier())


def host(load: float) -> dict[str, Any]:
    """load: processes that wanted a processor before the run, as os.getloadavg has it for one minute."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "gpu": gpu_name(),
        "load": round(load, 2),
    }


def thin(values: npt.NDArray[np.float64], limit: int = KEPT_SAMPLES) -> list[float]:
    """At most `limit` values, evenly spaced in time."""
    if values.size > limit:
        values = values[np.linspace(0, values.size - 1, limit).round().astype(int)]
    return [float(f"{value:.6g}") for value in values]


def keep_actions(trace: Trace, limit: int = KEPT_CHUNKS) -> dict[str, Any]:
    """The chunks whose keys are smallest: two runs that saw different parts of a bag keep the same ones
    wherever both saw them. data: float32 little-endian, (keys, horizon, action_dim), in base64."""
    chunks = {one.key: one.actions for one in trace.inferences}
    keys = sorted(chunks)[:limit]
    stacked = np.stack([chunks[key] for key in keys]).astype("<f4")
    return {"keys": keys, "shape": list(stacked.shape), "data": base64.b64encode(stacked.tobytes()).decode()}


def load_actions(document: dict[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    """key -> chunk of a document. Raises ReplayError where the data are not of the shape it states."""
    actions = document["actions"]
    shape = tuple(actions["shape"])
    try:
        values = np.frombuffer(base64.b64decode(actions["data"], validate=True), "<f4").reshape(shape)
    except ValueError as error:
        raise ReplayError(
            f"actions: the data are not float32 of shape {shape}; write the report anew"
        ) from error
    if shape[0] != len(actions["keys"]):
        raise ReplayError(
            f"actions: {len(actions['keys'])} keys for {shape[0]} chunks; write the report anew"
        )
    return dict(zip(actions["keys"], values, strict=True))


def timeline(trace: Trace) -> dict[str, Any]:
    """Every tick and every inference, column by column; times in seconds, ages and durations in ms."""

    def ms(value: float | None) -> float | None:
        return None if value is None else round(value * 1e3, 3)

    ticks, ran = trace.ticks, trace.inferences
    return {
        "sent": {topic: [round(t, 5) for t in times] for topic, times in trace.sent.items()},
        "ticks": {
            "time": [round(tick.time, 5) for tick in ticks],
            "age_ms": [ms(tick.age) for tick in ticks],
            "chunk": [tick.chunk for tick in ticks],
            "state": [_state(tick.held, tick.reason) for tick in ticks],
        },
        "inferences": {
            "sequence": [one.sequence for one in ran],
            "stamp": [round(one.stamp, 5) for one in ran],
            "bag_time": [round(one.bag_time, 5) for one in ran],
            "taken": [round(one.taken, 5) for one in ran],
            "ready": [round(one.ready, 5) for one in ran],
            "engine_ms": [ms(one.engine) for one in ran],
        },
        "failures": [[round(when, 5), text] for when, text in trace.failures],
    }


def _state(held: bool, reason: str) -> str:  # noqa: FBT001
    return reason or "held" if held else "played"


def write(document: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=None, separators=(",", ":"), allow_nan=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A report that was written before. Raises ReplayError for what is no such report."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON: {error}"
        raise ReplayError(
            f"{path}: cannot be read ({reason}); expected a report of `vla-infer replay`"
        ) from error
    try:
        check(document)
    except ReplayError as error:
        raise ReplayError(f"{path}: {error}") from error
    return dict(document)
