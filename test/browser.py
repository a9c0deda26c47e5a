"""Headless Chromium for tests, driven over its DevTools protocol with the websocket client that the page needs anyway.

Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-sandbox",  # it opens one page, of this machine; CI often runs as root, where the sandbox refuses to
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--mute-audio",
)


def program() -> str | None:
    """Path of an installed Chromium."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Tab:
    """One page. `problems` has what the page wrote to the console as an error and what it threw."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session = ""
        self.problems: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                answer = self._answers.pop(said["id"])
                if not answer.done():
                    answer.set_result(said)
                continue
            details = said.get("params", {})
            if said["method"] == "Runtime.exceptionThrown":
                thrown = details["exceptionDetails"]
                self.problems.append(thrown.get("exception", {}).get("description", thrown["text"]))
            elif said["method"] == "Runtime.consoleAPICalled" and details["type"] in ("error", "assert"):
                self.problems.append(" ".join(str(item.get("value", item)) for item in details["args"]))
            elif said["method"] == "Log.entryAdded" and details["entry"]["level"] == "error":
                self.problems.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol; its result. Raises RuntimeError with the browser's reason."""
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        request = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(request | ({"sessionId": self._session} if self._session else {}))
        said = await asyncio.wait_for(answer, 20)
        if "error" in said:
            raise RuntimeError(f"{method}: {said['error']['message']}")
        return dict(said["result"])

    async def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        target = await self.send("Target.createTarget", url="about:blank")
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            await self.send(f"{domain}.enable")
        await self.size(width, height)
        await self.dark(dark)
        await self.send("Page.navigate", url=url)
        await self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    async def size(self, width: int, height: int, *, mobile: bool = False, scale: float = 1.0) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=mobile,
        )

    async def dark(self, dark: bool) -> None:  # noqa: FBT001
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.send("Emulation.setEmulatedMedia", features=features)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression. Raises RuntimeError where it throws."""
        said = await self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in said:
            raise RuntimeError(f"{expression}: {said['exceptionDetails']['text']}")
        return said["result"].get("value")

    async def until(self, expression: str, *, timeout: float = 20.0) -> Any:
        """Wait for an expression to be true; the time-out only bounds a failure."""
        end = time.monotonic() + timeout
        while True:
            value = await self.evaluate(expression)
            if value:
                return value
            assert time.monotonic() < end, f"{expression}: not within {timeout} s"
            await asyncio.sleep(0.05)

    async def type(self, text: str) -> None:
        """What a keyboard types, to whatever has the focus."""
        await self.send("Input.insertText", text=text)

    async def press(self, key: str, *, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            await self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **({"text": text} if text and kind == "keyDown" else {}),
            )

    async def click(self, selector: str) -> None:
        """With the mouse, in the middle of the element: what lies above it would be hit."""
        where = await self.evaluate(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send(
                "Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1
            )

    async def screenshot(self, path: Path) -> None:
        said = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(said["data"]))


@asynccontextmanager
async def chromium() -> AsyncIterator[Tab]:
    """A browser with a profile of its own, and a tab in it."""
    path = program()
    assert path is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Its start script expects no session bus; what it says of itself is of no interest but for one line.
        process = subprocess.Popen(
            [path, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HOME": profile},
        )
        try:
            address = await asyncio.get_running_loop().run_in_executor(None, _address, process)
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(address, max_msg_size=0) as socket,
            ):
                yield Tab(socket)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"DevTools listening on (ws://\S+)", line)
        if found:
            return found[1]
    raise RuntimeError("Chromium ended before it listened")
