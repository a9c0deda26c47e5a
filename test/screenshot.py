"""A screenshot of the page: python test/screenshot.py URL FILE.png"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from browser import PROGRAMS, chromium, program


async def take(args: argparse.Namespace) -> list[str]:
    """Write the picture; returns what the page complained of."""
    async with chromium() as tab:
        await tab.open(args.url, width=args.width, height=args.height, dark=args.dark)
        if args.say:
            await tab.until("document.querySelector('#level').classList.contains('idle') === false")
            await tab.evaluate("document.querySelector('#text').focus()")
            await tab.type(args.say)
            await tab.press("Enter", code=13, text="\r")
        await asyncio.sleep(args.after)
        await tab.screenshot(args.file)
        return tab.problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--after", type=float, default=15.0, help="seconds that the page has been open")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=860)
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
