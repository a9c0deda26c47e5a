"""One browser on the websocket. It gets what is newest when it can take it; nothing waits for it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import WSMsgType, web

from .feed import Feed, reading

IN_FLIGHT = 2  # pictures of one camera that a browser has not yet said it has drawn
SEND_LIMIT = 10.0  # s for one message to leave; a browser that takes none for so long is gone


class Client:
    """Reads the feed at its own pace. A picture is one binary message, its first byte the camera's number; the
    browser answers with that byte once it has drawn it. Everything else is JSON, from the server alone.
    """

    def __init__(self, socket: web.WebSocketResponse, feed: Feed, hello: dict[str, Any]) -> None:
        cameras = len(hello["cameras"])
        self._socket = socket
        self._feed = feed
        self._hello = hello
        self._wake = asyncio.Event()
        self._shown = [0] * cameras  # number of the newest picture sent
        self._under_way = [0] * cameras
        self._document = 0
        self._sample = 0

    def wake(self) -> None:
        self._wake.set()

    async def serve(self, transport: asyncio.Transport | None) -> None:
        """Until the browser goes away or sends what it should not."""
        writer = asyncio.create_task(self._write(transport))
        try:
            async for message in self._socket:
                if not self._acknowledged(message):
                    await self._socket.close(code=1008, message=b"expected a camera's number")
                    break
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    def _acknowledged(self, message: Any) -> bool:
        if message.type is not WSMsgType.BINARY or len(message.data) != 1:
            return False
        camera = message.data[0]
        if camera >= len(self._under_way):
            return False
        self._under_way[camera] = max(0, self._under_way[camera] - 1)
        self._wake.set()
        return True

    async def _write(self, transport: asyncio.Transport | None) -> None:
        try:
            await self._send(json.dumps(self._hello, allow_nan=False))
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._write_news()
        except (OSError, RuntimeError, asyncio.TimeoutError):
            # Not by a closing handshake: what takes no message would not take that one either.
            if transport is not None:
                transport.abort()

    async def _write_news(self) -> None:
        number, document = self._feed.document()
        if number > self._document:
            self._document = number
            await self._send(json.dumps({"status": document}, allow_nan=False))
        samples = self._feed.samples(self._sample)
        if samples:
            self._sample = samples[-1].number
            rows = [reading(sample) for sample in samples]
            await self._send(json.dumps({"samples": rows}, separators=(",", ":"), allow_nan=False))
        for camera, shown in enumerate(self._shown):
            picture = self._feed.picture(camera)
            if picture is None or picture.number <= shown or self._under_way[camera] >= IN_FLIGHT:
                continue
            self._shown[camera] = picture.number
            self._under_way[camera] += 1
            await self._send(bytes((camera,)) + picture.jpeg)

    async def _send(self, message: str | bytes) -> None:
        # aiohttp waits here while more than a few kB have not left, so at most one message is in memory.
        send = (
            self._socket.send_str(message) if isinstance(message, str) else self._socket.send_bytes(message)
        )
        await asyncio.wait_for(send, SEND_LIMIT)
