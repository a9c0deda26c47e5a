"""The page over real DDS, HTTP and websockets: what it shows, what it lets an operator do, whom it refuses."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
aiohttp = pytest.importorskip("aiohttp", reason="needs aiohttp")

from page_support import Page, page, serving, soon  # noqa: E402
from robot import patient_contract  # noqa: E402
from test_node import ARRAY, COMMANDS, DRY, Harness  # noqa: E402

from vla_infer.errors import ContractError  # noqa: E402
from vla_infer.page import client, ros, server  # noqa: E402
from vla_infer.page.__main__ import read_parameters  # noqa: E402
from vla_infer.page.feed import Feed  # noqa: E402

INSTRUCTION = "/instruction"
EVIL = "http://evil.example"


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    """A node with a stand-in policy and its robot, which also hears instructions."""
    made = Harness(
        commands={COMMANDS: ARRAY, DRY: ARRAY, INSTRUCTION: "std_msgs/msg/String"},
        contract=patient_contract(tmp_path),
    )
    yield made
    made.close()


def heard(harness: Harness) -> list[str]:
    return [message.data for _, message in harness.robot.commands[INSTRUCTION]]


async def said_until_heard(made: Page, harness: Harness, text: str) -> dict[str, Any]:
    """Send an instruction until the robot hears one: DDS may not have found everybody yet."""
    count, end = len(heard(harness)), time.monotonic() + 10
    while True:
        answer = await made.post("/instruction", text=text)
        assert answer["ok"], answer
        await asyncio.sleep(0.1)
        if len(heard(harness)) > count:
            return answer
        assert time.monotonic() < end, "the instruction's topic: not within 10 s"


def test_it_shows_the_robot_and_steers_the_node(harness: Harness, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with page(patient_contract(tmp_path)) as made:
            live = await made.live()
            await soon(lambda: live.status.get("lifecycle") == "active", "diagnostics")
            assert [camera["name"] for camera in live.hello["cameras"]] == ["top", "wrist"]
            assert live.hello["channels"][0] == {
                "name": "shoulder_pan",
                "quantity": "position",
                "unit": "°",
                "limits": [pytest.approx(-110, abs=0.1), pytest.approx(110, abs=0.1)],
            }
            for camera in (0, 1):
                stream = await soon(lambda camera=camera: live.pictures.get(camera), f"camera {camera}")
                pixels = cv2.imdecode(np.frombuffer(stream[-1], np.uint8), cv2.IMREAD_COLOR)
                assert pixels.shape == (48, 64, 3)
                assert abs(float(pixels.mean()) - 90) < 2
            await soon(lambda: live.samples and live.samples[-1][1][0] is not None, "joints")
            assert live.samples[-1][1][0] == pytest.approx(np.degrees(0.1), abs=1e-3)
            await soon(lambda: live.samples[-1][2][0] is not None, "commands")
            await soon(lambda: (live.status["latency"]["inference"] or {}).get("p99"), "latency")
            assert live.status["dry_run"] is True

            sent = await said_until_heard(made, harness, " fold\tthe towel ")
            assert sent["text"] == heard(harness)[-1] == "fold the towel"
            await soon(lambda: harness.policy.calls[-1][2] == "fold the towel", "the policy")
            await soon(lambda: live.status["instruction"] == "fold the towel", "in force")

            assert (await made.post("/hold"))["ok"]
            await soon(lambda: live.status["level"] == "HOLD", "hold")
            assert "~/run" in live.status["reason"]
            assert "fold the towel" in (await made.post("/run"))["message"]
            await soon(lambda: live.status["level"] in ("RUN", "WARN"), "run")

            assert (await made.post("/emergency_stop"))["ok"]
            await soon(lambda: live.status["lifecycle"] == "inactive", "emergency stop")
            assert "emergency stop" in live.status["reason"]
            assert live.status["tone"] == "bad"
            refused = await made.post("/activate")
            assert not refused["ok"]
            assert (await made.post("/reset"))["ok"]
            assert (await made.post("/activate"))["ok"]
            await soon(lambda: live.status["lifecycle"] == "active", "activation")

    harness.run()
    asyncio.run(scenario())


def test_an_instruction_that_the_node_would_refuse_is_not_sent(harness: Harness, tmp_path: Path) -> None:
    contract = patient_contract(tmp_path, instruction={"topic": "instruction", "allow": ["wave", "sit"]})

    async def scenario() -> None:
        async with page(contract) as made:
            for text, why in (
                ("fly", "is not one of the 2"),
                ("  ", "is empty"),
                ("wa\x1b[2Jve", "is not text"),
                ("x" * 1025, "at most 1024"),
            ):
                answer = await made.post("/instruction", text=text)
                assert not answer["ok"]
                assert why in answer["message"]
            await said_until_heard(made, harness, "sit")
        assert set(heard(harness)) == {"sit"}

    asyncio.run(scenario())


def test_another_site_can_do_nothing(harness: Harness, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with page(patient_contract(tmp_path)) as made:
            own = {"Origin": made.url}
            text = {"text": "let go"}

            async def status(method: str, path: str, **options: Any) -> int:
                async with made.session.request(method, made.url + path, **options) as response:
                    assert response.headers["X-Frame-Options"] == "DENY"
                    return response.status

            rebound = {"Host": f"evil.example:{made.port}"}
            assert await status("GET", "/") == 200
            assert await status("GET", "/", headers=rebound) == 403
            assert await status("GET", "/", headers={"Origin": EVIL}) == 403
            foreign = (
                {},
                {"Origin": EVIL},
                {"Origin": "null"},
                {"Origin": f"http://127.0.0.1:{made.port + 1}"},
                {"Origin": f"https://127.0.0.1:{made.port}"},
                {"Origin": made.url, **rebound},
                {"Origin": f"http://evil.example:{made.port}", **rebound},
            )
            for headers in foreign:
                assert await status("POST", "/instruction", json=text, headers=headers) == 403
                assert await status("POST", "/emergency_stop", json={}, headers=headers) == 403
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await made.session.ws_connect(f"{made.url}/live", headers=headers)
                assert refused.value.status == 403
            # What a form of another site could send, were its origin not enough.
            assert await status("POST", "/instruction", data=text, headers=own) == 415
            assert await status("POST", "/instruction", data=b"{", headers={**own, **JSON}) == 400
            assert await status("POST", "/instruction", json=["let go"], headers=own) == 400
            assert await status("POST", "/instruction", json={"text": 1}, headers=own) == 400
            assert await status("POST", "/instruction", data=b" " * 9000, headers={**own, **JSON}) == 413
            assert await status("POST", "/instruction", data=b"[" * 8000, headers={**own, **JSON}) == 400
            assert await status("GET", "/instruction", headers=own) == 405
            assert await status("GET", "/../page.py", headers=own) == 404
            await said_until_heard(made, harness, "wave")
        assert set(heard(harness)) == {"wave"}
        assert not harness.node._emergency.latched

    harness.start()
    asyncio.run(scenario())


JSON = {"Content-Type": "application/json"}


def test_it_listens_on_this_machine_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(Feed(1, 15.0), None, TOLD) as made:
            for address in ("127.0.0.2", "::1"):
                with pytest.raises(OSError, match=r"."):
                    socket.create_connection((address, made.port), timeout=2)

    asyncio.run(scenario())


TOLD = {"robot": "none", "cameras": [{"name": "top", "topic": "top"}, {"name": "wrist", "topic": "wrist"}]}


def test_without_a_node_it_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with page(patient_contract(tmp_path)) as made:
            live = await made.live()
            await soon(lambda: live.status, "status")
            assert live.status["level"] == "OFFLINE"
            assert "vla_node" in live.status["reason"]
            assert live.status["simulation"] is None
            for path in ("/run", "/emergency_stop"):
                answer = await made.post(path)
                assert not answer["ok"]
                assert "is vla_node running?" in answer["message"]
            assert "is the simulation running?" in (await made.post("/new_scene"))["message"]
            assert "nobody listens" in (await made.post("/instruction", text="wave"))["message"]

    asyncio.run(scenario())


def test_a_simulation_is_shown_and_bad_messages_are_named(harness: Harness, tmp_path: Path) -> None:
    from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
    from std_srvs.srv import Trigger

    values = {"kind": "touch", "colour": "red", "success": "true", "successes": "3", "episodes": "4"}
    message = DiagnosticStatus(values=[KeyValue(key=key, value=value) for key, value in values.items()])
    publisher = harness.robot.node.create_publisher(DiagnosticStatus, "/simulation/status", 10)

    def reset(_: Any, response: Any) -> Any:
        response.success, response.message = True, "episode 2"
        return response

    harness.robot.node.create_service(Trigger, "/simulation/reset", reset)

    async def scenario() -> None:
        async with page(patient_contract(tmp_path)) as made:
            live = await made.live()
            await soon(publisher.get_subscription_count, "subscription")
            publisher.publish(message)
            task = await soon(lambda: live.status.get("simulation"), "the simulation")
            assert (task["kind"], task["success"], task["successes"], task["episodes"]) == (
                "touch",
                True,
                3,
                4,
            )
            assert task["seconds"] is None
            assert (await made.post("/new_scene"))["message"] == "episode 2"

            def spoil() -> Any:
                harness.robot.send_image("wrist", change={"encoding": "32FC1"})
                return "32FC1" in live.status["unreadable"].get("wrist/image_raw", "")

            await soon(spoil, "the bad image")
            assert 1 not in live.pictures
            harness.robot.feed()
            await soon(lambda: live.pictures.get(1), "a good image")

    asyncio.run(scenario())


def test_cameras_are_heard_only_while_somebody_looks(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ros, "LINGER", 0.1)

    def listeners() -> int:
        return sum(camera.get_subscription_count() for camera in harness.robot._cameras.values())

    async def scenario() -> None:
        async with page(patient_contract(tmp_path)) as made:
            await soon(lambda: harness.robot._joints.get_subscription_count() == 1, "joint states")
            assert listeners() == 0
            live = await made.live()
            await soon(lambda: listeners() == 2, "subscriptions")
            await live.socket.close()
            await soon(lambda: listeners() == 0, "their end")

    asyncio.run(scenario())


def test_a_slow_browser_misses_pictures_and_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SEND_LIMIT", 1000.0)
    big = bytes(1 << 20)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def scenario() -> None:
        feed = Feed(2, 15.0)
        async with serving(feed, None, TOLD) as made:
            lazy = await made.live(acknowledge=False)
            deaf = await _handshake(made.port)  # says that it has drawn everything, and reads nothing
            before = resident()
            for number in range(150):
                feed.put_picture(0, big)
                feed.put_picture(1, big)
                feed.put_sample(number / 15.0, [1.0] * 100, [1.0] * 100)
                feed.put_document({"level": "RUN"})
                feed.woken()
                deaf.send(b"\x82\x81\0\0\0\0" + bytes((number % 2,)))
                await asyncio.sleep(0.002)
            await soon(lambda: len(lazy.samples) == 150, "all samples")
            assert {camera: len(got) for camera, got in lazy.pictures.items()} == {
                0: client.IN_FLIGHT,
                1: client.IN_FLIGHT,
            }
            assert resident() - before < 40 << 20  # of 300 MB
        deaf.close()

    # The server ends although somebody takes nothing.
    asyncio.run(asyncio.wait_for(scenario(), 30))


async def _handshake(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(
        f"GET /live HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    await asyncio.sleep(0.2)
    return connection


def test_a_browser_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SEND_LIMIT", 0.2)

    async def scenario() -> None:
        feed = Feed(2, 15.0)
        async with serving(feed, None, TOLD) as made:
            deaf = await _handshake(made.port)
            assert feed.watched

            def push() -> bool:
                feed.put_picture(0, bytes(4 << 20))
                feed.put_picture(1, bytes(4 << 20))
                feed.woken()
                return not feed.watched

            await soon(push, "the end of it")
            deaf.close()

    asyncio.run(scenario())


def test_pages_and_connections_are_limited() -> None:
    async def scenario() -> None:
        async with serving(Feed(2, 15.0), None, TOLD) as made:
            pages = [await made.live() for _ in range(server.MAX_CLIENTS)]
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await made.live()
            assert refused.value.status == 503
            await pages[0].socket.send_str("hello")
            await soon(lambda: pages[0].socket.closed, "the end of a page that talks")
            assert pages[0].socket.close_code == 1008
            await pages[1].socket.send_bytes(b"\x07")  # there is no such camera
            await soon(lambda: pages[1].socket.closed, "the end of another")
            assert pages[1].socket.close_code == 1008
            await made.live()
            idle = [socket.create_connection(("127.0.0.1", made.port)) for _ in range(server.MAX_CONNECTIONS)]
            await asyncio.sleep(0.1)
            ends = 0
            for connection in idle:
                connection.settimeout(0.01)
                try:
                    ends += connection.recv(1) == b""
                except ConnectionResetError:
                    ends += 1
                except TimeoutError:
                    continue
            assert 0 < ends < len(idle)
            for connection in idle:
                connection.close()
            await asyncio.sleep(0.1)
            assert (await made.live()).socket is not None

    asyncio.run(scenario())


@pytest.fixture
def program() -> Iterator[Any]:
    """Starts the page as a program; whatever becomes of the test, it ends."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "vla_infer.page", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_program_says_where_it_is_and_ends_with_a_signal(program: Any) -> None:
    first = program("--ros-args", "-p", "contract:=so101", "-p", "port:=0")
    assert first.stdout is not None
    line = first.stdout.readline()
    assert line.startswith("page: http://127.0.0.1:")
    assert os.getpriority(os.PRIO_PROCESS, first.pid) == 10
    port = line.strip().rstrip("/").rpartition(":")[2]
    second = program("--ros-args", "-p", "contract:=so101", "-p", f"port:={port}")
    _, said = second.communicate(timeout=20)
    assert second.returncode == 2
    assert said.count("\n") == 1
    assert "choose another port" in said
    first.send_signal(signal.SIGINT)
    output, said = first.communicate(timeout=20)
    assert (first.returncode, output, said) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("contract:=so101 port:=70000", "parameter 'port'"),
        ("contract:=so101 port:=high", "parameter 'port'"),
        ("contract:=so101 image_rate:=0.0", "parameter 'image_rate'"),
        ("port:=0", "parameter 'contract' is empty"),
    ],
)
def test_a_wrong_parameter_is_one_line(arguments: str, why: str) -> None:
    given = [part for argument in arguments.split() for part in ("-p", argument)]
    context, node = ros.start_ros(["page", "--ros-args", *given])
    try:
        with pytest.raises(ContractError) as error:
            read_parameters(node)
        assert why in str(error.value)
        assert "\n" not in str(error.value)
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)


def test_the_terminal_view_is_a_line_a_second_where_it_is_no_terminal(program: Any) -> None:
    view = program("--no-page", "--ros-args", "-p", "contract:=so101")
    assert view.stdout is not None
    lines = [view.stdout.readline() for _ in range(2)]
    view.send_signal(signal.SIGTERM)
    view.communicate(timeout=20)
    assert view.returncode == 0
    assert all(line == "OFFLINE  nothing heard from vla_node yet\n" for line in lines), lines
