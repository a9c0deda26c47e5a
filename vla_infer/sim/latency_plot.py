"""What latency costs a robot: success against added latency for each scheduler mode, as SVG, Markdown and JSON.

python -m vla_infer.sim.latency_plot --policy DIR --out docs/latency.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vla_infer.errors import VlaInferError
from vla_infer.safety_options import MODES
from vla_infer.sim.evaluate import evaluate, options_of, summary
from vla_infer.sim.tasks import KINDS

LATENCIES = (0.0, 50.0, 100.0, 200.0, 300.0, 400.0, 500.0)  # ms
# Okabe and Ito's palette, which people who do not see red and green apart can read; and a mark for print.
_COLOURS = {"latest": "#0072b2", "blend": "#e69f00", "ensemble": "#009e73", "rtc": "#d55e00"}
_DASHES = {"latest": "", "blend": "6 3", "ensemble": "2 3", "rtc": "10 3 2 3"}
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 120, 44, 56
_SHIFT = 3.0  # px between the modes' intervals, so that none hides another

Point = Mapping[str, Any]  # rate, low and high as `evaluate.rate` gives them


def plot(curves: Mapping[str, Mapping[float, Point]], caption: str) -> str:
    """An SVG of success rates with their 95 % intervals: mode -> added latency in ms -> rate."""
    latencies = sorted({latency for points in curves.values() for latency in points})
    most = max(latencies[-1], 1.0)
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(latency: float) -> float:
        return _LEFT + wide * latency / most

    def y(rate: float) -> float:
        return _TOP + high * (1.0 - rate)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="14">{_escaped(caption)}</text>',
    ]
    for percent in range(0, 101, 20):
        at = y(percent / 100)
        parts.append(f'<path d="M{_LEFT} {at:.1f}h{wide}" stroke="#dddddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{percent} %</text>')
    for latency in latencies:
        parts.append(
            f'<text x="{x(latency):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{latency:g}</text>'
        )
    middle = _LEFT + wide / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 14}" text-anchor="middle">added latency, ms</text>')
    parts.append(
        f'<text transform="translate(18 {_TOP + high / 2}) rotate(-90)" text-anchor="middle">success</text>'
    )
    for i, (mode, points) in enumerate(curves.items()):
        colour, shift = _COLOURS[mode], _SHIFT * (i - (len(curves) - 1) / 2)
        line = " ".join(
            f"{x(latency) + shift:.1f},{y(points[latency]['rate']):.1f}" for latency in sorted(points)
        )
        dash = f' stroke-dasharray="{_DASHES[mode]}"' if _DASHES[mode] else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for latency, point in points.items():
            at, low, top = x(latency) + shift, y(point["low"]), y(point["high"])
            parts.append(f'<path d="M{at:.1f} {low:.1f}V{top:.1f}" stroke="{colour}" stroke-opacity="0.4"/>')
            parts.append(f'<circle cx="{at:.1f}" cy="{y(point["rate"]):.1f}" r="3.5" fill="{colour}"/>')
        legend = _TOP + 12 + 22 * i
        start = _WIDTH - _RIGHT + 16
        parts.append(f'<path d="M{start} {legend}h28" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<text x="{start + 36}" y="{legend + 4}">{mode}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def table(curves: Mapping[str, Mapping[float, Point]]) -> str:
    """The same numbers as Markdown."""
    latencies = sorted({latency for points in curves.values() for latency in points})
    lines = ["| added latency | " + " | ".join(curves) + " |", "| --- " * (len(curves) + 1) + "|"]
    for latency in latencies:
        cells = []
        for points in curves.values():
            p = points.get(latency)
            cells.append(
                f"{100 * p['rate']:.0f} % ({100 * p['low']:.0f} to {100 * p['high']:.0f})" if p else "-"
            )
        lines.append(f"| {latency:g} ms | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vla_infer.sim.latency_plot", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--policy", required=True, help="directory of the policy")
    parser.add_argument("--out", type=Path, required=True, help="SVG; .json and .md are written beside it")
    parser.add_argument("--episodes", type=int, default=50, help="of each point (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["touch", "push_left", "push_right"])
    parser.add_argument("--latencies-ms", nargs="+", type=float, default=LATENCIES)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--contract", default="so101", help="its scheduler options but the mode are kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--inference-ms", type=float, help="in simulated time (default: measured, once)")
    parser.add_argument("--time-limit", type=float, default=10.0, help="s of an episode (default: 10)")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(arguments)
    try:
        _run(args)
    except VlaInferError as error:
        print(f"latency_plot: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    options = options_of(args)
    known = args.out.with_suffix(".json")
    runs: list[dict[str, Any]] = []
    curves: dict[str, dict[float, Point]] = {}
    for mode in args.modes:
        for latency in args.latencies_ms:
            done = evaluate(replace(options, scheduler=mode, latency=latency / 1e3), workers=args.workers)
            options = replace(options, inference=done.options.inference)  # one figure for all points
            document = summary(done)
            runs.append(document)
            curves.setdefault(mode, {})[latency] = document["success"]
            rate = 100 * document["success"]["rate"]
            print(f"{mode} {latency:g} ms: {rate:.1f} %, {done.wall:.0f} s", file=sys.stderr, flush=True)
            # After each point, so that a run that is cut short has left what it found.
            caption = (
                f"{Path(args.policy).name}: {args.episodes} scenes a point, an inference takes "
                f"{1e3 * (options.inference or 0):.0f} ms"
            )
            args.out.write_text(plot(curves, caption), encoding="utf-8")
            args.out.with_suffix(".md").write_text(table(curves), encoding="utf-8")
            known.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print(table(curves), end="")


if __name__ == "__main__":
    sys.exit(main())
