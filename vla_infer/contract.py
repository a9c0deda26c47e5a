"""The contract of a robot: which topic feeds which policy feature, units, order, limits and rates.

One YAML file per robot (`config/*.yaml`, described in `docs/contract.md`) becomes a tree of frozen
dataclasses. Everything is checked here, once, so that no other module has to doubt it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from . import contract_units as units
from .contract_parse import Section, find_contract, nearest, read_yaml
from .contract_units import Limits, Units
from .errors import ContractError
from .safety_options import (
    FailsafeOptions,
    GuardOptions,
    SchedulerOptions,
    parse_failsafe,
    parse_guard,
    parse_scheduler,
)
from .urdf import read_urdf_limits, tighten

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
TWIST_TYPES = ("geometry_msgs/msg/TwistStamped", "geometry_msgs/msg/Twist")
COMMAND_TYPES = (
    "std_msgs/msg/Float64MultiArray",
    "trajectory_msgs/msg/JointTrajectory",
    "sensor_msgs/msg/JointState",
    *TWIST_TYPES,
)
STATE_FIELDS = ("position", "velocity", "effort")
TWIST_AXES = ("linear.x", "linear.y", "linear.z", "angular.x", "angular.y", "angular.z")
DRY_SUFFIX = "_dry"


class PolicyShape(Protocol):
    """What a contract has to fit: the part of PolicyInfo that concerns the robot."""

    @property
    def cameras(self) -> tuple[str, ...]: ...
    @property
    def state_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def horizon(self) -> int: ...


@dataclass(frozen=True)
class Camera:
    """One camera: `feature` is the policy's name for it, such as observation.images.top."""

    feature: str
    topic: str
    type: str
    reliable: bool
    depth: int  # messages the subscription keeps
    receipt_stamp: bool  # True: the driver does not stamp, take the time of receipt instead


@dataclass(frozen=True)
class StateSource:
    """One JointState topic. Its part of the state is fields × joints: all positions, then velocities..."""

    topic: str
    joints: tuple[str, ...]
    fields: tuple[str, ...]
    units: Units
    reliable: bool
    receipt_stamp: bool

    @property
    def size(self) -> int:
        return len(self.joints) * len(self.fields)


@dataclass(frozen=True)
class CommandSink:
    """One command topic. It takes the next len(joints) numbers of each action."""

    topic: str
    type: str
    joints: tuple[str, ...]  # axes such as linear.x for a Twist
    interface: str  # position, velocity or effort: what the numbers are to the robot
    units: Units
    limits: tuple[Limits, ...]  # one per joint, in ROS units
    whole_chunk: bool  # JointTrajectory: every remaining action with its time, not the next one alone
    frame_id: str

    @property
    def size(self) -> int:
        return len(self.joints)


@dataclass(frozen=True)
class Instruction:
    topic: str
    default: str  # empty: no inference before a message on the topic
    allowed: tuple[str, ...]  # the only instructions that are taken; empty: any


@dataclass(frozen=True)
class Contract:
    """A validated contract. Rates in Hz, times in seconds."""

    path: str
    robot: str
    cameras: tuple[Camera, ...]
    states: tuple[StateSource, ...]
    instruction: Instruction
    commands: tuple[CommandSink, ...]
    control_rate: float
    policy_rate: float  # spacing of the actions in a chunk
    chunk_steps: int  # actions of each chunk that may be played; 0 for all
    max_observation_age: float
    sync_slop: float  # largest spread of stamps within one observation
    allow_missing_cameras: tuple[str, ...]
    urdf: str  # path, relative to the contract's file, of a URDF whose joint limits hold too; empty for none
    scheduler: SchedulerOptions
    guard: GuardOptions
    failsafe: FailsafeOptions

    @property
    def state_dim(self) -> int:
        return sum(state.size for state in self.states)

    @property
    def action_dim(self) -> int:
        return sum(command.size for command in self.commands)

    def check_policy(self, policy: PolicyShape) -> None:
        """Raise ContractError, on one line, where this contract does not fit `policy`."""
        known = {camera.feature for camera in self.cameras}
        for feature in sorted(known - set(policy.cameras)):
            raise ContractError(
                f"{self.path}: cameras.{feature}: the policy has no such camera; "
                f"{nearest(feature, policy.cameras)}"
            )
        for feature in policy.cameras:
            if feature not in known and feature not in self.allow_missing_cameras:
                raise ContractError(
                    f"{self.path}: cameras: the policy needs '{feature}', which no camera feeds; "
                    "add it, or name it in allow_missing_cameras"
                )
        for feature in self.allow_missing_cameras:
            if feature not in policy.cameras:
                raise ContractError(
                    f"{self.path}: allow_missing_cameras: the policy has no '{feature}'; "
                    f"{nearest(feature, policy.cameras)}"
                )
        for key, ours, theirs in (
            ("state", self.state_dim, policy.state_dim),
            ("command", self.action_dim, policy.action_dim),
        ):
            if ours != theirs:
                raise ContractError(
                    f"{self.path}: {key}.joints: the policy has {theirs} numbers in its "
                    f"{'state' if key == 'state' else 'action'}, the contract {ours}; list one joint for each"
                )
        if self.chunk_steps > policy.horizon:
            raise ContractError(
                f"{self.path}: chunk_steps: expected at most the policy's horizon {policy.horizon}, "
                f"got {self.chunk_steps}; lower it, or leave it out"
            )


def load_contract(name: str | Path) -> Contract:
    """Read and validate a contract, given as a path or as a shipped name. Raises ContractError."""
    path = find_contract(str(name))
    contract = parse_contract(read_yaml(path), file=path.name)
    return _with_urdf(contract, path.parent / contract.urdf) if contract.urdf else contract


def _with_urdf(contract: Contract, path: Path) -> Contract:
    """`contract` with the narrower of its own limits and the URDF's, joint by joint."""
    known = read_urdf_limits(path)
    commands = []
    for command in contract.commands:
        limits = []
        for joint, ours in zip(command.joints, command.limits, strict=True):
            theirs = known.get(joint, Limits())
            if command.interface != "position":
                theirs = replace(theirs, position=None)
            try:
                limits.append(tighten(ours, theirs))
            except ValueError as error:
                raise ContractError(
                    f"{contract.path}: command.limits.{joint}.position: {ours.position} and {theirs.position} of "
                    f"{path.name} do not overlap; mend one of them"
                ) from error
        commands.append(replace(command, limits=tuple(limits)))
    return replace(contract, commands=tuple(commands))


def parse_contract(document: object, *, file: str) -> Contract:
    """The contract of a parsed YAML document; `file` names it in errors."""
    root = Section(document, file=file, where="")
    cameras = root.section("cameras")
    contract = Contract(
        path=file,
        robot=root.text("robot"),
        cameras=tuple(_camera(cameras.section(feature), feature) for feature in cameras.members()),
        states=tuple(_state(section) for section in root.sections("state")),
        instruction=_instruction(root),
        commands=tuple(_command(section) for section in root.sections("command")),
        control_rate=root.number("control_rate", 1.0, 1000.0, default=50.0),
        policy_rate=root.number("policy_rate", 0.1, 1000.0),
        chunk_steps=root.integer("chunk_steps", 0, 1000, default=0),
        max_observation_age=root.number("max_observation_age", 0.001, 10.0, default=0.2),
        sync_slop=root.number("sync_slop", 0.0, 10.0, default=0.05),
        allow_missing_cameras=root.names("allow_missing_cameras", default=()),
        urdf=root.text("urdf", default=""),
        scheduler=parse_scheduler(root),
        guard=parse_guard(root),
        failsafe=parse_failsafe(root),
    )
    root.done()
    if not contract.cameras:
        raise ContractError(f"{file}: cameras: expected at least one camera, got none")
    _check_topics(contract, root)
    return contract


def _message_type(section: Section, choices: tuple[str, ...], *, default: str | None = None) -> str:
    """The full type name; the last part alone (`Image`) and the two-part form are understood too."""
    text = section.text("type", default=default)
    for choice in choices:
        package, _, name = choice.split("/")
        if text in (choice, name, f"{package}/{name}"):
            return choice
    short = [choice.split("/")[-1] for choice in choices]
    raise section.error("type", f"expected one of {', '.join(short)}, got '{text}'; {nearest(text, short)}")


def _camera(section: Section, feature: str) -> Camera:
    camera = Camera(
        feature=feature,
        topic=section.topic("topic"),
        type=_message_type(section, IMAGE_TYPES, default=IMAGE_TYPES[0]),
        reliable=section.choice("qos", ("best_effort", "reliable"), default="best_effort") == "reliable",
        depth=section.integer("depth", 1, 100, default=2),
        receipt_stamp=section.choice("stamp", ("header", "receipt"), default="header") == "receipt",
    )
    section.done()
    return camera


def _state(section: Section) -> StateSource:
    joints = section.names("joints")
    fields = section.names("fields", default=("position",))
    for field in fields:
        if field not in STATE_FIELDS:
            raise section.error(
                "fields", f"expected {', '.join(STATE_FIELDS)}; {nearest(field, STATE_FIELDS)}"
            )
    state = StateSource(
        topic=section.topic("topic", default="joint_states"),
        joints=joints,
        fields=fields,
        units=units.parse_units(section, joints),
        reliable=section.choice("qos", ("best_effort", "reliable"), default="best_effort") == "reliable",
        receipt_stamp=section.choice("stamp", ("header", "receipt"), default="header") == "receipt",
    )
    section.done()
    return state


def _instruction(root: Section) -> Instruction:
    if not root.has("instruction"):
        return Instruction(topic="instruction", default="", allowed=())
    section = root.section("instruction")
    instruction = Instruction(
        topic=section.topic("topic", default="instruction"),
        default=section.text("default", default="").strip(),
        allowed=section.names("allow", default=()),
    )
    section.done()
    if instruction.allowed and instruction.default and instruction.default not in instruction.allowed:
        raise section.error("default", "is not among the instructions of 'allow'; add it there")
    return instruction


def _command(section: Section) -> CommandSink:
    message = _message_type(section, COMMAND_TYPES, default=COMMAND_TYPES[0])
    twist = message in TWIST_TYPES
    joints = section.names("axes" if twist else "joints")
    for axis in joints if twist else ():
        if axis not in TWIST_AXES:
            raise section.error("axes", f"unknown axis '{axis}'; {nearest(axis, TWIST_AXES)}")
    interfaces = ("velocity",) if twist else ("position", "velocity", "effort")
    interface = section.choice("interface", interfaces, default=interfaces[0])
    trajectory = message == "trajectory_msgs/msg/JointTrajectory"
    if trajectory and interface != "position":
        raise section.error("interface", f"a JointTrajectory carries positions here, got '{interface}'")
    points = section.choice("points", ("one", "chunk"), default="one") if trajectory else "one"
    command = CommandSink(
        topic=section.topic("topic"),
        type=message,
        joints=joints,
        interface=interface,
        units=units.parse_units(section, joints, interface=interface),
        limits=units.parse_limits(section, joints, interface=interface),
        whole_chunk=points == "chunk",
        frame_id=section.text("frame_id", default=""),
    )
    section.done()
    return command


def _check_topics(contract: Contract, root: Section) -> None:
    """No two inputs and no two commands share a topic, and no command goes where an input comes from."""
    taken: dict[str, str] = {}

    def take(topic: str, key: str) -> None:
        if topic.lstrip("/") in taken:
            other = taken[topic.lstrip("/")]
            raise root.error(key, f"topic '{topic}' is already that of {other}; give each its own")
        taken[topic.lstrip("/")] = key

    for camera in contract.cameras:
        take(camera.topic, f"cameras.{camera.feature}.topic")
    for index, state in enumerate(contract.states):
        take(state.topic, f"state[{index}].topic" if len(contract.states) > 1 else "state.topic")
    take(contract.instruction.topic, "instruction.topic")
    for index, command in enumerate(contract.commands):
        key = f"command[{index}].topic" if len(contract.commands) > 1 else "command.topic"
        take(command.topic, key)
        take(command.topic + DRY_SUFFIX, key)
