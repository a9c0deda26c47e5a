"""The same as the page in a terminal: a block that is drawn over itself, or a line a second where it is no terminal."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from ..contract_parse import readable
from .board import Document
from .feed import Feed, Sample

_PERIOD = 0.25  # s between two drawings; a second where it is no terminal
_COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "bad": "\x1b[31m", "idle": "\x1b[2m"}
_BOLD, _PLAIN, _HIDE, _SHOW, _CLEAR = "\x1b[1m", "\x1b[0m", "\x1b[?25l", "\x1b[?25h", "\x1b[J"
_BAR = 30  # characters of a joint's scale


async def show(
    feed: Feed, names: Sequence[str], robot: str, stop: asyncio.Event, out: TextIO | None = None
) -> None:
    """Draw `feed` until `stop` is set; names: of the channels."""
    out = out or sys.stdout
    view = View(names, robot)
    drawn = 0
    if out.isatty():
        out.write(_HIDE)
    try:
        while not stop.is_set():
            samples = feed.samples(0)
            document = feed.document()[1]
            if out.isatty():
                size = shutil.get_terminal_size()
                lines = view.block(document, samples, width=size.columns - 1)[: size.lines - 1]
                out.write(f"\x1b[{drawn}F" if drawn else "")
                out.write(_CLEAR + "\n".join(lines) + "\n")
                drawn = len(lines)
            else:
                out.write(view.line(document) + "\n")
            out.flush()
            try:
                await asyncio.wait_for(stop.wait(), _PERIOD if out.isatty() else 1.0)
            except asyncio.TimeoutError:
                continue
    finally:
        if out.isatty():
            out.write(_SHOW)
            out.flush()


class View:
    """Documents and samples as text. Pure. What came over ROS is stripped of control characters."""

    def __init__(self, names: Sequence[str], robot: str) -> None:
        self._names = names
        self._robot = robot

    def line(self, document: Document) -> str:
        """One line, for a log."""
        parts = [str(document.get("level", "OFFLINE")), readable(str(document.get("reason") or ""))]
        parts += [f"'{readable(document['instruction'])}'" if document.get("instruction") else ""]
        parts += [*_latencies(document), _task(document)]
        return "  ".join(part for part in parts if part)

    def block(self, document: Document, samples: Sequence[Sample], *, width: int) -> list[str]:
        """Lines of at most `width` characters for a terminal, colours beside."""
        level = str(document.get("level", "OFFLINE"))
        colour = _COLOURS[document.get("tone", "idle")]
        mode = {True: "dry run", False: "ARMED", None: ""}[document.get("dry_run")]
        head = f"{self._robot}  {level}  {mode}"
        lines = [
            f"{self._robot}  {colour}{_BOLD}{level}{_PLAIN}  {mode}" if len(head) <= width else head[:width],
            readable(str(document.get("reason") or ""))[:width],
            f"instruction  {readable(document.get('instruction') or 'none')}"[:width],
            "  ".join(_latencies(document))[:width],
            _task(document)[:width],
        ]
        lines = [line for line in lines if line]
        longest = max((len(name) for name in self._names), default=0)
        for index, name in enumerate(self._names):
            lines.append(_joint(name.ljust(longest), index, samples)[:width])
        return lines


def _latencies(document: Document) -> list[str]:
    parts = []
    for name, figure, title in (
        ("inference", "p50", "inference"),
        ("age", "p50", "observation age"),
        ("lateness", "p99", "ticks late p99"),
    ):
        value = ((document.get("latency") or {}).get(name) or {}).get(figure)
        parts.append("" if value is None else f"{title} {value:.1f} ms")
    rate = document.get("inference_rate")
    parts.append("" if rate is None else f"{rate:.1f} inferences/s")
    return [part for part in parts if part]


def _task(document: Document) -> str:
    task = document.get("simulation")
    if not task:
        return ""
    done, tried, seconds = task["successes"], task["episodes"], task["seconds"]
    counted = f"  {done:.0f} of {tried:.0f} succeeded" if done is not None and tried is not None else ""
    clock = f"  {seconds:.1f} s" if seconds is not None else ""
    what = readable(f"task {task['kind']} {task['colour']}")
    return f"{what}{clock}{counted}{'  SUCCESS' if task['success'] else ''}"


def _joint(title: str, index: int, samples: Sequence[Sample]) -> str:
    """A joint's place between the ends of the last seconds: o measured, + commanded, * both."""
    pairs = [(sample.measured[index], sample.commanded[index]) for sample in samples]
    seen = [value for pair in pairs for value in pair if value is not None]
    if not seen:
        return f"{title}  {'-':>9}"
    low, high = min(seen), max(seen)
    scale = [" "] * _BAR
    measured, commanded = pairs[-1]
    for value, mark in ((measured, "o"), (commanded, "+")):
        if value is not None:
            at = round((value - low) / (high - low) * (_BAR - 1)) if high > low else _BAR // 2
            scale[at] = "*" if scale[at] != " " else mark
    figures = "".join(f"  {value:>9.2f}" if value is not None else f"  {'-':>9}" for value in pairs[-1])
    return f"{title}{figures}  [{''.join(scale)}]"
