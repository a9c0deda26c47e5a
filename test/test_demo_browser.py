"""The demonstration with its own policy: what a person types on the page is what the simulated arm does."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
pytest.importorskip("aiohttp", reason="needs aiohttp")

from browser import PROGRAMS, Tab, chromium, program
from sim_support import need_simulation

from vla_infer.sim.world import World

pytestmark = pytest.mark.skipif(
    program() is None, reason=f"needs Chromium: none of {', '.join(PROGRAMS)} is installed"
)
TRIES = 4  # the policy does 100 of 100; a policy that does not listen does none, for the wrong cube ends the episode
NOTE = "document.querySelector('#task-note').textContent"


async def say(tab: Tab, text: str) -> None:
    await tab.evaluate("document.querySelector('#text').focus(); document.querySelector('#text').select()")
    await tab.type(text)
    await tab.press("Enter", code=13, text="\r")


async def one_scene(tab: Tab, world: World) -> bool:
    """In a new scene ask for a cube that the scene did not ask for. Whether that one was touched."""
    await tab.click("#hold")
    await tab.until("document.querySelector('#level-name').textContent === 'HOLD'")
    before = await tab.evaluate("document.querySelector('#episode').textContent")
    await tab.click("#new_scene")
    await tab.until(f"document.querySelector('#episode').textContent !== {before!r}")
    await tab.until(f"{NOTE} !== 'pause'")
    number = int(await tab.evaluate("document.querySelector('#episode').textContent"))
    own = world.reset(number - 1, split="eval", kinds=("touch",))
    text = f"touch the {next(colour for colour in world.scene.cubes if colour != own.colour)} cube"
    await say(tab, text)
    await tab.until(f"document.querySelector('#force').textContent === {text!r}")
    await tab.click("#run")
    await tab.until(f"['success', 'failed', 'time is over'].includes({NOTE})")
    said = await tab.evaluate("document.querySelector('#task-what').textContent")
    return said == text and await tab.evaluate(NOTE) == "success"


def test_what_is_typed_is_what_the_arm_does(tmp_path: Path) -> None:
    need_simulation()
    command = [sys.executable, "-m", "vla_infer.demo", "--duration", "0", "--log", str(tmp_path / "demo.log")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    world = World(image_size=(16, 16), cameras=("observation.images.top",))

    async def scenario() -> int:
        async with chromium() as tab:
            await tab.open(line.removeprefix("page: ").strip())
            await tab.until("['RUN', 'WARN'].includes(document.querySelector('#level-name').textContent)")
            for tried in range(1, TRIES + 1):
                if await one_scene(tab, world):
                    assert tab.problems == []
                    return tried
            return 0

    try:
        assert line.startswith("page: http://127.0.0.1:"), line
        assert asyncio.run(scenario()), f"none of {TRIES} typed instructions was carried out"
    finally:
        process.terminate()
        process.communicate(timeout=30)
        world.close()
