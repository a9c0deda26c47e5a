"""The page's pure parts: who may talk to it, what it knows of the node, joints, pictures, the terminal's view."""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vla_infer.codecs import JointSample, Setpoint
from vla_infer.contract import load_contract
from vla_infer.demo.figures import live_line, progress, successes, ticks
from vla_infer.errors import ObservationError
from vla_infer.page.access import refusal
from vla_infer.page.board import SILENT, Board, Status
from vla_infer.page.channels import Channels, Row
from vla_infer.page.feed import SPAN, Feed, reading
from vla_infer.page.terminal import View, show


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8600", "localhost:8600", "localhost", "127.0.0.1", "localhost:9000"]
)
def test_names_of_this_machine_are_let_in(host: str) -> None:
    assert refusal({"Host": host}, acts=False) == ""
    assert refusal({"Host": host, "Origin": f"http://{host}"}, acts=True) == ""
    assert "no Origin" in refusal({"Host": host}, acts=True)
    assert "another site" in refusal({"Host": host, "Origin": "http://evil.example"}, acts=False)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8600",
        "127.0.0.1.evil.example",
        "localhost.evil.example:8600",
        "evil.example@localhost",
        "localhost@evil.example",
        "localhost/evil.example",
        "localhost:port",
        "localhost:99999",
        "0.0.0.0:8600",
        "[::1",
    ],
)
def test_other_names_are_not(host: str) -> None:
    assert "Host" in refusal({"Host": host, "Origin": f"http://{host}"}, acts=True)
    assert "Host" in refusal({"Host": host}, acts=False)


def statuses(
    *, lifecycle: str = "active", failsafe: str = "RUN", severity: int = 0, message: str = "", **figures: str
) -> dict[str, Status]:
    return {
        "vla_node: state": Status(
            severity, message, {"lifecycle": lifecycle, "dry_run": "true", "instruction": "wave"}
        ),
        "vla_node: control": Status(0, "", {"failsafe": failsafe, **figures}),
        "vla_node: inference": Status(
            0,
            "",
            {"inferences": figures.get("inferences", "0"), "predict p50 ms": "6.30", "predict p99 ms": "nan"},
        ),
        "another: state": Status(2, "on fire", {}),
    }


def test_the_level_is_the_failsafes_while_the_node_is_active() -> None:
    board = Board("vla_node", "instruction")
    assert board.document(0.0)["level"] == "OFFLINE"
    assert not board.diagnostics({"another: state": Status(0, "", {})}, 1.0)
    assert board.document(1.0)["level"] == "OFFLINE"
    assert board.diagnostics(statuses(), 2.0)
    assert (board.document(2.0)["level"], board.document(2.0)["tone"]) == ("RUN", "ok")
    board.diagnostics(statuses(failsafe="HOLD", severity=1, message="top is stale"), 3.0)
    document = board.document(3.0)
    assert (document["level"], document["tone"], document["reason"]) == ("HOLD", "warn", "top is stale")
    board.diagnostics(statuses(lifecycle="inactive", severity=2, message="DEACTIVATE: emergency stop"), 4.0)
    document = board.document(4.0)
    assert (document["level"], document["tone"]) == ("INACTIVE", "bad")
    assert document["reason"] == "DEACTIVATE: emergency stop"
    silent = board.document(4.0 + SILENT + 2)
    assert silent["level"] == "OFFLINE"
    assert "silent for 5 s" in silent["reason"]


def test_rates_and_rising_guard_counts_come_from_two_reports() -> None:
    board = Board("vla_node", "instruction")
    board.diagnostics(
        statuses(inferences="100", commands_played="500", commands_held="7", guard_velocity="3", ticks="9"),
        10.0,
    )
    assert board.document(10.0)["inference_rate"] is None
    board.diagnostics(
        statuses(
            failsafe="WARN",
            inferences="130",
            commands_played="600",
            commands_held="7",
            guard_velocity="4",
            ticks="9",
        ),
        12.0,
    )
    document = board.document(12.0)
    assert (document["inference_rate"], document["command_rate"]) == (15.0, 50.0)
    assert document["reason"] == "guard: velocity 4"
    assert document["latency"]["inference"] == {"p50": 6.3}  # p99 is no number
    assert document["due"] is None  # ticks_missed is not there
    for second in range(13, 23):
        board.diagnostics(statuses(inferences=str(10 * second)), float(second))
    assert board.document(22.0)["inference_rate"] == 10.0  # the first ones no longer count
    assert board.document(22.0)["command_rate"] is None
    board.diagnostics(statuses(inferences="1", commands_played="2"), 23.0)  # started again
    assert board.document(23.0)["inference_rate"] is None
    board.diagnostics(statuses(inferences="31"), 23.1)  # held up, two at a time
    assert board.document(23.1)["inference_rate"] is None


def test_a_simulation_counts_only_while_it_speaks() -> None:
    board = Board("vla_node", "instruction")
    values = {"kind": "push_left", "colour": "red", "success": "True", "successes": "3", "episodes": "inf"}
    board.simulation(Status(0, "", values), 1.0)
    task = board.document(1.5)["simulation"]
    assert (task["kind"], task["success"], task["successes"], task["episodes"]) == (
        "push_left",
        True,
        3.0,
        None,
    )
    assert board.document(1.5 + SILENT)["simulation"] is None


def test_channels_are_in_the_policys_units() -> None:
    contract = load_contract("so101")
    channels = Channels(contract)
    assert [channel.name for channel in channels.all] == list(contract.commands[0].joints)
    assert [channel.unit for channel in channels.all] == ["°"] * 5 + [""]
    assert channels.all[5].limits == (pytest.approx(0, abs=0.1), pytest.approx(100, abs=0.1))
    row, order = np.full(6, np.nan), tuple(reversed(contract.states[0].joints))
    position = np.array([1.7453, 0.5, 0.4, 0.3, 0.2, 0.1])
    channels.measured(
        contract.states[0], JointSample((*order, "extra"), np.append(position, 9), None, None), row
    )
    assert row[:5] == pytest.approx(np.degrees([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert row[5] == pytest.approx(100)
    row = np.full(6, np.nan)
    channels.commanded(contract.commands[0], Setpoint((), "", np.array([[0.1, 0.2]]), np.zeros(1)), row)
    assert row[:2] == pytest.approx(np.degrees([0.1, 0.2]))
    assert np.isnan(row[2:]).all()


def test_channels_of_an_arm_on_a_base() -> None:
    contract = load_contract("lekiwi")
    channels = Channels(contract)
    names = [(channel.name, channel.quantity, channel.unit) for channel in channels.all]
    assert names[6:] == [
        ("linear.x", "velocity", ""),
        ("linear.y", "velocity", ""),
        ("angular.z", "velocity", "°/s"),
        ("base_x", "velocity", ""),
        ("base_y", "velocity", ""),
        ("base_theta", "velocity", "°/s"),
    ]
    row = np.full(12, np.nan)
    sample = JointSample(("base_theta",), np.array([9.0]), np.array([0.5]), None)
    channels.measured(contract.states[1], sample, row)
    assert row[11] == pytest.approx(np.degrees(0.5))


def test_a_number_that_is_old_or_not_finite_is_not_shown() -> None:
    row = Row(3, stale=1.0)

    def fill(values: np.ndarray) -> None:
        values[:] = [1.0, np.inf, np.nan]

    row.take(fill, 10.0)
    assert row.present(10.5) == [1.0, None, None]
    assert row.present(11.5) == [None, None, None]


def test_the_feed_keeps_what_is_newest_and_no_more() -> None:
    feed = Feed(1, 15.0)
    assert feed.picture(0) is None
    for number in range(1000):
        feed.put_sample(number / 15, [float(number)], [None])
        feed.put_picture(0, b"%d" % number)
    assert len(feed.samples(0)) == SPAN * 15
    assert [sample.number for sample in feed.samples(998)] == [999, 1000]
    assert feed.samples(1000) == []
    assert reading(feed.samples(999)[0]) == [66.6, [999.0], [None]]
    picture = feed.picture(0)
    assert picture is not None
    assert (picture.number, picture.jpeg) == (1000, b"999")


def image(width: int, height: int) -> Any:
    pixels = np.full((height, width, 3), (200, 40, 40), np.uint8)
    return SimpleNamespace(
        height=height, width=width, step=3 * width, encoding="rgb8", is_bigendian=0, data=pixels.tobytes()
    )


@pytest.mark.parametrize(("size", "expected"), [((640, 480), (480, 640)), ((1280, 720), (360, 640))])
def test_pictures_are_small_and_keep_their_colours(size: tuple[int, int], expected: tuple[int, int]) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
    from vla_infer.page.pictures import picture

    stream = picture(image(*size), "sensor_msgs/msg/Image", width=640)
    pixels = cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_COLOR)
    assert pixels.shape == (*expected, 3)
    assert np.abs(pixels.mean(axis=(0, 1)) - (40, 40, 200)).max() < 4  # blue, green, red


def test_a_small_jpeg_goes_on_as_it_came_and_what_is_none_is_refused() -> None:
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
    from vla_infer.page import pictures

    noise = np.random.default_rng(1).integers(0, 255, (480, 640, 3), np.uint8)
    kind = "sensor_msgs/msg/CompressedImage"
    for quality, same in ((5, True), (100, False)):
        data = cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        made = pictures.picture(SimpleNamespace(format="jpeg", data=data), kind, width=640)
        assert (made == data) is same
    with pytest.raises(ObservationError, match="cut short"):
        pictures.picture(SimpleNamespace(format="jpeg", data=data[:-10]), kind, width=640)


DOCUMENT = {
    "level": "HOLD",
    "tone": "warn",
    "reason": "top\x1b[2J is stale",
    "dry_run": False,
    "instruction": "wave\n\x07",
    "latency": {"inference": {"p50": 6.3, "p99": 9.0}, "age": None, "lateness": {"p99": 0.25}},
    "inference_rate": 30.0,
    "simulation": {
        "kind": "touch", "colour": "red\x1b[2J", "instruction": "touch it", "success": True,
        "successes": 3.0, "episodes": 4.0, "seconds": 2.5,
    },
}  # fmt: skip


def test_the_terminals_block_fits_and_holds_no_control_characters() -> None:
    feed = Feed(0, 15.0)
    for angle in (0.0, 5.0, 10.0):
        feed.put_sample(angle, [angle, None], [10.0 - angle, None])
    view = View(["pan", "lift"], "so101")
    lines = view.block(DOCUMENT, feed.samples(0), width=70)
    text = "\n".join(lines)
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert "ARMED" in lines[0]
    assert "inference 6.3 ms  ticks late p99 0.2 ms  30.0 inferences/s" in text
    assert r"task touch red\x1b[2J  2.5 s  3 of 4 succeeded  SUCCESS" in text
    assert lines[-2] == "pan       10.00       0.00  [+" + " " * 28 + "o]"
    assert lines[-1].split() == ["lift", "-"]
    assert "\x1b[2J" not in view.line(DOCUMENT)
    for width in (10, 40):
        assert all(len(line) <= width for line in view.block(DOCUMENT, feed.samples(0), width=width)[1:])
    assert "HOLD" in view.line(DOCUMENT)
    assert view.line({}) == "OFFLINE"
    assert view.block({}, [], width=70)


def test_a_terminal_is_drawn_over_and_left_as_it_was() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, feed = Terminal(), Feed(0, 15.0)
    feed.put_document(DOCUMENT)

    async def scenario() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.4, stop.set)
        await show(feed, [], "so101", stop, out)

    asyncio.run(scenario())
    drawn = out.getvalue()
    assert drawn.startswith("\x1b[?25l")
    assert drawn.endswith("\x1b[?25h")
    assert drawn.count("\x1b[5F") >= 1  # five lines up, to draw over them


def test_a_demonstration_without_end_and_its_successes() -> None:
    assert progress(7, 0) == "   7 s"
    assert "commands" in live_line(7, 0, ticks([], 50.0), {})
    assert successes({}) == successes({"successes": "?", "episodes": "1"}) == []
    assert "3 of 4 episodes (75%)" in successes({"successes": "3", "episodes": "4"})[0]
    assert "0 of 0 episodes" in successes({"successes": "0", "episodes": "0"})[0]
