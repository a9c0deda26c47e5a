"""The node's safety: emergency stop, run switch, instructions by parameter, failing and hanging inference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import yaml

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from rcl_interfaces.srv import SetParameters  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy  # noqa: E402
from robot import ROOT, patient_contract, until  # noqa: E402
from std_msgs.msg import Bool  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402
from test_node import DRY, Harness  # noqa: E402

from vla_infer.node import EXIT_STATUS  # noqa: E402

# A hold of velocities is zero, which no motion of the stand-in is.
VELOCITY = {"topic": DRY.removesuffix("_dry"), "interface": "velocity", "joints": list("abcdef")}


@pytest.fixture
def make(tmp_path: Any) -> Iterator[Any]:
    made: list[Harness] = []

    def factory(behaviour: str = "plain", **changes: Any) -> Harness:
        made.append(Harness(behaviour, contract=patient_contract(tmp_path, **changes)))
        return made[-1]

    yield factory
    for harness in made:
        harness.policy.released.set()
        harness.close()


def call(harness: Harness, kind: Any, name: str, request: Any) -> Any:
    client = harness.robot.node.create_client(kind, name)
    until(client.service_is_ready, what=name)
    future = client.call_async(request)
    until(future.done, what=name)
    return future.result()


def instruct_by_parameter(harness: Harness, text: str) -> Any:
    request = SetParameters.Request(parameters=[Parameter("instruction", value=text).to_parameter_msg()])
    return call(harness, SetParameters, "/vla_node/set_parameters", request).results[0]


def press(harness: Harness, *, reliability: ReliabilityPolicy) -> None:
    publisher = harness.robot.node.create_publisher(
        Bool, "/emergency_stop", QoSProfile(depth=1, reliability=reliability)
    )
    until(lambda: publisher.get_subscription_count() >= 1, what="emergency stop subscription")
    publisher.publish(Bool(data=False))

    def heard() -> bool:  # the node's side may not know the publisher yet
        publisher.publish(Bool(data=True))
        return harness.node._emergency.latched

    until(heard, what="emergency stop")


@pytest.mark.parametrize("way", ["reliable", "best effort", "service"])
def test_an_emergency_stop_latches_until_it_is_reset(make: Any, way: str) -> None:
    harness = make(command=VELOCITY)
    harness.run()
    until(lambda: np.abs(harness.values(DRY)[-1]).max() > 4, what="motion")
    if way == "service":
        assert call(harness, Trigger, "/vla_node/emergency_stop", Trigger.Request()).success
    else:
        press(
            harness,
            reliability=ReliabilityPolicy.RELIABLE if way == "reliable" else ReliabilityPolicy.BEST_EFFORT,
        )
    until(lambda: harness.robot.value("state", "lifecycle") == "inactive", what="inactive")
    sent = harness.values(DRY)
    moving = max(i for i, values in enumerate(sent) if values.any())
    assert np.abs(sent[moving]).max() > 4  # at once, no ramp
    assert len(sent) > moving + 1
    assert "emergency stop by" in harness.robot.message("state")
    assert harness.do(harness.node.trigger_activate) == "FAILURE"
    assert harness.do(harness.node.trigger_cleanup) == "SUCCESS"
    assert harness.do(harness.node.trigger_configure) == "SUCCESS"
    assert harness.do(harness.node.trigger_activate) == "FAILURE"
    count = len(harness.values(DRY))
    time.sleep(0.2)
    assert len(harness.values(DRY)) == count
    assert call(harness, Trigger, "/vla_node/reset_emergency_stop", Trigger.Request()).success
    assert not call(harness, Trigger, "/vla_node/reset_emergency_stop", Trigger.Request()).success
    time.sleep(0.2)
    assert len(harness.values(DRY)) == count  # a reset alone moves nothing
    assert harness.do(harness.node.trigger_activate) == "SUCCESS"
    until(lambda: len(harness.values(DRY)) > count + 5, what="motion after activation")


def test_run_stops_and_goes_on(make: Any) -> None:
    harness = make(command=VELOCITY)
    assert not call(harness, SetBool, "/vla_node/run", SetBool.Request(data=True)).success  # not active
    harness.run()
    until(lambda: np.abs(harness.values(DRY)[-1]).max() > 4, what="motion")
    assert call(harness, SetBool, "/vla_node/run", SetBool.Request(data=False)).success
    until(lambda: not harness.values(DRY)[-1].any(), what="zero")
    until(lambda: "stopped by ~/run" in harness.robot.message("state"), what="reason")
    harness.robot.instruct("wave")  # stop wins over a new instruction
    until(lambda: harness.robot.value("state", "instruction") == "wave", what="instruction")
    calls = len(harness.policy.calls)
    time.sleep(0.2)
    assert len(harness.policy.calls) == calls
    assert not harness.values(DRY)[-1].any()
    answer = call(harness, SetBool, "/vla_node/run", SetBool.Request(data=True))
    assert answer.success
    assert answer.message == "running: 'wave'"
    until(lambda: np.abs(harness.values(DRY)[-1]).max() > 4, what="motion again")
    assert harness.policy.calls[-1][2] == "wave"


def test_the_last_valid_instruction_wins_whichever_way_it_came(make: Any) -> None:
    harness = make(instruction={"allow": ["fold", "wave", "stack"], "default": "fold"})
    harness.run()
    assert harness.policy.calls[0][2] == "fold"
    assert instruct_by_parameter(harness, "stack").successful
    until(lambda: harness.policy.calls[-1][2] == "stack", what="by parameter")
    harness.robot.instruct("wave")
    until(lambda: harness.policy.calls[-1][2] == "wave", what="by topic")
    for bad in ("dance", "", "fo\x07ld"):
        answer = instruct_by_parameter(harness, bad)
        assert not answer.successful
        assert "instruction" in answer.reason
    harness.robot.instruct("dance")
    until(lambda: int(harness.robot.value("observations", "rejected instruction") or 0) == 1, what="refusal")
    assert harness.policy.calls[-1][2] == "wave"


def test_three_failures_deactivate_and_activation_tries_again(make: Any) -> None:
    harness = make()
    harness.run()
    until(lambda: len(harness.values(DRY)) > 20, what="commands")
    harness.policy.behaviour = "raises"
    until(lambda: harness.robot.value("state", "lifecycle") == "inactive", what="inactive")
    assert "DEACTIVATE: 3 inferences failed in a row" in harness.robot.message("state")
    assert harness.node._reporter.counts["inferences_failed"] == 3
    held = harness.values(DRY)[-10:]
    assert all((values == held[0]).all() for values in held)
    harness.policy.behaviour = "plain"
    count = len(harness.values(DRY))
    assert harness.do(harness.node.trigger_activate) == "SUCCESS"
    until(lambda: len(harness.values(DRY)) > count + 5, what="commands again")


def test_one_failure_holds_and_the_next_try_goes_on(make: Any) -> None:
    harness = make(command=VELOCITY)
    harness.run()
    until(lambda: np.abs(harness.values(DRY)[-1]).max() > 4, what="motion")
    harness.policy.behaviour = "raises"
    until(lambda: harness.node._reporter.counts["inferences_failed"] == 1, what="failure")
    harness.policy.behaviour = "plain"
    until(lambda: not harness.values(DRY)[-1].any(), what="hold")
    until(lambda: np.abs(harness.values(DRY)[-1]).max() > 4, what="motion again")
    until(lambda: harness.robot.value("state", "lifecycle") == "active", what="active")


def test_a_lost_device_ends_the_process(make: Any) -> None:
    harness = make(command=VELOCITY)
    harness.run()
    until(lambda: np.abs(harness.values(DRY)[-1]).max() > 4, what="motion")
    harness.policy.behaviour = "lost"
    until(harness.node.stop_requested.is_set, what="stop")
    assert harness.node.exit_status == EXIT_STATUS
    until(lambda: not harness.values(DRY)[-1].any(), what="zero")


def test_a_hanging_inference_holds_and_ends_the_process(make: Any) -> None:
    harness = make(failsafe={"inference_timeout": 1.0})
    harness.run()
    until(lambda: len(harness.values(DRY)) > 20, what="commands")
    harness.policy.behaviour = "hangs"
    until(harness.node.stop_requested.is_set, what="stop")
    assert harness.node.exit_status == EXIT_STATUS
    assert any("an inference has not returned for 1.0 s" in line for line in harness.lines)


def test_real_time_chunking_asks_the_policy_to_continue(make: Any) -> None:
    harness = make(scheduler={"mode": "rtc"})
    asked: list[Any] = []
    plain = harness.policy.predict

    def predict(images: Any, state: Any, task: str, *, rtc: Any = None) -> np.ndarray:
        asked.append(rtc)
        actions: np.ndarray = plain(images, state, task)
        if rtc is not None:
            actions[: len(rtc.previous)] = rtc.previous
        return actions

    harness.policy.predict = predict
    harness.run()
    until(lambda: len(asked) > 10, what="inferences")
    assert asked[0] is None
    assert asked[-1].previous.shape[1] == 6
    assert 0 <= asked[-1].inference_delay < len(asked[-1].previous) <= 30


def preflight(harness: Harness) -> tuple[bool, str]:
    answer = call(harness, Trigger, "/vla_node/preflight", Trigger.Request())
    return answer.success, answer.message


def test_preflight_says_what_is_there_and_what_is_not(make: Any) -> None:
    harness = make()
    assert preflight(harness) == (False, "the node is not configured; configure it first")
    assert harness.do(harness.node.trigger_configure) == "SUCCESS"
    harness.robot.feeding = {"top", "joints"}
    until(lambda: preflight(harness)[1].count("PASS") >= 4, what="findings")
    success, text = preflight(harness)
    assert not success
    lines = dict(line.split("  ", 1) for line in text.splitlines() if "FAIL" in line)
    assert len(lines) == 1
    assert "/wrist/image_raw: a publisher, but no message in 2 s" in lines["FAIL"]
    assert "limits      given for all 6 numbers" in text
    harness.robot.feed()
    until(lambda: preflight(harness)[0], what="no FAIL")
    assert "WARN" not in preflight(harness)[1]


def test_preflight_sees_qos_that_does_not_fit(make: Any) -> None:
    document = yaml.safe_load((ROOT / "config" / "so101.yaml").read_text())
    cameras = document["cameras"]
    cameras["observation.images.top"]["qos"] = "reliable"  # the robot's cameras are best effort
    harness = make(cameras=cameras)
    assert harness.do(harness.node.trigger_configure) == "SUCCESS"
    harness.robot.feed()
    until(lambda: "QoS of robot does not fit" in preflight(harness)[1], what="finding")
    assert not preflight(harness)[0]
    assert "QoS" not in "".join(line for line in preflight(harness)[1].splitlines() if "wrist" in line)


def test_preflight_guards_activation_where_asked_to(make: Any, tmp_path: Any) -> None:
    harness = make()
    asked = [Parameter("preflight", value=True)]
    assert harness.do(lambda: harness.node.set_parameters(asked))[0].successful
    assert harness.do(harness.node.trigger_configure) == "SUCCESS"
    assert harness.do(harness.node.trigger_activate) == "FAILURE"
    assert "not activated: preflight: FAIL" in harness.lines[-1]
    harness.robot.feed()
    until(lambda: preflight(harness)[0], what="no FAIL")
    assert harness.do(harness.node.trigger_activate) == "SUCCESS"
