"""The simulation's node as a process over DDS, and the episodes it keeps."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sim_support import need_simulation, play, world  # noqa: F401 (a fixture)

from vla_infer.contract import load_contract
from vla_infer.sim.episodes import ASKED, ENDED, PAUSE, RUNNING, WAITING, Episodes, Rules
from vla_infer.sim.model import CAMERAS, JOINTS

ROOT = Path(__file__).resolve().parent.parent


def run_on(episodes: Episodes, seconds: float) -> None:
    for _ in range(round(seconds / 0.02)):
        episodes.world.advance(0.02)
        episodes.step()


def test_episodes_follow_one_another_and_are_counted(world: Any) -> None:  # noqa: F811
    episodes = Episodes(world, Rules(seed=7, kinds=("touch",), time_limit=1.0))
    run_on(episodes, 0.5)
    assert (episodes.phase, episodes.obeys, episodes.announce()) == (WAITING, False, None)
    far = world.limits[:, 1]
    episodes.command(far)
    first = episodes.task
    assert first is not None
    assert (episodes.phase, episodes.obeys, episodes.announce()) == (PAUSE, False, first.instruction)
    assert episodes.announce() is None
    start = world.commanded
    episodes.command(far)
    run_on(episodes, 0.7)
    assert np.array_equal(world.commanded, start)  # what comes while the scene is new is not obeyed
    run_on(episodes, 0.2)
    assert (episodes.phase, episodes.obeys) == (RUNNING, True)
    episodes.command(start + 0.01)
    assert np.array_equal(world.commanded, start + 0.01)
    play(world, first)
    episodes.step()
    assert (episodes.phase, episodes.outcome) == (ENDED, "success")
    assert episodes.describe()[1]["success"] == "true"
    run_on(episodes, 0.8)
    assert (episodes.phase, episodes.number) == (PAUSE, 2)
    assert world.time < 0.2
    run_on(episodes, 0.9)
    run_on(episodes, 1.1)  # nothing is done
    assert (episodes.phase, episodes.outcome) == (ENDED, "time is over")
    values = episodes.describe()[1]
    assert (values["episodes"], values["successes"], values["seed"]) == ("2", "1", "8")


def test_a_person_s_sentence_is_what_is_judged(world: Any) -> None:  # noqa: F811
    episodes = Episodes(world, Rules(seed=1, auto=False))
    episodes.command(world.commanded)
    run_on(episodes, 0.9)
    assert (episodes.phase, episodes.obeys, episodes.task, episodes.announce()) == (ASKED, True, None, None)
    colours = list(world.scene.cubes)
    episodes.instruct("make coffee")
    run_on(episodes, 0.1)
    assert (episodes.phase, episodes.task) == (RUNNING, None)
    for colour, count in zip((colours[0], colours[1], colours[1]), (1, 2, 3), strict=True):
        episodes.instruct(f"touch the {colour} cube")
        assert episodes.task is not None
        assert (episodes.phase, episodes.task.colour) == (RUNNING, colour)
        play(world, episodes.task)
        episodes.step()
        assert (episodes.phase, episodes.outcome, episodes.successes) == (ENDED, "success", count)
    absent = next(colour for colour in ("red", "green", "blue", "purple") if colour not in colours)
    episodes.instruct(f"touch the {absent} cube")
    assert episodes.task is None


@contextmanager
def node(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "vla_infer.sim.node", "--ros-args", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Driver:
    """Hears what the simulation says, in the test's own context, and commands it."""

    def __init__(self) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticStatus
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import QoSProfile, ReliabilityPolicy
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import Image, JointState
        from std_msgs.msg import Float64MultiArray, String
        from std_srvs.srv import Trigger
        from trajectory_msgs.msg import JointTrajectory

        self.context = rclpy.Context()
        rclpy.init(context=self.context, args=[])
        self.node = rclpy.create_node("driver", context=self.context)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self.heard: dict[str, list[Any]] = {}
        best_effort = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
        contract = load_contract("so101")
        for camera in contract.cameras:
            self._hear(Image, camera.topic, best_effort)
        self._hear(JointState, contract.states[0].topic, best_effort)
        self._hear(Clock, "/clock", best_effort)
        self._hear(String, contract.instruction.topic, 10)
        self._hear(DiagnosticStatus, "simulation/status", 10)
        self.instruction = self.node.create_publisher(String, contract.instruction.topic, 10)
        self.commands = self.node.create_publisher(Float64MultiArray, contract.commands[0].topic, 1)
        self.trajectories = self.node.create_publisher(
            JointTrajectory, "joint_trajectory_controller/joint_trajectory", 1
        )
        self.reset = self.node.create_client(Trigger, "simulation/reset")

    def _hear(self, kind: Any, topic: str, qos: Any) -> None:
        heard = self.heard.setdefault(topic, [])
        self.node.create_subscription(kind, topic, heard.append, qos)

    def command(self, positions: Any) -> None:
        from std_msgs.msg import Float64MultiArray

        self.commands.publish(Float64MultiArray(data=np.asarray(positions).tolist()))

    @property
    def status(self) -> dict[str, str]:
        messages = self.heard["simulation/status"]
        return {pair.key: pair.value for pair in messages[-1].values} if messages else {}

    @property
    def joints(self) -> dict[str, float]:
        message = self.heard["joint_states"][-1]
        return dict(zip(message.name, message.position, strict=True))

    def until(self, condition: Any, what: str, *, timeout: float = 40.0) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {timeout} s; {self.status}"
            self._executor.spin_once(timeout_sec=0.02)

    def close(self) -> None:
        import rclpy

        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture
def driver(ros_domain: None) -> Iterator[Driver]:
    need_simulation()
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    made = Driver()
    yield made
    made.close()


def test_it_is_a_robot_to_whoever_speaks_the_contract(driver: Driver) -> None:
    with node("-p", "seed:=3", "-p", "image_width:=64", "-p", "image_height:=48") as process:
        top, wrist = (driver.heard[f"{name}/image_raw"] for name in CAMERAS.values())
        driver.until(
            lambda: top and wrist and driver.heard["joint_states"] and driver.status, "first messages"
        )
        assert driver.status["phase"] == "waiting"
        assert (top[0].height, top[0].width, top[0].encoding) == (48, 64, "rgb8")
        assert set(driver.joints) == set(JOINTS)
        stamps = [message.clock.sec + message.clock.nanosec * 1e-9 for message in driver.heard["/clock"]]
        assert stamps == sorted(stamps)
        assert abs(top[-1].header.stamp.sec - stamps[-1]) < 2
        # The first command begins the first episode.
        start = driver.joints
        home = [start[name] for name in JOINTS]
        driver.until(lambda: (driver.command(home), driver.status["phase"] == "pause")[1], "a new scene")
        driver.until(lambda: driver.heard["instruction"], "its instruction")
        assert driver.heard["instruction"][0].data == driver.status["instruction"]
        driver.until(lambda: (driver.command(home), driver.status["phase"] == "running")[1], "the episode")
        assert driver.joints["shoulder_pan"] == pytest.approx(start["shoulder_pan"], abs=0.02)
        # Positions, then what is no position, then a trajectory of one joint.
        aim = [home[0] + 0.2, *home[1:]]
        driver.command(aim)
        driver.until(lambda: abs(driver.joints["shoulder_pan"] - aim[0]) < 0.03, "the commanded position")
        driver.command([float("nan")] * 6)
        driver.command([0.0] * 5)
        from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

        driver.trajectories.publish(
            JointTrajectory(
                joint_names=["shoulder_pan"], points=[JointTrajectoryPoint(positions=[home[0] - 0.2])]
            )
        )
        driver.until(
            lambda: abs(driver.joints["shoulder_pan"] - home[0] + 0.2) < 0.03, "the trajectory's end"
        )
        # A person asks for something else; then the next scene is asked for.
        from std_msgs.msg import String
        from std_srvs.srv import Trigger

        colour = driver.status["cubes"].split()[-1]
        driver.instruction.publish(String(data=f"lift the {colour} cube"))
        driver.until(
            lambda: (driver.status["kind"], driver.status["colour"]) == ("pick", colour), "retargeting"
        )
        future = driver.reset.call_async(Trigger.Request())
        driver.until(future.done, "the reset")
        driver.until(lambda: driver.status["episode"] == "2", "the second episode")
        assert driver.status["episodes"] == "0"
        # Whoever comes late hears the last episode all the same.
        from diagnostic_msgs.msg import DiagnosticStatus
        from rclpy.qos import DurabilityPolicy, QoSProfile

        kept = QoSProfile(depth=50, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        late: list[Any] = []
        driver.node.create_subscription(DiagnosticStatus, "simulation/status", late.append, kept)
        driver.until(lambda: late, "the late listener's first message")
        assert {pair.key: pair.value for pair in late[0].values}["episode"] == "1"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("sead:=3", "parameter 'sead': there is none of that name; did you mean 'seed'?"),
        ("camera_rate:=0.0", "parameter 'camera_rate': expected a value like 30.0 from 1 to 100, got 0.0"),
        ("seed:=often", "parameter 'seed': expected a value like 0 from 0 to"),
        ("episodes:=both", "parameter 'episodes': expected auto or manual, got 'both'"),
        ("kinds:=[dance]", "parameter 'kinds': expected of touch"),
        ("contract:=aloha", "aloha.yaml: cameras.observation.images"),
    ],
)
def test_what_is_wrong_is_one_line(argument: str, line: str) -> None:
    need_simulation()
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    from vla_infer.sim.node import main

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, **_: said.append(text))
        patch.setattr("vla_infer.sim.node.stop_on_signals", lambda: None)
        patch.setattr("vla_infer.sim.node.ignore_signals", lambda: None)
        assert main(["--ros-args", "-p", argument]) == 2
    assert len(said) == 1
    assert "\n" not in said[0]
    assert said[0].startswith(f"simulation: {line}")


def test_the_launch_file_s_arguments_are_parameters_of_the_node() -> None:
    pytest.importorskip("launch_ros", reason="needs the launch packages of ROS 2 (launch_ros)")
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    from vla_infer.sim.node import PARAMETERS

    spec = importlib.util.spec_from_file_location("simulation", ROOT / "launch" / "simulation.launch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    declared = {
        item.name: item.default_value for item in module.generate_launch_description().get_launch_arguments()
    }
    defaults = {name: default for name, default, *_ in PARAMETERS}
    for name, default, kind, _ in module.NODE_PARAMETERS:
        assert kind(default) == defaults[name]
        assert declared[name][0].text == default
    assert module.PROFILE.is_file()


def test_a_contract_for_another_arm_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    from vla_infer.errors import ContractError
    from vla_infer.sim.node import _check_contract

    document = yaml.safe_load((ROOT / "config" / "so101.yaml").read_text())
    document["state"]["joints"] = ["elbow"]
    document["state"].pop("joint_units")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(ContractError, match=r"state\.joints: the simulated arm has shoulder_pan"):
        _check_contract(load_contract(tmp_path / "other.yaml"))
