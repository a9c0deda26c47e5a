"""The page in this process, on a free port, for tests: a server with its ROS side, and a browser's part of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import rclpy

from vla_infer.contract import load_contract
from vla_infer.page.feed import Feed
from vla_infer.page.ros import JOINT_RATE, Look, RosSide, start_ros
from vla_infer.page.server import ADDRESS, Server, hello


class Live:
    """A browser's websocket: keeps what came. acknowledge: say that pictures were drawn."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, *, acknowledge: bool) -> None:
        self.socket = socket
        self.hello: dict[str, Any] = {}
        self.status: dict[str, Any] = {}
        self.samples: list[Any] = []
        self.pictures: dict[int, list[bytes]] = {}
        self._acknowledge = acknowledge
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self.socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                self.pictures.setdefault(message.data[0], []).append(message.data[1:])
                if self._acknowledge:
                    await self.socket.send_bytes(message.data[:1])
                continue
            said = json.loads(message.data)
            self.hello = said if "robot" in said else self.hello
            self.status = said.get("status", self.status)
            self.samples += said.get("samples", [])


class Page:
    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self.session = session
        self.port = port
        self.url = f"http://{ADDRESS}:{port}"

    async def live(self, *, acknowledge: bool = True) -> Live:
        socket = await self.session.ws_connect(f"{self.url}/live", headers={"Origin": self.url})
        return Live(socket, acknowledge=acknowledge)

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        async with self.session.post(self.url + path, json=body, headers={"Origin": self.url}) as response:
            assert response.status == 200, await response.text()
            return dict(await response.json())


async def soon(condition: Callable[[], Any], what: str, *, timeout: float = 10.0) -> Any:
    """Wait for `condition`; the time-out only bounds a failure."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"{what}: not within {timeout} s"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(feed: Feed, operations: Any, told: dict[str, Any], port: int = 0) -> AsyncIterator[Page]:
    server = Server(feed, operations, told)
    port = await server.start(port)
    try:
        async with aiohttp.ClientSession() as session:
            yield Page(session, port)
    finally:
        await server.close()


@asynccontextmanager
async def page(contract_path: str, *, port: int = 0) -> AsyncIterator[Page]:
    """The whole of it for a contract, in a ROS context of its own."""
    contract = load_contract(contract_path)
    context, node = start_ros([])
    feed = Feed(len(contract.cameras), JOINT_RATE)
    side = RosSide(context, node, contract=contract, target="vla_node", look=Look(15.0, 640), feed=feed)
    side.start()
    try:
        async with serving(feed, side, hello(contract, side.channels.all, "vla_node"), port) as made:
            yield made
        assert not side.failed, side.failed
    finally:
        await asyncio.get_running_loop().run_in_executor(None, side.close)
        node.destroy_node()
        rclpy.shutdown(context=context)
