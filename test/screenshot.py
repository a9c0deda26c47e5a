"""A picture of the page, or a short film: python test/screenshot.py URL FILE.png|FILE.gif"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import cv2
from browser import PROGRAMS, Tab, chromium, program

FILM_RATE = 5.0  # pictures a second
FILM_WIDTH = 800  # pixels


async def take(args: argparse.Namespace) -> list[str]:
    """Write the file; returns what the page complained of."""
    async with chromium() as tab:
        await tab.open(args.url, width=args.width, height=args.height, dark=args.dark)
        await asyncio.sleep(args.after)
        if args.say:
            await tab.evaluate("document.querySelector('#text').focus()")
            await tab.type(args.say)
            await tab.press("Enter", code=13, text="\r")
            await asyncio.sleep(2.0)
        if args.file.suffix == ".gif":
            await _film(tab, args.file, args.seconds)
        else:
            await tab.screenshot(args.file)
        return tab.problems


async def _film(tab: Tab, file: Path, seconds: float) -> None:
    frames, times = [], []
    with tempfile.TemporaryDirectory() as folder:
        still = Path(folder) / "still.png"
        begun = time.monotonic()
        while time.monotonic() < begun + seconds:
            times.append(time.monotonic())
            await tab.screenshot(still)
            picture = cv2.imread(str(still))
            size = FILM_WIDTH, round(picture.shape[0] * FILM_WIDTH / picture.shape[1])
            frames.append(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
            await asyncio.sleep(max(0.0, times[-1] + 1 / FILM_RATE - time.monotonic()))
    times.append(time.monotonic())
    film = cv2.Animation()
    film.frames = frames
    film.durations = [round(1e3 * (b - a)) for a, b in pairwise(times)]
    cv2.imwriteanimation(str(file), film)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--after", type=float, default=15.0, help="seconds that the page has been open")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=860)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a film")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--say", help="an instruction to send first")
    args = parser.parse_args()
    if program() is None:
        print(f"screenshot: needs Chromium: none of {', '.join(PROGRAMS)} is installed", file=sys.stderr)
        return 2
    problems = asyncio.run(take(args))
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
