"""Contracts: what is shipped parses and fits, and every mistake is one line that names file and key."""

from __future__ import annotations

import copy
import math
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vla_infer.contract import Contract, load_contract, parse_contract
from vla_infer.errors import ContractError

CONFIG = Path(__file__).resolve().parent.parent / "config"
SHIPPED = sorted(path.stem for path in CONFIG.glob("*.yaml"))
SO101: dict[str, Any] = yaml.safe_load((CONFIG / "so101.yaml").read_text())


@dataclass(frozen=True)
class Shape:
    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    horizon: int


def changed(path: str, value: object) -> dict[str, Any]:
    """so101 with the entry at `path` (keys joined by |) replaced, or removed when value is KeyError."""
    document = copy.deepcopy(SO101)
    *parents, last = path.split("|")
    target: Any = document
    for key in parents:
        target = target[key]
    if value is KeyError:
        del target[last]
    else:
        target[last] = value
    return document


def message_of(document: object) -> str:
    with pytest.raises(ContractError) as caught:
        parse_contract(document, file="robot.yaml")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("robot.yaml: ")
    return text


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_contracts_fit_a_policy_of_their_size(name: str) -> None:
    contract = load_contract(name)
    cameras = tuple(camera.feature for camera in contract.cameras)
    contract.check_policy(Shape(cameras, contract.state_dim, contract.action_dim, 50))
    for command in contract.commands:
        assert any(limit.velocity for limit in command.limits), "a shipped contract gives limits"


def test_so101_reads_as_written() -> None:
    contract = load_contract("so101")
    assert [camera.feature for camera in contract.cameras] == [
        "observation.images.top",
        "observation.images.wrist",
    ]
    assert contract.cameras[0].type == "sensor_msgs/msg/Image"
    assert not contract.cameras[0].reliable
    assert (contract.state_dim, contract.action_dim) == (6, 6)
    assert (contract.control_rate, contract.policy_rate) == (50.0, 30.0)
    command = contract.commands[0]
    assert command.type == "std_msgs/msg/Float64MultiArray"
    assert command.interface == "position"
    assert command.limits[0].position == (-1.91986, 1.91986)
    assert command.limits[5].step == 0.2
    with pytest.raises(FrozenInstanceError):
        contract.robot = "other"  # type: ignore[misc]


def test_mobile_contract_ends_in_a_stamped_twist() -> None:
    base = load_contract("lekiwi").commands[1]
    assert base.type == "geometry_msgs/msg/TwistStamped"
    assert base.interface == "velocity"
    assert base.joints == ("linear.x", "linear.y", "angular.z")
    assert base.frame_id == "base_link"


def test_units_convert_both_ways() -> None:
    units = load_contract("so101").states[0].units
    ros = np.array([math.pi, 0.0, -math.pi / 2, 0.1, 0.2, 1.7453])
    policy = units.to_policy(ros)
    np.testing.assert_allclose(policy[[0, 2, 5]], [180.0, -90.0, 100.0], rtol=1e-12)
    np.testing.assert_allclose(units.to_ros(policy), ros, rtol=1e-12, atol=1e-12)


WRONG = [
    ("contorl_rate", 50, "contorl_rate: unknown key; did you mean 'control_rate'?"),
    (
        "cameras|observation.images.top|topics",
        "x",
        "observation.images.top.topics: unknown key; did you mean 'topic'?",
    ),
    ("state|joint", ["a"], "state.joint: unknown key; did you mean 'joints'?"),
    ("command|limits|shoulder_pan|velocty", 1, "velocty: unknown key; did you mean 'velocity'?"),
    ("command|limits|sholder_pan", {}, "not one of the joints; did you mean 'shoulder_pan'?"),
    ("state|joint_units", {"griper": "deg"}, "not one of the joints; did you mean 'gripper'?"),
    ("policy_rate", KeyError, "policy_rate: is missing"),
    ("command", KeyError, "command: is missing"),
    ("state|joints", KeyError, "state.joints: is missing"),
    ("robot", 3, "robot: expected a string, got 3"),
    ("control_rate", "fast", "control_rate: expected a number in [1, 1000], got 'fast'"),
    ("control_rate", True, "got True"),
    ("control_rate", 0, "control_rate: expected a number in [1, 1000], got 0"),
    ("control_rate", math.nan, "got nan"),
    ("max_observation_age", math.inf, "got inf"),
    ("chunk_steps", 2.5, "chunk_steps: expected an integer"),
    ("cameras", {}, "expected at least one camera"),
    ("cameras", ["top"], "cameras: expected a mapping"),
    ("cameras|observation.images.top|topic", "/a b", "expected a ROS topic name"),
    ("cameras|observation.images.top|topic", "/a//b", "expected a ROS topic name"),
    (
        "cameras|observation.images.top|topic",
        "wrist/image_raw",
        "is already that of cameras.observation.images.top",
    ),
    ("command|topic", "/joint_states", "topic '/joint_states' is already that of state.topic"),
    ("instruction|topic", "forward_position_controller/commands_dry", "is already that of instruction.topic"),
    ("cameras|observation.images.top|type", "Imag", "did you mean 'Image'?"),
    ("cameras|observation.images.top|qos", "sensor", "qos: expected one of best_effort, reliable"),
    ("cameras|observation.images.top|depth", 0, "depth: expected an integer in [1, 100], got 0"),
    ("state|fields", ["positions"], "did you mean 'position'?"),
    ("state|joints", ["a", "a"], "joints[1]: 'a' is listed twice"),
    ("state|joints", ["a", 3], "joints[1]: expected a name, got 3"),
    ("state|joints", [], "expected a list of names"),
    ("state|units", "degree", "unknown unit 'degree'; did you mean 'deg'?"),
    ("state|units", {"scale": 0}, "expected a scale"),
    ("state|units", {"ros": [1, 1], "policy": [0, 1]}, "expected low < high"),
    ("state|units", {"ros": [0, 1], "policy": [1, 1]}, "expected two different numbers"),
    ("state|units", {"offset": 1}, "units.scale: is missing"),
    ("command|type", "JointTrajectories", "did you mean 'JointTrajectory'?"),
    ("command|interface", "speed", "interface: expected one of"),
    ("command|interface", "velocity", "has an offset"),
    ("command|points", "chunk", "points: unknown key"),
    ("command|limits|gripper|position", [1, 0], "expected low < high"),
    ("command|limits|gripper|velocity", -1, "velocity: expected a number"),
    ("allow_missing_cameras", "top", "allow_missing_cameras: expected a list"),
]


@pytest.mark.parametrize(("path", "value", "expected"), WRONG, ids=[f"{p}={v!r}" for p, v, _ in WRONG])
def test_each_mistake_is_one_line_with_file_and_key(path: str, value: object, expected: str) -> None:
    text = message_of(changed(path, value))
    assert expected in text
    assert path.split("|")[0].split(".")[0] in text or "topic" in text


def test_any_node_replaced_by_anything_is_valid_or_a_contract_error() -> None:
    """Every entry of so101, at any depth, replaced by each of these: only ContractError may come out."""
    strange: list[object] = [
        None,
        [],
        {},
        "",
        "x",
        -1,
        1e400,
        True,
        [[]],
        {"a": {}},
        [None],
        {3: 4},
        KeyError,
    ]

    def paths(value: object, prefix: str) -> list[str]:
        if not isinstance(value, dict):
            return [prefix]
        below = [
            path for key, item in value.items() for path in paths(item, f"{prefix}|{key}" if prefix else key)
        ]
        return below + ([prefix] if prefix else [])

    lines: list[str] = []
    for path in paths(SO101, ""):
        for value in strange:
            try:
                assert isinstance(parse_contract(changed(path, value), file="f"), Contract)
            except ContractError as error:
                lines.append(str(error))
    assert len(lines) > 300
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "line 1"),
        ("robot: x\nrobot: y\n", "key 'robot' is given twice"),
        ("robot: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("[1]: 2", "not a plain name"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: &x [*x]", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_contract(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ContractError, match=r"bad\.yaml") as caught:
        load_contract(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"robot: \xff\xfe")
    (tmp_path / "big.yaml").write_bytes(b"#" * (2 << 20))
    for name in ("latin.yaml", "big.yaml", "absent.yaml"):
        with pytest.raises(ContractError, match=name):
            load_contract(tmp_path / name)
    with pytest.raises(ContractError, match="did you mean 'so101'"):
        load_contract("so100")


def test_a_policy_that_does_not_fit() -> None:
    contract = load_contract("so101")
    cameras = tuple(camera.feature for camera in contract.cameras)
    for shape, expected in (
        (Shape(cameras, 7, 6, 10), "the policy has 7 numbers in its state, the contract 6"),
        (Shape(cameras, 6, 14, 10), "the policy has 14 numbers in its action, the contract 6"),
        (Shape(cameras[:1], 6, 6, 10), "cameras.observation.images.wrist: the policy has no such camera"),
        (Shape((*cameras, "observation.images.side"), 6, 6, 10), "needs 'observation.images.side'"),
    ):
        with pytest.raises(ContractError, match=expected):
            contract.check_policy(shape)
    missing = parse_contract(changed("allow_missing_cameras", ["observation.images.side"]), file="f")
    missing.check_policy(Shape((*cameras, "observation.images.side"), 6, 6, 10))
    with pytest.raises(ContractError, match="allow_missing_cameras"):
        missing.check_policy(Shape(cameras, 6, 6, 10))
    long = parse_contract(changed("chunk_steps", 11), file="f")
    with pytest.raises(ContractError, match="at most the policy's horizon 10"):
        long.check_policy(Shape(cameras, 6, 6, 10))
