"""launch/bringup.launch.py with the launch packages of ROS 2, and the Fast DDS profile that it sets."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch" / "bringup.launch.py"
ARGUMENTS = {
    "policy", "contract", "device", "precision", "control_rate", "namespace",
    "use_sim_time", "autostart", "log_level", "dry_run", "preflight", "respawn",
    "realtime_priority",
}  # fmt: skip


def test_the_profile_s_segment_holds_several_images() -> None:
    name = "{http://www.eprosima.com/XMLSchemas/fastRTPS_Profiles}"
    root = ElementTree.parse(ROOT / "config" / "fastdds.xml").getroot()
    participant = root.find(f".//{name}participant")
    assert participant is not None
    assert participant.get("is_default_profile") == "true"
    used = {item.text for item in participant.iter(f"{name}transport_id")}
    for transport in root.iter(f"{name}transport_descriptor"):
        assert transport.findtext(f"{name}transport_id") in used
        if transport.findtext(f"{name}type") == "SHM":
            assert int(transport.findtext(f"{name}segment_size") or 0) >= 16 * 640 * 480 * 3


def load() -> Any:
    pytest.importorskip("launch_ros", reason="needs the launch packages of ROS 2 (launch_ros)")
    spec = importlib.util.spec_from_file_location("bringup", LAUNCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arguments_and_their_defaults() -> None:
    module = load()
    from vla_infer.node_parameters import PARAMETERS

    declared = {item.name: item for item in module.generate_launch_description().get_launch_arguments()}
    assert set(declared) >= ARGUMENTS
    assert all(item.description for item in declared.values())
    assert {name for name, item in declared.items() if not item.default_value} == {"policy", "contract"}
    assert declared["dry_run"].default_value[0].text == "true"
    assert Path(module.PROFILE).is_file()
    known = {row.name: type(row.default) for row in PARAMETERS} | {"use_sim_time": bool}
    assert all(known[name] is kind for name, _, kind, _ in module.NODE_PARAMETERS)


def test_it_starts_the_node_and_ends_it(tmp_path: Path) -> None:
    load()
    ros2 = shutil.which("ros2")
    if ros2 is None or importlib.util.find_spec("ros2launch") is None:
        pytest.skip("needs the command line tools of ROS 2 (ros2 launch)")
    from ament_index_python import PackageNotFoundError, get_package_prefix

    try:
        get_package_prefix("vla_infer")
    except PackageNotFoundError:
        pytest.skip("needs vla_infer to be installed and sourced (colcon build)")
    from robot import Robot, patient_contract, until

    dry = "/arm/forward_position_controller/commands_dry"
    robot = Robot({dry: "std_msgs/msg/Float64MultiArray"}, namespace="arm")
    process = subprocess.Popen(
        [
            *[ros2, "launch", "vla_infer", "bringup.launch.py", "namespace:=arm"],
            f"contract:={patient_contract(tmp_path)}",
            f"policy:={ROOT / 'test' / 'golden' / 'smolvla'}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ),
        start_new_session=True,
    )
    try:
        robot.feed()
        until(lambda: len(robot.commands[dry]) > 10, timeout=60, what="commands")
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: the node gets it twice
        output, _ = process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        robot.close()
    assert process.returncode == 0, output
    assert "dry run, commands go to <topic>_dry" in output
    assert "process has finished cleanly" in output
