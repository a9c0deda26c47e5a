"""A measurement as Markdown."""

from __future__ import annotations

from typing import Any

_CALLS = {
    "call_ms": "whole call",
    "pinned_call_ms": "whole call, pictures in memory that the GPU reads",
    "engine_ms": "engine",
}


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _head(*cells: str) -> list[str]:
    return ["", _row(*cells), _row(*("---" for _ in cells))]


def markdown(report: dict[str, Any]) -> str:
    """The tables of one report: the engine, its stages, its peers."""
    lines = [
        f"### {report['family']} on {report['device']}, {report['precision']}",
        "",
        f"{report['cameras']} cameras, {report['horizon']} actions, {report['steps']} steps, "
        f"{report['prompt']}-token prompt, {report['runs']} calls; weights {report['weight_mb']} MB, everything "
        f"else {report['arena_mb']} MB, {report['operations']} operations, loaded in {report['load_s']} s "
        f"({report['read_mb']} MB read in {report['read_s']} s), first action after {report['first_action_s']} s; "
        f"load average {report['load_average']}."
        + (
            f" {report['graph_nodes']} graph nodes; {report['gpu_memory_mb']} MB of the GPU in use, by everyone."
            if "graph_nodes" in report
            else ""
        ),
    ]
    lines += _head("ms", "p50", "p95", "p99", "max")
    for name, what in _CALLS.items():
        if name in report:
            lines.append(_row(what, *(f"{v:.2f}" for v in report[name].values())))
    lines += _stages(report["stages"], report.get("ceilings"))
    if "against_bf16" in report:
        lines += _against_bf16(report)
    if report.get("peers"):
        lines += _peers(report)
    lines += [f"\n{r['name']}: {r['why']}." for r in report.get("refused", [])]
    return "\n".join(lines)


def _stages(stages: dict[str, Any], ceilings: dict[str, Any] | None) -> list[str]:
    columns = {"ms": "ms", "gflop": "GFLOP", "tflops": "TFLOP/s", "moved_mb": "MB to move", "gb_s": "GB/s"}
    if ceilings:
        columns |= {"of_product": "of product", "of_copy": "of copy", "floor": "of the nearer"}
    lines = _head("stage", *columns.values())
    for stage, s in stages.items():
        cells = [
            "–"
            if name not in s
            else f"{s[name]:.0%}"
            if name in ("of_product", "of_copy", "floor")
            else s[name]
            for name in columns
        ]
        lines.append(_row(stage, *cells))
    if ceilings:
        lines += [
            "",
            f"Ceilings measured in this run: product {ceilings['product_tflops']} TFLOP/s "
            f"({ceilings['product_by']}), copy {ceilings['copy_gb_s']} GB/s read and written.",
        ]
    return lines


def _peers(report: dict[str, Any]) -> list[str]:
    lines = _head("peer", "precision", "error", "its p50", "its max", "our p50", "our max", "times longer")
    for p in report["peers"]:
        its, ours, r = p["ms"], p["our_ms"], p["ratio"]
        times = [f"{v:.2f}" for v in (its["p50"], its["max"], ours["p50"], ours["max"])]
        spread = f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        lines.append(_row(p["name"], p["precision"], f"{p['error']:.1e}", *times, spread))
    confidence = min(p["ratio"]["confidence"] for p in report["peers"])
    lines += [
        "",
        f"{report['pairs']} pairs of calls in turn with each peer, on {report['threads'] or 'all'} threads; ms. Times "
        f"longer: median of the pairs' ratios, and an interval that holds it with {confidence:.1%}. Error: relative L2 "
        f"of the actions to {report['yardstick']}; ours {report['error']:.1e}.",
    ]
    return lines


def _against_bf16(report: dict[str, Any]) -> list[str]:
    found = report["against_bf16"]
    bf16, longer = found["bf16"], found["times_longer"]
    lines = _head("whole call", "p50", "p95", "p99", "max", *report["stages"], "weights, MB", "else, MB")
    for name, r in (("bf16", bf16), ("fp8", report)):
        times = [f"{v:.2f}" for v in r["call_ms"].values()]
        each = [s.get("ms", "–") for s in r["stages"].values()]
        lines.append(_row(name, *times, *each, r["weight_mb"], r["arena_mb"]))
    lines += [
        "",
        f"ms; bf16 takes {longer['median']:.3f} [{longer['low']:.3f}, {longer['high']:.3f}] times as long (median of "
        f"{found['pairs']} pairs of calls in turn). Actions of {found['samples']} observations against bf16: worst "
        f"cosine {found['cosine']:.5f}, median {found['cosine_median']:.5f}, worst of what is added to the noise "
        f"{found['cosine_added']:.5f}; relative L2 {found['relative_l2']:.4f} at worst, median "
        f"{found['relative_l2_median']:.4f}. Scales: {found['scales']}. Products kept in bf16: {len(found['kept'])}.",
    ]
    if "to_reference_fp8" in found:
        lines.append(
            f"To the reference executor in fp8: {found['to_reference_fp8']:.1e}; of bf16 to it "
            f"{found['bf16_to_reference_fp8']:.1e}."
        )
    return lines
