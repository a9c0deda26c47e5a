"""The web server on 127.0.0.1: the page's files, its websocket, and what an operator can do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any, Protocol

from aiohttp import web

from ..contract import Contract
from ..errors import ObservationError
from .access import HEADERS, refusal
from .channels import Channel
from .client import Client
from .feed import SPAN, Feed

ADDRESS = "127.0.0.1"
MAX_CLIENTS = 8  # pages that are open at a time
MAX_CONNECTIONS = 64
MAX_BODY = 8192  # bytes: an instruction has at most 1024 characters
SERVICES = ("run", "hold", "emergency_stop", "reset", "activate", "new_scene")
ANSWER_LIMIT = 3.0  # s for the node to answer
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/plots.js": ("plots.js", "text/javascript"),
}


class Operations(Protocol):
    """What the server asks of the ROS side; see `RosSide`."""

    def instruct(self, text: str) -> tuple[str, str]: ...
    def press_emergency_stop(self) -> None: ...
    def call(self, service: str, answer: Callable[[bool, str], None]) -> Callable[[], None]: ...


class Server:
    """hello: what a browser is told first, the contract's cameras and channels among it."""

    def __init__(self, feed: Feed, operations: Operations, hello: dict[str, Any]) -> None:
        self._feed = feed
        self._operations = operations
        self._hello = hello
        self._clients: set[Client] = set()
        self._sockets: set[web.WebSocketResponse] = set()
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._woken = False
        self._static = {
            path: ((files(__package__) / "static" / name).read_bytes(), kind)
            for path, (name, kind) in _FILES.items()
        }

    async def start(self, port: int) -> int:
        """Listen on `port` of 127.0.0.1, 0 for any that is free. Returns the port. Raises OSError."""
        application = web.Application(middlewares=[_guarded], client_max_size=MAX_BODY)
        for path in self._static:
            application.router.add_get(path, self._file)
        application.router.add_get("/live", self._live)
        application.router.add_post("/instruction", self._instruction)
        for service in SERVICES:
            application.router.add_post(f"/{service}", self._service(service))
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0, keepalive_timeout=20)
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: _Door(server), ADDRESS, port, backlog=MAX_CONNECTIONS
        )
        self._feed.woken = lambda: self._wake_from_thread(loop)
        return int(self._listener.sockets[0].getsockname()[1])

    async def close(self) -> None:
        self._feed.woken = lambda: None
        if self._listener is not None:
            self._listener.close()
        closing = (socket.close(code=1001, message=b"the page's server ends") for socket in self._sockets)
        with suppress(asyncio.TimeoutError):  # one that takes nothing takes no good-bye either
            await asyncio.wait_for(asyncio.gather(*closing, return_exceptions=True), 1.0)
        if self._runner is not None:
            await self._runner.cleanup()

    def _wake_from_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        # One call at a time: were the loop busy for long, calls would pile up in it.
        if not self._woken and not loop.is_closed():
            self._woken = True
            loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._woken = False
        for client in self._clients:
            client.wake()

    async def _file(self, request: web.Request) -> web.Response:
        body, kind = self._static[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def _live(self, request: web.Request) -> web.StreamResponse:
        if len(self._clients) >= MAX_CLIENTS:
            return web.Response(status=503, text=f"{MAX_CLIENTS} pages are open already; close one\n")
        socket = web.WebSocketResponse(heartbeat=20.0, timeout=1.0, max_msg_size=64, compress=False)
        client = Client(socket, self._feed, self._hello)
        self._clients.add(client)
        self._sockets.add(socket)
        self._feed.watch(1)
        try:
            await socket.prepare(request)
            await client.serve(request.transport)
        finally:
            self._feed.watch(-1)
            self._sockets.discard(socket)
            self._clients.discard(client)
        return socket

    async def _instruction(self, request: web.Request) -> web.Response:
        text = (await _body(request)).get("text")
        if not isinstance(text, str):
            raise web.HTTPBadRequest(text='expected {"text": an instruction}\n')
        try:
            sent, message = self._operations.instruct(text)
        except ObservationError as error:
            return _answer(str(error), ok=False)
        return web.json_response({"ok": True, "message": message, "text": sent})

    def _service(self, service: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            await _body(request)
            if service == "emergency_stop":
                self._operations.press_emergency_stop()
            return await self._ask(service)

        return handle

    async def _ask(self, service: str) -> web.Response:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[tuple[bool, str]] = loop.create_future()

        def settle(ok: bool, message: str) -> None:  # noqa: FBT001
            if not answered.done():
                answered.set_result((ok, message))

        def settle_soon(ok: bool, message: str) -> None:  # noqa: FBT001
            loop.call_soon_threadsafe(settle, ok, message)

        try:
            forget = self._operations.call(service, settle_soon)
        except LookupError as error:
            return _answer(str(error), ok=False)
        try:
            ok, message = await asyncio.wait_for(answered, ANSWER_LIMIT)
        except asyncio.TimeoutError:
            forget()
            return _answer(f"no answer within {ANSWER_LIMIT:g} s", ok=False)
        return _answer(message, ok=ok)


def hello(contract: Contract, channels: Sequence[Channel], node: str) -> dict[str, Any]:
    """What a browser is told first."""
    return {
        "robot": contract.robot,
        "node": node,
        "span": SPAN,
        "cameras": [
            {"name": camera.feature.rpartition(".")[2], "topic": camera.topic} for camera in contract.cameras
        ],
        "channels": [
            {"name": c.name, "quantity": c.quantity, "unit": c.unit, "limits": c.limits} for c in channels
        ],
        "instruction": {
            "topic": contract.instruction.topic,
            "default": contract.instruction.default,
            "allowed": contract.instruction.allowed,
        },
    }


class _Door(asyncio.Protocol):
    """Passes a connection on to aiohttp; one beyond the limit is closed before a byte of it is read."""

    def __init__(self, server: web.Server) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if len(self._server.connections) >= MAX_CONNECTIONS:
            transport.abort()
            return
        handler = self._server()
        transport.set_protocol(handler)
        handler.connection_made(transport)


@web.middleware
async def _guarded(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    why = refusal(request.headers, acts=request.method != "GET" or request.path == "/live")
    try:
        response = web.Response(status=403, text=why + "\n") if why else await handler(request)
    except web.HTTPException as error:
        error.headers.update(HEADERS)
        raise
    if not response.prepared:
        response.headers.update(HEADERS)
    return response


async def _body(request: web.Request) -> dict[str, Any]:
    """The JSON object of a request. Another site's form cannot send this content type."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="expected application/json\n")
    try:
        body = json.loads(await request.text())
    except (ValueError, RecursionError) as error:
        raise web.HTTPBadRequest(text="expected a JSON object\n") from error
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="expected a JSON object\n")
    return body


def _answer(message: str, *, ok: bool) -> web.Response:
    """What the page shows. A refusal is an answer too: the node did what it should."""
    return web.json_response({"ok": ok, "message": message})
