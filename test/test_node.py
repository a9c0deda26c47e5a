"""vla_node in this process, against a robot over real DDS: commands, faults, lifecycle, parameters."""

from __future__ import annotations

import array
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from rclpy.parameter import Parameter  # noqa: E402
from robot import Robot, patient_contract, until  # noqa: E402
from standin import StandIn  # noqa: E402

from vla_infer.codecs import COMMAND_CODECS  # noqa: E402
from vla_infer.errors import CheckpointError  # noqa: E402
from vla_infer.node import VlaNode  # noqa: E402
from vla_infer.node_support import make_executor  # noqa: E402

ARRAY = "std_msgs/msg/Float64MultiArray"
COMMANDS = "/forward_position_controller/commands"
DRY = COMMANDS + "_dry"


class Harness:
    """A node with a stand-in policy, spun by the executor that the program itself uses."""

    def __init__(
        self, behaviour: str = "plain", *, commands: dict[str, str] | None = None, **parameters: Any
    ) -> None:
        self.commands = commands or {COMMANDS: ARRAY, DRY: ARRAY}
        self.policy = StandIn(behaviour)
        self.robot = Robot(self.commands)
        values = {"policy": "standin", "autostart": False, **parameters}
        self.context = rclpy.Context()
        rclpy.init(context=self.context, args=[])
        self.node = VlaNode(
            policy_loader=self.load,
            context=self.context,
            parameter_overrides=[Parameter(name, value=value) for name, value in values.items()],
        )
        self.lines: list[str] = []
        self.node._reporter._logger = self
        self.node.get_logger = lambda: self
        self.loads: list[tuple[str, dict[str, Any]]] = []
        self._jobs: list[tuple[Any, list[Any]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def load(self, path: str, **options: Any) -> StandIn:
        self.loads.append((path, options))
        if path == "broken":
            raise CheckpointError("broken/config.json: is no JSON; copy it again")
        return self.policy

    def info(self, text: str) -> None:
        """The node's logger is this object; lines show with a failed test as they would in its log."""
        self.lines.append(text)
        print(text)

    warning = error = info

    def _spin(self) -> None:
        executor = make_executor(self.context)
        executor.add_node(self.node)
        while not self._stop.is_set():
            executor.spin_once(timeout_sec=0.02)
            while self._jobs:
                function, result = self._jobs.pop(0)
                result.append(function())
        self.node.close()
        executor.shutdown()

    def do(self, function: Any) -> Any:
        """Call something of the node in the executor's thread, as a service would."""
        result: list[Any] = []
        self._jobs.append((function, result))
        until(lambda: result, what="job")
        return result[0].name if hasattr(result[0], "name") else result[0]

    def start(self) -> None:
        assert self.do(self.node.start), self.lines

    def run(self) -> None:
        """Started, fed, and commanding."""
        self.start()
        self.robot.feed()
        until(lambda: self.values(DRY), what="first command")

    def values(self, topic: str) -> list[np.ndarray]:
        codec = COMMAND_CODECS[self.commands[topic]]
        return [codec.decode(message).values[0] for _, message in list(self.robot.commands[topic])]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        rclpy.shutdown(context=self.context)
        self.robot.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    made: list[Harness] = []

    def factory(*arguments: Any, **keywords: Any) -> Harness:
        if "contract" not in keywords:
            keywords["contract"] = patient_contract(tmp_path)
        made.append(Harness(*arguments, **keywords))
        return made[-1]

    yield factory
    for harness in made:
        harness.close()


def degrees(values: np.ndarray) -> np.ndarray:
    return np.degrees(values[:5])


def test_observations_become_commands_on_the_dry_topic_alone(make: Any) -> None:
    harness = make()
    assert harness.do(harness.node.trigger_configure) == "SUCCESS"
    assert harness.do(harness.node.trigger_activate) == "SUCCESS"
    harness.robot.feeding = {"top", "wrist"}
    until(lambda: "joint_states" in harness.robot.message("observations"), what="reason in diagnostics")
    assert not harness.values(DRY)  # one topic is missing: nothing may be sent
    harness.robot.feed()
    until(lambda: len(harness.values(DRY)) > 20, what="commands")
    images, state, task = harness.policy.calls[0]
    assert {name: image.shape for name, image in images.items()} == {
        "observation.images.top": (48, 64, 3),
        "observation.images.wrist": (48, 64, 3),
    }
    assert task == "pick up the red cube and place it in the box"
    np.testing.assert_allclose(state[:5], np.degrees(0.1), rtol=1e-5)
    # The stand-in's row i is the state plus i degrees: never row 0 of the past, always close to it.
    rows = degrees(np.array(harness.values(DRY)).T[:5].T[0]) - np.degrees(0.1)
    assert (rows > -1e-3).all()
    assert (rows < 15).all()
    assert not harness.robot.commands[COMMANDS]
    assert any("dry run" in line for line in harness.lines)
    until(lambda: int(harness.robot.value("control", "commands_played") or 0) > 20, what="diagnostics")
    for status, key in (
        ("inference", "predict p99 ms"),
        ("inference", "observation to chunk p95 ms"),
        ("control", "observation age at publication p50 ms"),
        ("control", "tick lateness max ms"),
        ("observations", "image age at callback p50 ms"),
    ):
        assert float(harness.robot.value(status, key)) >= 0
    assert harness.robot.value("state", "lifecycle") == "active"
    assert harness.robot.value("state", "instruction").startswith("pick up")
    assert harness.robot.value("policy", "family") == "standin"
    assert int(harness.robot.value("observations", "received top/image_raw")) > 5
    assert harness.robot.value("observations", "rejected top/image_raw") == "0"


def test_armed_it_publishes_on_the_contracts_topic(make: Any) -> None:
    harness = make(dry_run=False)
    harness.start()
    harness.robot.feed()
    until(lambda: harness.values(COMMANDS), what="command")
    assert not harness.robot.commands[DRY]


def test_an_instruction_replaces_the_default(make: Any) -> None:
    harness = make(instruction="fold the towel")
    harness.run()
    assert harness.policy.calls[0][2] == "fold the towel"
    harness.robot.instruct("  close the drawer ")
    until(lambda: harness.policy.calls[-1][2] == "close the drawer", what="instruction")
    for bad in ("", "   ", "x" * 2000, "a\x07b"):
        harness.robot.instruct(bad)
    until(lambda: int(harness.robot.value("observations", "rejected instruction") or 0) == 4, what="refusals")
    assert harness.policy.calls[-1][2] == "close the drawer"
    why = harness.robot.value("observations", "why instruction was rejected")
    assert why == r"instruction: character '\x07' at 1 is not text; remove it"
    assert not harness.robot.value("observations", "why top/image_raw was rejected")


STALE = re.compile(r"holding: (wrist/image_raw|the newest set .*, that of wrist/image_raw,) is [\d.]+ s old")


def test_a_camera_that_stops_means_hold_and_its_return_motion(make: Any) -> None:
    harness = make()
    harness.run()
    harness.robot.feeding.discard("wrist")
    # Its image, or the other camera's that was taken with it: whichever of the two was older by a moment.
    until(lambda: any(STALE.match(line) for line in harness.lines), what="hold")
    began = len(harness.values(DRY))
    calls = len(harness.policy.calls)
    until(lambda: len(harness.values(DRY)) > began + 25, what="held commands")
    held = np.array(harness.values(DRY)[began:])
    assert (held == held[0]).all()
    assert len(harness.policy.calls) <= calls + 1  # no inference on a stale observation
    until(lambda: "wrist/image_raw" in harness.robot.message("state"), what="reason in diagnostics")
    assert int(harness.robot.value("observations", "ticks_stale")) > 0
    harness.robot.position = dict.fromkeys(harness.robot.position, 0.5)
    harness.robot.feed()
    until(lambda: degrees(harness.values(DRY)[-1])[0] > 28, what="motion again")


GARBAGE = {
    "unknown encoding": {"encoding": "16UC1"},
    "short data": {"data": array.array("B", b"123")},
    "wrong step": {"step": 7},
    "no size": {"height": 0},
}


def test_garbage_images_are_refused_on_one_line(make: Any) -> None:
    harness = make()
    harness.run()
    for change in GARBAGE.values():
        for _ in range(5):
            harness.robot.send_image("top", change=change)
            time.sleep(0.02)
    until(
        lambda: int(harness.robot.value("observations", "rejected top/image_raw") or 0) >= 16, what="refusals"
    )
    mine = [line for line in harness.lines if line.startswith("top/image_raw: ")]
    assert len(mine) == 1  # said once, counted each time
    assert "\n" not in mine[0]
    assert mine[0].endswith("message ignored")
    sent = len(harness.values(DRY))
    until(lambda: len(harness.values(DRY)) > sent + 5, what="commands go on")
    assert harness.node._reporter.counts["internal_errors"] == 0


@pytest.mark.parametrize("fault", ["nan", "missing"])
def test_bad_joint_states_are_refused(make: Any, fault: str) -> None:
    harness = make()
    harness.run()
    bad = dict(harness.robot.position)
    if fault == "nan":
        bad["elbow_flex"] = float("nan")
    else:
        del bad["elbow_flex"]
    harness.robot.feeding.discard("joints")
    calls = len(harness.policy.calls)
    for _ in range(30):
        harness.robot.send_joints(bad)
        time.sleep(0.01)
    until(lambda: any("elbow_flex" in line for line in harness.lines), what="line")
    until(lambda: any("holding" in line for line in harness.lines), what="hold")
    assert all(np.isfinite(call[1]).all() for call in harness.policy.calls[calls:])


def test_a_nan_in_a_chunk_moves_nothing(make: Any) -> None:
    harness = make("nan")
    harness.start()
    harness.robot.feed()
    until(lambda: int(harness.robot.value("inference", "chunks_not_finite") or 0) > 3, what="refusals")
    assert not harness.values(DRY)
    assert any("chunk refused" in line and "not finite" in line for line in harness.lines)


@pytest.mark.parametrize("behaviour", ["raises", "narrow"])
def test_a_policy_that_fails_moves_nothing_and_is_said(make: Any, behaviour: str) -> None:
    harness = make(behaviour)
    harness.start()
    harness.robot.feed()
    until(lambda: int(harness.robot.value("inference", "inferences_failed") or 0) > 1, what="failures")
    assert not harness.values(DRY)
    line = next(line for line in harness.lines if "inference failed" in line)
    assert "\n" not in line
    assert ("the engine is on fire" if behaviour == "raises" else "expected actions of shape (H, 6)") in line


def test_lifecycle_there_and_back(make: Any) -> None:
    harness = make()
    harness.run()
    until(lambda: len(harness.values(DRY)) > 5, what="commands")
    assert harness.do(harness.node.trigger_deactivate) == "SUCCESS"
    until(
        lambda: (harness.values(DRY)[-1] == harness.values(DRY)[-2]).all(), what="a hold as the last message"
    )
    sent = harness.values(DRY)
    calls = len(harness.policy.calls)
    time.sleep(0.2)
    assert len(harness.values(DRY)) == len(sent)
    assert len(harness.policy.calls) <= calls + 1
    harness.robot.feeding.clear()
    time.sleep(0.1)
    assert harness.do(harness.node.trigger_activate) == "SUCCESS"
    time.sleep(0.2)
    assert len(harness.values(DRY)) == len(sent)  # nothing old is replayed
    harness.robot.feed()
    until(lambda: len(harness.values(DRY)) > len(sent), what="commands again")
    assert harness.do(harness.node.trigger_deactivate) == "SUCCESS"
    assert harness.do(harness.node.trigger_cleanup) == "SUCCESS"
    assert harness.policy.closed
    until(lambda: harness.robot.value("state", "lifecycle") == "unconfigured", what="state")
    harness.policy = StandIn("plain")
    sent = harness.values(DRY)
    harness.start()
    until(lambda: len(harness.values(DRY)) > len(sent), what="commands after a second configuration")
    assert harness.do(harness.node.trigger_shutdown) == "SUCCESS"
    assert harness.node.stop_requested.is_set()


def test_cleanup_does_not_wait_for_an_inference(make: Any) -> None:
    harness = make("hangs")
    harness.start()
    harness.robot.feed()
    until(lambda: harness.policy.calls, what="inference")
    assert harness.do(harness.node.trigger_deactivate) == "SUCCESS"
    assert harness.do(harness.node.trigger_cleanup) == "SUCCESS"
    assert not harness.policy.closed  # not under a running inference
    harness.policy.released.set()
    until(lambda: harness.policy.closed, what="close after the inference")
    assert not harness.values(DRY)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"polcy": "x"}, "parameter 'polcy': there is none of that name; did you mean 'policy'?"),
        ({"controlrate": 50.0}, "did you mean 'control_rate'?"),
        (
            {"control_rate": 5000.0},
            "parameter 'control_rate': expected a number such as 50.0 in [0, 1000], got 5000.0",
        ),
        ({"control_rate": 0.5}, "expected 0 or 1 to 1000 Hz, got 0.5"),
        ({"dry_run": "no"}, "parameter 'dry_run': expected true or false, got 'no'"),
        ({"threads": -1}, "parameter 'threads': expected an integer in [0, 1024], got -1"),
        ({"contract": ""}, "parameter 'contract' is empty"),
        ({"contract": "so102"}, "did you mean 'so101'?"),
        (
            {"contract": "aloha"},
            "aloha.yaml: cameras.observation.images.cam_high: the policy has no such camera",
        ),
        ({"calibrate_first": 4}, "calibrate_first: expected precision 'fp8', got 'fp32'"),
        ({"policy": "broken"}, "broken/config.json: is no JSON; copy it again"),
        ({"instruction": "x" * 5000}, "instruction: 5000 characters"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_fails_configuration_on_one_line(
    make: Any, parameters: dict[str, Any], expected: str
) -> None:
    harness = make(**parameters)
    assert harness.do(harness.node.trigger_configure) == "FAILURE"
    line = harness.lines[-1]
    assert expected in line
    assert "\n" not in line


def test_a_wrong_parameter_is_mended_without_a_restart(make: Any) -> None:
    harness = make(contract="so102", threads=-1)
    assert harness.do(harness.node.trigger_configure) == "FAILURE"
    until(lambda: "'threads'" in harness.robot.message("state"), what="reason in diagnostics")
    assert harness.robot.diagnostics["vla_node: state"].level == b"\x02"
    fixed = [Parameter("contract", value="so101"), Parameter("threads", value=2)]
    assert all(result.successful for result in harness.do(lambda: harness.node.set_parameters(fixed)))
    harness.start()
    assert harness.loads[-1] == (
        "standin",
        {"device": "cpu", "precision": "fp32", "num_steps": None, "threads": 2},
    )
    late = harness.do(lambda: harness.node.set_parameters([Parameter("dry_run", value=False)]))[0]
    assert not late.successful
    assert "'dry_run' is read at configuration" in late.reason


def test_fp8_without_scales_starts_in_bfloat16(make: Any, tmp_path: Path) -> None:
    """And goes over to fp8 when the first observations of the robot have made scales; commands go on."""
    pytest.importorskip("torch", reason="needs torch for the reference executor")
    golden = Path(__file__).parent / "golden" / "smolvla"
    policy = str(shutil.copytree(golden, tmp_path / "policy"))
    harness = make(policy=policy, device="reference", precision="fp8", calibrate_first=2)
    harness.start()
    assert [options["precision"] for _, options in harness.loads] == ["bf16"]
    assert f"fp8: no fp8.json beside {policy}: bfloat16 until 2 observations" in "\n".join(harness.lines)
    harness.robot.feed()
    until(lambda: any(line.startswith("fp8 from here on") for line in harness.lines), what="fp8")
    assert [options["precision"] for _, options in harness.loads] == ["bf16", "fp8"]
    assert harness.loads[0][1] | {"precision": "fp8"} == harness.loads[1][1]
    assert (Path(policy) / "fp8.json").exists()
    until(lambda: harness.policy.closed, what="the end of the policy in bfloat16")
    count = len(harness.values(DRY))
    until(lambda: len(harness.values(DRY)) > count + 50, what="commands")


def test_every_parameter_describes_itself(make: Any) -> None:
    node = make().node
    for name in ("policy", "contract", "device", "precision", "num_steps", "threads", "control_rate"):
        descriptor = node.describe_parameter(name)
        assert descriptor.description
        assert descriptor.type
    assert node.describe_parameter("control_rate").floating_point_range[0].to_value == 1000.0
    assert node.describe_parameter("threads").integer_range[0].to_value == 1024


TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
SIX = ["a", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize("points", ["one", "chunk"])
def test_trajectories(make: Any, tmp_path: Path, points: str) -> None:
    command = {"topic": "arm", "type": "JointTrajectory", "joints": SIX, "units": "deg", "points": points}
    harness = make(contract=patient_contract(tmp_path, command=command), commands={"/arm_dry": TRAJECTORY})
    harness.start()
    harness.robot.feed()
    until(lambda: len(harness.robot.commands["/arm_dry"]) > 3, what="trajectories")
    for _, message in list(harness.robot.commands["/arm_dry"]):
        setpoint = COMMAND_CODECS[TRAJECTORY].decode(message)
        assert list(setpoint.names) == SIX
        assert (np.diff(setpoint.times, prepend=0.0) > 0).all()
        if points == "one":
            assert len(setpoint.times) == 1
            assert setpoint.times[0] == pytest.approx(0.02)
        else:
            # Never further than a killed node may move the arm.
            assert setpoint.times[-1] <= 0.19 + 1e-6
            np.testing.assert_allclose(np.diff(setpoint.times), 0.02, atol=1e-6)
    if points == "chunk":
        assert max(len(message.points) for _, message in harness.robot.commands["/arm_dry"]) == 9
        played = int(harness.robot.value("control", "commands_played") or 0)
        until(
            lambda: int(harness.robot.value("control", "commands_played") or 0) > played + 100,
            what="commands",
        )
        played = int(harness.robot.value("control", "commands_played"))
        inferences = len(harness.policy.calls)
        # At each chunk and each time that half is over, not at every tick.
        assert len(harness.robot.commands["/arm_dry"]) <= inferences + played / 4 + 5


def test_two_outputs_and_a_velocity_that_ends_in_zero(make: Any, tmp_path: Path) -> None:
    command = [
        {"topic": "arm", "type": "JointState", "joints": SIX[:4], "units": "deg"},
        {"topic": "base", "type": "TwistStamped", "axes": ["linear.x", "angular.z"], "frame_id": "base_link"},
    ]
    topics = {"/arm_dry": "sensor_msgs/msg/JointState", "/base_dry": "geometry_msgs/msg/TwistStamped"}
    harness = make(contract=patient_contract(tmp_path, command=command), commands=topics)
    harness.start()
    harness.robot.feed()
    until(
        lambda: len(harness.values("/base_dry")) > 10 and len(harness.values("/arm_dry")) > 10,
        what="commands",
    )
    # The stand-in's numbers go straight through once the ramp is over.
    until(lambda: harness.values("/base_dry")[-1][0] > 5, what="velocity")
    assert harness.robot.commands["/base_dry"][-1][1].header.frame_id == "base_link"
    assert harness.do(harness.node.trigger_deactivate) == "SUCCESS"
    until(lambda: not harness.values("/base_dry")[-1].any(), what="zero velocity as the last message")
    until(lambda: (harness.values("/arm_dry")[-1] == harness.values("/arm_dry")[-2]).all(), what="a hold")
    arm = harness.values("/arm_dry")
    assert arm[-1][0] > 0


def test_topics_follow_the_namespace(make: Any) -> None:
    harness = make(commands={f"/left{DRY}": ARRAY, DRY: ARRAY})
    other = VlaNode(
        policy_loader=harness.load,
        context=harness.context,
        namespace="left",
        parameter_overrides=[Parameter("policy", value="p"), Parameter("contract", value="so101")],
    )
    try:
        assert other.trigger_configure().name == "SUCCESS"
        names = {name for name, _ in other.get_topic_names_and_types()}
        assert {f"/left{DRY}", "/left/top/image_raw", "/left/joint_states", "/left/instruction"} <= names
    finally:
        other.close()


def test_simulated_time_and_its_restart(make: Any) -> None:
    harness = make(use_sim_time=True)
    harness.start()
    harness.robot.simulate(100.0)
    harness.robot.feed()
    until(lambda: len(harness.values(DRY)) > 5, what="commands in simulated time")
    harness.robot.simulate(5.0)  # a bag that starts again
    until(lambda: any("the clock was set by" in line for line in harness.lines), what="jump")
    sent, calls = len(harness.values(DRY)), len(harness.policy.calls)
    until(lambda: len(harness.policy.calls) > calls + 3, what="inference after the restart")
    until(lambda: len(harness.values(DRY)) > sent + 5, what="commands after the restart")
    assert harness.node._reporter.counts["internal_errors"] == 0


def test_what_was_made_is_unmade_when_configuration_fails_late(make: Any) -> None:
    harness = make(instruction="x" * 5000)
    assert harness.do(harness.node.trigger_configure) == "FAILURE"
    assert harness.policy.closed
    assert not any(thread.name == "vla_inference" for thread in threading.enumerate() if thread.is_alive())
    late = make()
    late.node.create_lifecycle_publisher = lambda *_: 1 / 0
    assert late.do(late.node.trigger_configure) == "FAILURE"
    assert "ZeroDivisionError" in late.lines[-1]
    until(lambda: late.policy.closed, what="policy closed")


def test_an_exception_in_a_transition_is_said_and_holds(make: Any) -> None:
    harness = make()
    assert harness.do(harness.node.trigger_configure) == "SUCCESS"
    harness.node._running.control.start = lambda: 1 / 0
    assert harness.do(harness.node.trigger_activate) == "ERROR"
    assert any("on_activate failed: ZeroDivisionError" in line for line in harness.lines)
    until(lambda: harness.policy.closed, what="release")
    harness.policy = StandIn("plain")
    harness.start()  # back in unconfigured, and able to start again
