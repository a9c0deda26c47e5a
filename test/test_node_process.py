"""vla_node as a program: signals, the golden policy over real DDS, a checkpoint that is cut short."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from robot import IMAGE, Robot, patient_contract, until  # noqa: E402

from vla_infer.codecs import COMMAND_CODECS  # noqa: E402
from vla_infer.contract import load_contract  # noqa: E402

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden" / "smolvla"
ARRAY = "std_msgs/msg/Float64MultiArray"
DRY = "/forward_position_controller/commands_dry"
STANDIN = [str(HERE / "standin_node.py")]
NODE = ["-m", "vla_infer.vla_node"]


class Program:
    """The node in a process of its own; its output is read at the end."""

    def __init__(self, start: list[str], **parameters: Any) -> None:
        command = [sys.executable, *start, "--ros-args"]
        for name, value in parameters.items():
            command += ["-p", f"{name}:={value}"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    def wait_for(self, text: str) -> None:
        """Read the output up to a line that has `text` in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"the program ended without '{text}'")

    def stop(self, number: int = signal.SIGINT) -> tuple[float, str]:
        """Send a signal; the seconds until the end and the whole output."""
        began = time.monotonic()
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=60)
        return time.monotonic() - began, output


@pytest.fixture
def robot() -> Iterator[Robot]:
    robot = Robot({DRY: ARRAY})
    yield robot
    robot.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    programs: list[Program] = []

    def factory(*arguments: Any, **parameters: Any) -> Program:
        if "contract" not in parameters:
            parameters["contract"] = patient_contract(tmp_path)
        programs.append(Program(*arguments, **parameters))
        return programs[-1]

    yield factory
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
            program.process.communicate()


def values(robot: Robot) -> list[np.ndarray]:
    return [COMMAND_CODECS[ARRAY].decode(message).values[0] for _, message in list(robot.commands[DRY])]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_a_hold(robot: Robot, start: Any, tmp_path: Path, number: int) -> None:
    # Velocities, for which a hold is zero and cannot be taken for one more command.
    command = {"topic": DRY.removesuffix("_dry"), "interface": "velocity", "joints": list("abcdef")}
    contract = patient_contract(tmp_path, command=command)
    program = start(STANDIN, policy="plain", contract=contract)
    robot.feed()
    until(lambda: len(values(robot)) > 10, what="commands")
    _, output = program.stop(number)  # how long it may take is for `make faults`
    assert program.process.returncode == 0, output
    until(lambda: not values(robot)[-1].any(), what="a hold as the last message")
    assert np.abs(values(robot)[-2]).max() > 1
    assert "Traceback" not in output


def test_signals_that_keep_coming(robot: Robot, start: Any) -> None:
    """A terminal's Ctrl-C reaches the node at once and again by way of ros2 launch."""
    program = start(STANDIN, policy="plain")
    until(lambda: robot.value("state", "lifecycle") == "active", what="active")
    while program.process.poll() is None:
        program.process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    output, _ = program.process.communicate()
    assert program.process.returncode == 0, output
    assert "Traceback" not in output


def test_a_signal_in_the_middle_of_an_inference(robot: Robot, start: Any) -> None:
    """One that does not return: that the process ends at all shows that it does not wait."""
    program = start(STANDIN, policy="hangs")
    robot.feed()
    until(lambda: robot.message("state").startswith("the first chunk is computed"), what="first inference")
    _, output = program.stop()
    assert program.process.returncode == 0, output
    assert "Traceback" not in output


def test_a_signal_while_loading(start: Any) -> None:
    program = start(STANDIN, policy="slow_load")
    program.wait_for("loading slow_load")
    _, output = program.stop()
    assert program.process.returncode == 0, output
    assert "told to stop while loading" in output


def test_the_golden_policy_drives_the_robot_as_it_would_be_called(
    robot: Robot, start: Any, tmp_path: Path
) -> None:
    """One observation alone: what is published are rows of what `predict` gives for it, in radians."""
    from vla_infer.policy import load_policy

    # No limits, ramp or interpolation: random weights make no smooth motion, and rows are to be recognised.
    document = yaml.safe_load((HERE.parent / "config" / "so101.yaml").read_text())
    path = patient_contract(
        tmp_path,
        command={key: value for key, value in document["command"].items() if key != "limits"},
        scheduler={"interpolation": "none"},
        failsafe={"good_frames": 1, "resume_ramp": 0.0, "inference_timeout": 60.0},
        max_observation_age=10.0,
        sync_slop=0.9,
        policy_rate=1.0,
    )
    contract = load_contract(path)
    program = start(NODE, policy=GOLDEN, contract=path)
    until(lambda: robot.value("state", "lifecycle") == "active", what="active")
    until(robot.connected, what="subscriptions")
    topics = ("joint_states", "top/image_raw", "wrist/image_raw")
    heard = False
    while not heard:  # all of it anew where one was lost because the subscriber's side was not connected yet
        robot.send_joints()
        robot.send_image("top")
        robot.send_image("wrist")
        for _ in range(2):  # the first may be under way already
            robot.diagnostics.clear()
            until(lambda: robot.value("observations", "readiness"), what="diagnostics")
        heard = all(robot.value("observations", f"received {topic}") != "0" for topic in topics)
    until(lambda: len(values(robot)) > 170, what="more commands")
    published = np.array(values(robot))
    _, output = program.stop()
    assert program.process.returncode == 0, output
    policy = load_policy(str(GOLDEN))
    images = {camera.feature: IMAGE for camera in contract.cameras}
    state = contract.states[0].units.to_policy(np.full(6, 0.1)).astype(np.float32)
    chunk = policy.predict(images, state, contract.instruction.default)
    policy.close()
    rows = contract.commands[0].units.to_ros(chunk.astype(np.float64))
    # Each lies on the line from one row to the next, at most as far along it as time has passed.
    steps = np.diff(rows, axis=0)
    along = np.einsum("pra,ra->pr", published[:, None] - rows[None, :-1], steps) / (steps**2).sum(axis=1)
    along = along.clip(0.0, 1.0)
    distance = np.abs(published[:, None] - rows[None, :-1] - along[..., None] * steps).max(axis=2)
    assert distance.min(axis=1).max() < 1e-5
    played = distance.argmin(axis=1) + along[np.arange(len(published)), distance.argmin(axis=1)]
    assert (np.diff(played) > -1e-3).all()
    assert played[-1] - played[0] > 2  # several rows, each as it falls due


@pytest.mark.parametrize("fault", ["cut weights", "no directory", "no config"])
def test_a_checkpoint_that_cannot_be_loaded_leaves_the_node_waiting(
    robot: Robot, start: Any, tmp_path: Path, fault: str
) -> None:
    policy = tmp_path / "policy"
    if fault != "no directory":
        shutil.copytree(GOLDEN, policy)
    if fault == "cut weights":
        weights = policy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif fault == "no config":
        (policy / "config.json").unlink()
    program = start(NODE, policy=policy)
    until(lambda: "configuration failed" in robot.message("state"), what="reason in diagnostics")
    robot.feed()
    time.sleep(0.2)
    _, output = program.stop()
    assert program.process.returncode == 0, output
    lines = [line for line in output.splitlines() if "[ERROR]" in line]
    assert len(lines) == 1, output
    assert str(policy) in lines[0]
    assert "Traceback" not in output
    assert not values(robot)


def test_a_parameter_that_rclpy_itself_refuses(start: Any) -> None:
    program = start(STANDIN, policy="plain", use_sim_time="maybe")
    output, _ = program.process.communicate(timeout=60)
    assert program.process.returncode == 1
    assert "vla_node: cannot start" in output
