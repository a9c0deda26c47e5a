"""How late control ticks are while the engine keeps every processor busy. For a quiet machine: `make faults`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from robot import Robot, patient_contract, until
from test_node_process import DRY, STANDIN, Program

FRAME = 1 / 30  # s, the policy's period
MOST = 2.0  # ms, p99 of the last 1024 ticks, which are 20 s of them


@pytest.fixture
def robot(request: pytest.FixtureRequest) -> Iterator[Robot]:
    if int(request.config.getoption("--fault-trials")) < 10:
        pytest.skip("needs a quiet machine and --fault-trials 10 or more (make faults)")
    robot = Robot({DRY: "std_msgs/msg/Float64MultiArray"})
    yield robot
    robot.close()


@pytest.mark.parametrize("seconds", [2 * FRAME, 10 * FRAME, 1e6], ids=["2x", "10x", "hanging"])
def test_ticks_are_on_time_while_inference_is_slow(robot: Robot, tmp_path: Path, seconds: float) -> None:
    """p99 of the lateness of control ticks is 2 ms at most, with inference at 2 and 10 times its period, or hanging."""
    failsafe = {"inference_timeout": 60.0}
    contract = patient_contract(tmp_path, policy_rate=30.0, failsafe=failsafe)
    program = Program(STANDIN, policy=f"busy {seconds}", contract=contract)
    try:
        robot.feed()
        until(lambda: int(robot.value("control", "ticks") or 0) > 1150, timeout=60, what="ticks")
        p50, p99, worst = (
            float(robot.value("control", f"tick lateness {key} ms")) for key in ("p50", "p99", "max")
        )
        load = os.getloadavg()[0]
        print(
            f"inference of {seconds:g} s: ticks late by {p50} ms, p99 {p99} ms, at most {worst} ms; load {load:.1f}"
        )
        assert robot.value("control", "ticks_missed") == "0"
        assert p99 <= MOST
    finally:
        program.process.kill()
        program.process.communicate()
