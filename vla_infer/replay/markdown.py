"""A report, or a comparison of two, as Markdown tables."""

from __future__ import annotations

from typing import Any

from .age import PARTS, split
from .runs import described

LATENCIES = {
    "capture_to_command": "capture → command (age at actuation)",
    "capture_to_first_command": "capture → first command of its chunk",
    "capture_to_chunk": "capture → chunk",
    "capture_to_inference": "capture → start of inference",
    "transport": "transport: image sent → node's callback",
    "decode": "decode",
    "preprocess": "preprocess",
    "engine": "engine",
    "postprocess": "postprocess",
    "inference": "inference (decode to chunk)",
    "inference_cpu": "processor time of an inference, all threads",
    "tick_error": "control tick error",
}
_COLUMNS = ("p50", "p90", "p95", "p99", "p99.9", "max")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def markdown(document: dict[str, Any]) -> str:
    """The whole report in tables that fit a pull request."""
    policy, bag, frames = document["policy"], document["bag"], document["frames"]
    contract, control = document["contract"], document["control"]
    parts = [
        f"## Replay of {bag['name']}, {document['mode']}",
        f"{policy['family']} ({policy['name']}) on {policy['device']} in {policy['precision']}, "
        f"{len(policy['cameras'])} cameras, horizon {policy['horizon']}, {policy['num_steps']} steps; "
        f"contract {contract['name']}, {contract['control_rate']:g} Hz commands; "
        f"{bag['seconds']:g} s, {bag['messages']} messages.",
        f"Commit {document['software']['commit'] or 'unknown'}, {document['host']['processor']}, "
        f"{document['host']['cores']} cores, GPU {document['host']['gpu'] or 'none'}. "
        f"Bag {bag['sha256'][:12]}, policy {policy['fingerprint'][:12]}.",
    ]
    if text := described(document):
        parts.append(text)
    rows = [
        [label, *(f"{values[column]:.2f}" for column in _COLUMNS), f"{values['count']:.0f}"]
        for name, label in LATENCIES.items()
        if (values := document["latency_ms"].get(name))
    ]
    parts.append(table(["ms", *_COLUMNS, "count"], rows))
    if means := split(document):
        columns = [[*mean, mean.sum()] for mean in means]
        rows = [
            [label, f"{every:.2f}", f"{late:.2f}"]
            for label, every, late in zip([*PARTS, "capture → command"], *columns, strict=True)
        ]
        parts.append("What the age consists of:")
        parts.append(table(["ms, mean", "of all commands", "of those around p99"], rows))
    rows = [
        ["images sent", ", ".join(f"{topic} {number}" for topic, number in frames["images_sent"].items())],
        [
            "observations inferred, dropped",
            f"{frames['inferences']}, {frames['dropped']} ({_share(frames['dropped_share'])})",
        ],
        ["messages rejected, out of order", f"{_total(frames['rejected'])}, {_total(frames['reordered'])}"],
        ["chunks", _counts(frames["chunks"])],
        ["load, first command", _cold(document["cold_start"])],
    ]
    if control:
        rows += [
            ["commands played, held", f"{control['commands_played']}, {control['commands_held']}"],
            [
                f"age above the deadline of {control['deadline_ms']:g} ms",
                f"{control['deadline_misses']} ({_share(control['deadline_miss_share'])})",
            ],
            ["guard: violations", _counts(control["guard"])],
            ["time in hold, of it starved", f"{control['hold_s']:.2f} s, {control['starvation_s']:.2f} s"],
            [
                "jump at seams over change within chunks (p95)",
                _optional((control["seam_jump"] or {}).get("ratio")),
            ],
        ]
        if control["late_ticks"] is not None:
            rows.append(["ticks late by more than 2 ms", str(control["late_ticks"])])
    rows += [[name, _optional(value)] for name, value in document["resources"].items() if value is not None]
    rows += [
        [name, _optional(value)]
        for name, value in document["extra"].items()
        if not isinstance(value, (dict, list))
    ]
    parts.append(table(["", "value"], rows))
    if "trials" in document["extra"]:
        trials = [[f"{t['rate_hz']:g}", _share(t["dropped_share"])] for t in document["extra"]["trials"]]
        parts.append(table(["rate tried, Hz", "dropped"], trials))
    if document["agreement"]:
        found = document["agreement"]
        against = "recorded commands" if found["source"] == "commands" else "joint positions reached later"
        parts.append(f"Open-loop agreement with the {against}, policy units:")
        parts.append(
            table(
                ["joint", "mean absolute error", "RMS error", "RMS error / spread"],
                [
                    [name, f"{j['mae']:.4g}", f"{j['rmse']:.4g}", _optional(j["rmse_over_std"])]
                    for name, j in found["joints"].items()
                ],
            )
        )
    names = {name: value for name, value in document["ros2_benchmark"].items() if value is not None}
    parts.append("In ros2_benchmark's names (ms, frames per second):")
    parts.append(table(["metric", "value"], [[name, f"{value:.3f}"] for name, value in names.items()]))
    return "\n\n".join(parts) + "\n"


def _cold(cold: dict[str, Any]) -> str:
    first = cold["first_command_s"]
    return f"{cold['load_s']:.2f} s, " + (f"{first:.2f} s" if first is not None else "none")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in counts.items()) or "none"


def _total(counts: dict[str, int]) -> int:
    return sum(counts.values())


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _optional(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
