"""The simulated arm as a ROS 2 node: ros2 run vla_infer simulation

It takes the place of camera drivers, joint state broadcaster and position controller of a real SO-101, has the same
topics, and is the source of simulated time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_infer.codecs import CODECS, COMMAND_CODECS, JointSample, message_class
from vla_infer.contract import Contract, load_contract
from vla_infer.contract_parse import nearest
from vla_infer.errors import ContractError, ObservationError, VlaInferError
from vla_infer.heap import keep_heap
from vla_infer.node_support import make_executor
from vla_infer.sim.episodes import Episodes, Rules
from vla_infer.sim.model import CAMERAS, JOINTS
from vla_infer.sim.tasks import KINDS, SPLITS
from vla_infer.sim.trajectory import Trajectory
from vla_infer.sim.world import World
from vla_infer.stop_signals import ignore_signals, stop_on_signals

TICK = 0.01  # s of simulation at a time; /clock and joint states come with each
STATUS_RATE = 5.0  # Hz
LAG_LIMIT = 0.25  # s behind the wall clock; beyond it simulated time runs slower than real
_COMMANDS = "forward_position_controller/commands"  # as ros2_control has them
_TRAJECTORIES = "joint_trajectory_controller/joint_trajectory"

# name, default, description, lowest and highest
PARAMETERS: tuple[tuple[str, Any, str, tuple[float, float] | None], ...] = (
    ("contract", "so101", "Contract that names the topics: a YAML file or a shipped name", None),
    (
        "episodes",
        "auto",
        "auto: each scene says what to do; manual: a person does, on the instruction topic",
        None,
    ),
    ("seed", 0, "Of the first scene; each next one has the next number", (0, 2**31)),
    ("split", "eval", "Whose sentences: train or eval", None),
    ("kinds", list(KINDS), f"Kinds of task, of {', '.join(KINDS)}", None),
    ("time_limit", 12.0, "Seconds that an episode may take", (1.0, 3600.0)),
    ("camera_rate", 30.0, "Images a second of each camera", (1.0, 100.0)),
    ("image_height", 128, "Pixels", (16, 1080)),
    ("image_width", 128, "Pixels", (16, 1920)),
)


class Simulation:
    """A world, its episodes and their topics. Everything happens in the thread that calls `run`."""

    def __init__(self, node: Any) -> None:
        """Raises VlaInferError, on one line, for a wrong parameter or contract, and when something is missing."""
        self._node = node
        settings = _settings(node)
        contract = load_contract(settings["contract"])
        self._features = _check_contract(contract)
        size = (settings["image_height"], settings["image_width"])
        self.world = World(image_size=size, cameras=self._features)
        rules = Rules(
            seed=settings["seed"],
            split=settings["split"],
            kinds=tuple(settings["kinds"]),
            auto=settings["episodes"] == "auto",
            time_limit=settings["time_limit"],
        )
        self.episodes = Episodes(self.world, rules)
        self._ticks_per_image = 1.0 / (settings["camera_rate"] * TICK)
        self._trajectory: Trajectory | None = None
        self._sent: list[str] = []  # instructions that were published and did not come back yet
        self._shown: tuple[int, str, str] | None = None
        self._warned = -1e9
        self._frames = 0
        self._factor = 1.0
        # Simulated time starts at the time of day, so that it suits a listener without use_sim_time too.
        self._now = time.time_ns()
        self._topics(contract)

    def _topics(self, contract: Contract) -> None:
        node = self._node
        reliable = QoSProfile(depth=2)
        # Some seconds of it: with a depth of one an outcome that is late, or sent again, is overwritten by the next.
        kept = QoSProfile(depth=25, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._clock = node.create_publisher(
            Clock, "/clock", QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        )
        self._cameras = {
            camera.feature: (CODECS[camera.type], _publisher(node, camera.type, camera.topic, reliable))
            for camera in contract.cameras
        }
        state = contract.states[0]
        self._state_codec = CODECS["sensor_msgs/msg/JointState"]
        self._state = _publisher(node, "sensor_msgs/msg/JointState", state.topic, QoSProfile(depth=10))
        self._status = node.create_publisher(DiagnosticStatus, "simulation/status", kept)
        self._instruction = node.create_publisher(String, contract.instruction.topic, 10)
        node.create_subscription(String, contract.instruction.topic, self._on_instruction, 10)
        names = contract.commands[0].joints
        self._order = [names.index(joint) for joint in JOINTS]
        node.create_subscription(Float64MultiArray, _COMMANDS, self._on_command, 1)
        node.create_subscription(JointTrajectory, _TRAJECTORIES, self._on_trajectory, 1)
        node.create_service(Trigger, "~/reset", self._on_reset)

    def _on_command(self, message: Any) -> None:
        values = np.array(message.data, np.float64)
        if values.shape != (len(JOINTS),) or not np.isfinite(values).all():
            self._warn(
                f"{_COMMANDS}: expected {len(JOINTS)} finite positions, got {len(values)} numbers; refused"
            )
            return
        self._trajectory = None
        self.episodes.command(values[self._order])

    def _on_trajectory(self, message: Any) -> None:
        try:
            setpoint = COMMAND_CODECS["trajectory_msgs/msg/JointTrajectory"].decode(message)
            self._trajectory = Trajectory(setpoint, JOINTS, self.world.time, self.world.commanded)
        except ObservationError as error:
            self._warn(f"{_TRAJECTORIES}: {error}; refused")
            return
        self.episodes.command(self.world.commanded)

    def _on_instruction(self, message: Any) -> None:
        if message.data in self._sent:
            self._sent.remove(message.data)  # our own, which comes back
        else:
            self.episodes.instruct(message.data)

    def _on_reset(self, _: Any, response: Any) -> Any:
        self._trajectory = None
        self.episodes.reset()
        response.success, response.message = True, f"episode {self.episodes.number}"
        return response

    def _warn(self, text: str) -> None:
        if time.monotonic() >= self._warned + 5.0:
            self._warned = time.monotonic()
            self._node.get_logger().warning(text)

    def run(self, executor: Any, stop: threading.Event) -> None:
        """Simulate in real time until `stop` is set."""
        due = begun = time.monotonic()
        ticks = 0
        next_image = next_status = 0.0
        while not stop.is_set():
            wait = due - time.monotonic()
            if wait > 0:
                executor.spin_once(timeout_sec=wait)
                continue
            if wait < -LAG_LIMIT:
                due = time.monotonic()
            due += TICK
            self._tick()
            ticks += 1
            if ticks >= next_image:
                next_image = max(next_image + self._ticks_per_image, ticks + 0.5)
                self._publish_images()
            if ticks >= next_status or self._changed():
                next_status = ticks + 1.0 / (STATUS_RATE * TICK)
                self._factor = ticks * TICK / max(time.monotonic() - begun, TICK)
                self._publish_status()
        self.world.close()

    def _tick(self) -> None:
        world, episodes = self.world, self.episodes
        if self._trajectory is not None:
            episodes.command(self._trajectory.at(world.time))
        number = episodes.number
        world.advance(TICK)
        episodes.step()
        if episodes.number != number:
            self._trajectory = None
        self._now += round(TICK * 1e9)
        stamp = Clock()
        stamp.clock.sec, stamp.clock.nanosec = divmod(self._now, 1_000_000_000)
        self._clock.publish(stamp)
        positions, velocities = world.joints()
        sample = JointSample(JOINTS, positions, velocities, None)
        self._state.publish(self._state_codec.encode(sample, self._now, "base_link"))
        instruction = episodes.announce()
        if instruction is not None:
            self._sent.append(instruction)
            self._instruction.publish(String(data=instruction))

    def _publish_images(self) -> None:
        self._frames += 1
        for feature, image in self.world.images().items():
            codec, publisher = self._cameras[feature]
            publisher.publish(codec.encode(image, self._now, f"{CAMERAS[feature]}_optical_frame"))

    def _changed(self) -> bool:
        shown = (self.episodes.number, self.episodes.phase, self.episodes.instruction)
        changed, self._shown = shown != self._shown, shown
        return changed

    def _publish_status(self) -> None:
        line, values = self.episodes.describe()
        values["real_time_factor"] = f"{self._factor:.3f}"
        values["frames"] = str(self._frames)
        pairs = [KeyValue(key=key, value=value) for key, value in values.items()]
        self._status.publish(
            DiagnosticStatus(level=DiagnosticStatus.OK, name="simulation", message=line, values=pairs)
        )


def _publisher(node: Any, type_name: str, topic: str, qos: Any) -> Any:
    return node.create_publisher(message_class(type_name), topic, qos)


def _check_contract(contract: Contract) -> tuple[str, ...]:
    """The cameras that the contract asks for. Raises ContractError where it is not one for this arm."""
    features = tuple(camera.feature for camera in contract.cameras)
    if unknown := sorted(set(features) - set(CAMERAS)):
        raise ContractError(
            f"{contract.path}: cameras.{unknown[0]}: the simulation has "
            f"{', '.join(CAMERAS)}; use so101, or leave it out"
        )
    for where, joints in (("state", contract.states[0].joints), ("command", contract.commands[0].joints)):
        if set(joints) != set(JOINTS):
            raise ContractError(
                f"{contract.path}: {where}.joints: the simulated arm has {', '.join(JOINTS)}, got {', '.join(joints)}"
            )
    return features


def _settings(node: Any) -> dict[str, Any]:
    """Values of PARAMETERS. Raises ContractError for the first that is wrong, or that does not exist."""
    overrides = getattr(node, "_parameter_overrides", {})
    known = [name for name, *_ in PARAMETERS]
    for name in overrides:
        if (
            name not in (*known, "use_sim_time", "start_type_description_service")
            and "qos_overrides" not in name
        ):
            raise ContractError(f"parameter '{name}': there is none of that name; {nearest(name, known)}")
    values: dict[str, Any] = {}
    for name, default, description, limits in PARAMETERS:
        descriptor = ParameterDescriptor(description=description, read_only=True)
        if limits is not None and isinstance(default, int):
            descriptor.integer_range = [IntegerRange(from_value=int(limits[0]), to_value=int(limits[1]))]
        elif limits is not None:
            descriptor.floating_point_range = [FloatingPointRange(from_value=limits[0], to_value=limits[1])]
        try:
            values[name] = node.declare_parameter(name, default, descriptor).value
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            between = f" from {limits[0]:g} to {limits[1]:g}" if limits else ""
            raise ContractError(
                f"parameter '{name}': expected a value like {default!r}{between}, got {overrides[name].value!r}"
            ) from error
    for name, choices in (("episodes", ("auto", "manual")), ("split", SPLITS)):
        if values[name] not in choices:
            raise ContractError(f"parameter '{name}': expected {' or '.join(choices)}, got '{values[name]}'")
    if not values["kinds"] or not set(values["kinds"]) <= set(KINDS):
        raise ContractError(f"parameter 'kinds': expected of {', '.join(KINDS)}, got {list(values['kinds'])}")
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGINT or SIGTERM. Returns the exit status: 0, or 2 when it could not start."""
    stop = stop_on_signals()
    keep_heap()
    context = rclpy.Context()
    rclpy.init(args=argv, context=context, signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("simulation", context=context)
    executor = make_executor(context)
    executor.add_node(node)
    try:
        Simulation(node).run(executor, stop)
    except VlaInferError as error:
        print(f"simulation: {error}", file=sys.stderr)
        return 2
    finally:
        ignore_signals()
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown(context=context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
