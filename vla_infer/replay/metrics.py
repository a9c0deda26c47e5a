"""Figures out of a trace. Durations in milliseconds unless the name says otherwise."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .trace import FloatArray, Inference, Tick, Trace

PERCENTILES = (("p50", 50.0), ("p90", 90.0), ("p95", 95.0), ("p99", 99.0), ("p99.9", 99.9))
LATE_TICK = 2.0  # ms, from which on a control tick is late, as in the node's diagnostics


def summary(values: npt.ArrayLike) -> dict[str, float] | None:
    """count, mean, std, min, percentiles and max; None for no value at all."""
    array = np.asarray(values, np.float64)
    if not array.size:
        return None
    points = np.percentile(array, [p for _, p in PERCENTILES])
    figures = {"count": float(array.size), "mean": array.mean(), "std": array.std(), "min": array.min()}
    figures |= {name: value for (name, _), value in zip(PERCENTILES, points, strict=True)}
    figures["max"] = array.max()
    return {name: round(float(value), 5) for name, value in figures.items()}


def samples(trace: Trace, *, warmup: int) -> dict[str, FloatArray]:
    """Every latency of the run in milliseconds, by name, in order of time.

    The first `warmup` inferences are left out of what concerns inferences: they are the cold start's.
    """
    steady = trace.inferences[warmup:] or trace.inferences
    played = [tick for tick in trace.ticks if tick.age is not None]
    firsts = first_commands(trace)
    values = {
        "capture_to_command": [tick.age for tick in played],
        "capture_to_first_command": [firsts[one.sequence].age for one in steady if one.sequence in firsts],
        "capture_to_chunk": [one.ready - one.stamp for one in steady],
        "capture_to_inference": [one.taken - one.stamp for one in steady],
        "transport": trace.transport,
        "decode": [one.decode for one in steady],
        "preprocess": [one.preprocess for one in steady],
        "engine": [one.engine for one in steady],
        "postprocess": [one.postprocess for one in steady],
        "inference": [one.ready - one.taken for one in steady],
        "inference_cpu": [one.cpu for one in steady if one.cpu is not None],
        "tick_error": [abs(tick.error) for tick in trace.ticks if tick.error is not None],
    }
    if not trace.ticks:
        # Without control ticks time stood still during inference: only durations mean something.
        for name in ("capture_to_chunk", "capture_to_inference"):
            values[name] = []
    return {name: np.asarray(numbers, np.float64) * 1e3 for name, numbers in values.items()}


def first_commands(trace: Trace) -> dict[int, Tick]:
    """The first tick of every chunk that was played, by the sequence of its observation."""
    firsts: dict[int, Tick] = {}
    for tick in trace.ticks:
        if tick.chunk is not None:
            firsts.setdefault(tick.chunk, tick)
    return firsts


def control(trace: Trace, *, deadline: float) -> dict[str, Any] | None:
    """What reached the robot; None without control ticks. deadline: s, of the age at actuation."""
    ticks = trace.ticks
    if not ticks:
        return None
    period = 1.0 / trace.control_rate
    sent = [tick for tick in ticks if tick.values is not None]
    played = [tick for tick in sent if not tick.held]
    misses = sum(tick.age is not None and tick.age > deadline for tick in played)
    held = [tick for tick in sent if tick.held]
    errors = [abs(tick.error) * 1e3 for tick in ticks if tick.error is not None]
    return {
        "ticks": len(ticks),
        "commands": len(sent),
        "commands_played": len(played),
        "commands_held": len(held),
        "ticks_before_first_command": sum(tick.values is None for tick in ticks),
        "deadline_ms": round(deadline * 1e3, 3),
        "deadline_misses": misses,
        "deadline_miss_share": round(misses / len(played), 6) if played else None,
        "late_ticks": sum(error > LATE_TICK for error in errors) if errors else None,
        "hold_s": round(len(held) * period, 4),
        "starvation_s": round(sum(tick.reason == "starved" for tick in held) * period, 4),
        "starvations": _runs(tick.held and tick.reason == "starved" for tick in sent),
        "guard": dict(trace.guard),
        "seam_jump": seam_jumps(ticks),
    }


def _runs(flags: Any) -> int:
    """How often a run of True begins."""
    before, number = False, 0
    for flag in flags:
        number += flag and not before
        before = flag
    return number


def seam_jumps(ticks: list[Tick]) -> dict[str, Any] | None:
    """Largest change of a joint (ROS units) from one tick to the next, where the chunk changed and elsewhere.

    ratio: the 95th percentile at seams over the one within chunks; 1 is a seam that nobody feels.
    """
    seams: list[float] = []
    inside: list[float] = []
    for before, after in pairwise(ticks):
        if before.values is None or after.values is None or before.chunk is None or after.chunk is None:
            continue
        change = float(np.abs(after.values - before.values).max())
        (inside if before.chunk == after.chunk else seams).append(change)
    if not seams:
        return None
    within = summary(inside)
    at_seam = summary(seams)
    ratio = None
    if within and at_seam and within["p95"] > 0:
        ratio = round(at_seam["p95"] / within["p95"], 3)
    return {"at_seam": at_seam, "within_chunk": within, "ratio": ratio}


def frames(trace: Trace) -> dict[str, Any]:
    """Images sent, observations inferred, drops and refusals."""
    counts = {topic: len(times) for topic, times in trace.sent.items()}
    reference = min(counts.values(), default=0)  # an observation takes an image of each camera
    inferred = len(trace.inferences)
    return {
        "images_sent": counts,
        "inferences": inferred,
        "inferences_failed": len(trace.failures),
        "dropped": max(0, reference - inferred),
        "dropped_share": round(max(0, reference - inferred) / reference, 6) if reference else None,
        "reordered": dict(trace.reordered),
        "rejected": dict(trace.rejected),
        "chunks": dict(trace.verdicts),
    }


def ros2_benchmark(trace: Trace) -> dict[str, float | None]:
    """The same run in the names of NVIDIA's ros2_benchmark (ms, frames per second).

    A frame sent is an image of the camera that sends least; a frame received is the first command of
    an observation, or its chunk where there are no control ticks.
    """
    sent = min(trace.sent.values(), key=len, default=[])
    firsts = first_commands(trace)
    by_time: list[tuple[Inference, float]] = []
    for one in trace.inferences:
        if not trace.ticks:
            by_time.append((one, one.stamp + one.ready - one.taken))
        elif one.sequence in firsts:
            by_time.append((one, firsts[one.sequence].time))
    received = np.array([when for _, when in by_time])
    latencies = np.array([when - one.stamp for one, when in by_time]) * 1e3
    span = float(np.ptp(received)) if received.size else 0.0
    sent_span = sent[-1] - sent[0] if len(sent) > 1 else 0.0
    # Jitter: how far the distance of two received frames is from the mean distance.
    gaps = np.diff(received) * 1e3
    jitter = np.abs(gaps - gaps.mean()) if gaps.size else np.array([])

    def figure(value: float, *, known: bool = True) -> float | None:
        return round(float(value), 4) if known else None

    some = latencies.size > 0
    return {
        "RECEIVED_DURATION": figure(span * 1e3, known=some),
        "MEAN_PLAYBACK_FRAME_RATE": figure(
            (len(sent) - 1) / sent_span if sent_span else 0, known=sent_span > 0
        ),
        "MEAN_FRAME_RATE": figure((received.size - 1) / span if span else 0, known=span > 0),
        "NUM_FRAMES_SENT": float(len(sent)),
        "NUM_MISSED_FRAMES": float(max(0, len(sent) - received.size)),
        "FIRST_SENT_RECEIVED_LATENCY": figure(latencies[0] if some else 0, known=some),
        "LAST_SENT_RECEIVED_LATENCY": figure(latencies[-1] if some else 0, known=some),
        "MIN_LATENCY": figure(latencies.min() if some else 0, known=some),
        "MEAN_LATENCY": figure(latencies.mean() if some else 0, known=some),
        "MAX_LATENCY": figure(latencies.max() if some else 0, known=some),
        "MIN_JITTER": figure(jitter.min() if jitter.size else 0, known=jitter.size > 0),
        "MEAN_JITTER": figure(jitter.mean() if jitter.size else 0, known=jitter.size > 0),
        "MAX_JITTER": figure(jitter.max() if jitter.size else 0, known=jitter.size > 0),
        "STD_DEV_JITTER": figure(jitter.std() if jitter.size else 0, known=jitter.size > 0),
    }
