"""The demonstration as a user starts it: every program, over real DDS, and a page that is there meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
pytest.importorskip("aiohttp", reason="needs aiohttp")
pytest.importorskip("rosbags", reason="needs rosbags")

from robot import patient_contract

from vla_infer.demo.bag import write_bag

GOLDEN = Path(__file__).resolve().parent / "golden" / "smolvla"


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **contract: Any) -> subprocess.Popen[str]:
        path = patient_contract(tmp_path, control_rate=5.0, max_observation_age=5.0, **contract)
        command = [sys.executable, "-m", "vla_infer.demo", "--contract", path, "--threads", "1", *arguments]
        command += ["--policy", str(GOLDEN), "--log", str(tmp_path / "demo.log")]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("demo") / "bag"
    write_bag(path, seconds=1.0, width=64, height=48)
    return str(path)


def finish(process: subprocess.Popen[str], parts: tuple[str, ...]) -> str:
    guard = threading.Timer(90.0, process.kill)
    guard.start()
    output, _ = process.communicate()
    guard.cancel()
    assert process.returncode == 0, output
    for part in parts:
        assert part in output, output
    return output


def test_a_bag_is_played_and_the_page_is_there(demo: Any, bag: str) -> None:
    process = demo("--bag", bag, "--duration", "2")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("page: http://127.0.0.1:"), line + process.stdout.read()
    with urllib.request.urlopen(line.removeprefix("page: ").strip(), timeout=10) as answer:
        assert b"<title>vla_infer</title>" in answer.read()
    finish(process, ("top/image_raw", "played", "node ended", "page ended", "player ended"))


def test_a_simulation_is_driven_and_shown_in_the_terminal(demo: Any) -> None:
    pytest.importorskip("mujoco", reason="needs MuJoCo")
    shown = ("inference", "task", "succeeded", "node ended", "view ended", "simulation ended")
    output = finish(demo("--no-page", "--duration", "2"), shown)
    # The view draws over what is printed beside it, so the table waits for its end.
    assert output.rindex("ticks late p99") < output.index("control ticks")


def test_a_page_that_cannot_start_is_said(demo: Any, bag: str) -> None:
    process = demo("--bag", bag, "--port", "70000")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the page ended with status 2" in output
    assert "parameter 'port'" in output  # of its log


def test_what_it_started_ends_with_it(demo: Any, bag: str) -> None:
    process = demo("--bag", bag, "--duration", "0")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("page: "), line
    while "commands" not in (said := process.stdout.readline()):
        assert said, "it ended before the first command"
    process.terminate()
    output, _ = process.communicate(timeout=60)
    for name in ("node", "page", "player"):
        assert f"{name} ended" in output, output
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(line.removeprefix("page: ").strip(), timeout=10)
