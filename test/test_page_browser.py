"""The page in a real browser: an instruction that is typed arrives on the ROS topic, and what ROS says is shown."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
pytest.importorskip("aiohttp", reason="needs aiohttp")

from browser import PROGRAMS, chromium, program  # noqa: E402
from page_support import page, soon  # noqa: E402
from robot import patient_contract  # noqa: E402
from test_node import ARRAY, COMMANDS, DRY, Harness  # noqa: E402

pytestmark = pytest.mark.skipif(
    program() is None, reason=f"needs Chromium: none of {', '.join(PROGRAMS)} is installed"
)
INSTRUCTION = "/instruction"
MARKUP = "wave <img src=x onerror=document.title='taken'>"
CAMERA_DRAWN = (
    "[...document.querySelectorAll('figure canvas')].every("
    "c => Math.abs(c.getContext('2d').getImageData(5, 5, 1, 1).data[0] - 90) < 3)"
)
JOINT_DRAWN = (
    "[...document.querySelectorAll('.joint canvas')].every("
    "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v > 0))"
)
BUTTONS_IN_SIGHT = (
    "[...document.querySelectorAll('header button')].every(button => {"
    " const b = button.getBoundingClientRect();"
    " return b.left >= 0 && b.right <= innerWidth && b.top >= 0 && b.bottom <= innerHeight"
    " && button.scrollWidth <= button.clientWidth && button.contains("
    "document.elementFromPoint(b.x + b.width / 2, b.y + b.height / 2)); })"
)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    made = Harness(
        commands={COMMANDS: ARRAY, DRY: ARRAY, INSTRUCTION: "std_msgs/msg/String"},
        contract=patient_contract(tmp_path),
    )
    yield made
    made.close()


def test_what_is_typed_arrives_and_what_happens_is_shown(harness: Harness, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with page(patient_contract(tmp_path)) as made, chromium() as tab:
            await tab.open(made.url + "/")
            await tab.until("document.querySelectorAll('.joint').length === 6")
            await tab.until(CAMERA_DRAWN)
            await tab.until(JOINT_DRAWN)
            await tab.until("['RUN', 'WARN'].includes(document.querySelector('#level-name').textContent)")
            await tab.until("document.querySelector('#tile-inference .value').textContent.endsWith(' ms')")
            assert await tab.evaluate("document.querySelector('#mode').textContent") == "dry run"
            assert await tab.evaluate("document.querySelector('#task').hidden")

            await tab.press("/", code=191, text="/")
            assert await tab.evaluate("document.activeElement.id") == "text"
            await tab.type(MARKUP)
            await tab.press("Enter", code=13, text="\r")
            await soon(
                lambda: [m.data for _, m in harness.robot.commands[INSTRUCTION]] == [MARKUP], "ROS topic"
            )
            await soon(lambda: harness.policy.calls[-1][2] == MARKUP, "policy")
            await tab.until(f"document.querySelector('#force').textContent === {MARKUP!r}")
            await tab.until("document.querySelector('#told').textContent === 'vla_node has taken it'")
            assert await tab.evaluate("document.querySelectorAll('img').length") == 0

            await tab.click("#hold")
            await tab.until("document.querySelector('#level-name').textContent === 'HOLD'")
            await tab.click("#run")
            await tab.until("document.querySelector('#level-name').textContent !== 'HOLD'")
            await tab.press("Escape", code=27)
            await tab.until("document.querySelector('#level-name').textContent === 'INACTIVE'")
            assert harness.node._emergency.latched
            await tab.click("#reset")
            await tab.until("document.querySelector('#told').textContent.startsWith('reset')")
            assert await tab.evaluate("document.querySelector('#run').textContent") == "Activate"
            await tab.click("#run")
            await tab.until("['RUN', 'WARN'].includes(document.querySelector('#level-name').textContent)")

            for width in (1280, 390):
                await tab.size(width, 800, mobile=width < 500)
                assert await tab.evaluate("document.documentElement.scrollWidth") <= width
                assert await tab.evaluate(BUTTONS_IN_SIGHT)
            assert tab.problems == []

    harness.run()
    asyncio.run(scenario())


def test_a_page_without_its_server_says_so_and_finds_it_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with chromium() as tab:
            async with page(patient_contract(tmp_path)) as made:
                await tab.open(made.url + "/")
                await tab.until("document.querySelector('#level-name').textContent === 'OFFLINE'")
                assert await tab.evaluate("document.querySelector('#lost').hidden")
            await tab.until("!document.querySelector('#lost').hidden")
            assert "lost its server" in await tab.evaluate("document.querySelector('#lost').textContent")
            await tab.click("#hold")
            await tab.until("document.querySelector('#told').textContent.includes('does not answer')")
            async with page(patient_contract(tmp_path), port=made.port):
                await tab.until("document.querySelector('#lost').hidden")

    asyncio.run(scenario())
