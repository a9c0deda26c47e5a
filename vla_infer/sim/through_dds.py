"""Seeded episodes through ROS: the simulation's node and the policy's node as they are, each a process of its own.

The same scenes as in this process, in real time: an inference takes what it takes, and transport, executor and timers
take part. What comes back is what a listener sees: outcomes, times by /clock, and the joints' motion.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_infer.checkpoint import read_checkpoint
from vla_infer.contract import Contract, load_contract
from vla_infer.contract_parse import find_contract
from vla_infer.demo.programs import Program, Programs, last_lines, parameters, python
from vla_infer.errors import ReplayError, UnsupportedError
from vla_infer.sim.evaluate import Evaluation, Options
from vla_infer.sim.rollout import Outcome

STATUS = "simulation/status"
START_LIMIT = 90.0  # s until the simulation is heard, and from then on until the first episode runs
_SLOWEST = 8.0  # how much longer than simulated an episode may take before it counts as stuck
_BETWEEN = 3.0  # s, simulated: what the simulation waits between episodes, and some
_JERK_PERIOD = 0.02  # s: every second joint state, as often as commands go out


class _Listener:
    """Follows the episodes of /simulation/status, seed by seed: none may be missing, or the next would be waited for
    for ever while others come and go.

    outcomes: of the seeds so far, in their order. problem: what came that cannot be right, or nothing. heard: steady
    time in seconds when something last came that was waited for.
    """

    def __init__(self, node: Any, contract: Contract, seeds: range) -> None:
        from diagnostic_msgs.msg import DiagnosticStatus
        from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import JointState

        self.outcomes: list[Outcome] = []
        self.problem = ""
        self.heard = time.monotonic()
        self._seeds = seeds
        self._clock: float | None = None
        self._began: float | None = None  # by /clock, the episode that runs
        self._positions: list[list[float]] = []
        self._joints = contract.states[0].topic
        self._silent = {STATUS, "/clock", self._joints}  # topics on which nothing came yet
        kept = QoSProfile(depth=50, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        best = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
        node.create_subscription(DiagnosticStatus, STATUS, self.on_status, kept)
        node.create_subscription(Clock, "/clock", self.on_clock, best)
        node.create_subscription(JointState, self._joints, self.on_joints, best)

    @property
    def connected(self) -> bool:
        """Whether every topic was heard, so that no episode can begin unheard."""
        return not self._silent

    @property
    def waits_for(self) -> str:
        if self._silent:
            return f"anything on {', '.join(sorted(self._silent))}"
        return f"the {'begin' if self._began is None else 'end'} of episode {self._seeds[len(self.outcomes)]}"

    def on_clock(self, message: Any) -> None:
        self._silent.discard("/clock")
        self._clock = message.clock.sec + 1e-9 * message.clock.nanosec

    def on_joints(self, message: Any) -> None:
        self._silent.discard(self._joints)
        if self._began is not None:
            self._positions.append(list(message.position))

    def on_status(self, message: Any) -> None:
        self._silent.discard(STATUS)
        if self.problem or len(self.outcomes) == len(self._seeds):
            return
        values = {item.key: item.value for item in message.values}
        seed, phase = int(values["seed"]), values["phase"]
        wanted = self._seeds[len(self.outcomes)]
        if (
            self.outcomes and seed == wanted - 1 and phase == "ended"
        ):  # the last outcome, which is shown for a moment
            return
        if seed != wanted or (phase == "ended" and self._began is None):
            self.problem = (
                f"{STATUS}: waited for {self.waits_for}, got episode {seed} {phase}: messages were lost, or another "
                "simulation is in this ROS domain"
            )
        elif phase == "running" and self._began is None and self._clock is not None:
            self._began, self._positions = self._clock, []
            self.heard = time.monotonic()
        elif phase == "ended" and self._began is not None and self._clock is not None:
            self._end(seed, values, self._clock - self._began)

    def _end(self, seed: int, values: dict[str, str], seconds: float) -> None:
        motion = np.array(self._positions[::2], np.float64)
        jerk = np.diff(motion, n=3, axis=0) / _JERK_PERIOD**3 if len(motion) > 3 else np.zeros(1)
        done = values["success"] == "true"
        self.outcomes.append(
            Outcome(
                seed,
                values["kind"],
                values["instruction"],
                success=done,
                obeyed=done,
                seconds=seconds,
                squared_jerk=float(np.square(jerk).mean()),
            )
        )
        self._began = None
        self.heard = time.monotonic()


def evaluate_through_dds(options: Options, *, progress: Callable[[Outcome], None]) -> Evaluation:
    """As `evaluate.evaluate`, for a policy that is told what the scene says, with no latency but its own.

    Raises:
        UnsupportedError: an option that needs simulated inference.
        ReplayError: a program ended or came to a stop; the message has the end of its log.
    """
    if (
        options.policy is None
        or options.wrong_instruction
        or options.latency
        or options.inference is not None
    ):
        raise UnsupportedError(
            "--through-dds runs a policy as it is: it goes with no --expert, --wrong-instruction, --inference-ms "
            "or --latency-ms"
        )
    if options.device.startswith("reference"):
        raise UnsupportedError("--through-dds runs the node, which has no device reference")
    began = time.monotonic()
    ckpt = read_checkpoint(options.policy)
    sizes = set(ckpt.camera_sizes.values())
    if len(sizes) != 1:
        raise UnsupportedError(f"{ckpt.path}: cameras of different sizes {sorted(sizes)}: one is drawn")
    with tempfile.TemporaryDirectory() as folder:
        contract = _contract_file(options, Path(folder))
        domain = 1 + os.getpid() % 100
        environment = {"ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
        simulation, node = (
            Program(command, environment=environment) for command in _commands(options, contract, sizes.pop())
        )
        log = Path(folder) / "programs.log"
        with log.open("wb") as file:
            programs = Programs(file)
            try:
                programs.start("simulation", simulation)
                outcomes = _listen(
                    programs, node, options, _Place(load_contract(contract), domain, log), progress
                )
            finally:
                programs.stop("node")
    return Evaluation(
        options, f"{options.device}, through DDS", ckpt.fingerprint, outcomes, time.monotonic() - began
    )


def _contract_file(options: Options, folder: Path) -> str:
    """The contract to give to both nodes, with the scheduler mode that is asked for."""
    if options.scheduler is None:
        return options.contract
    import yaml

    document = yaml.safe_load(find_contract(options.contract).read_text(encoding="utf-8"))
    document["scheduler"] = {**document.get("scheduler", {}), "mode": options.scheduler}
    path = folder / "contract.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return str(path)


def _commands(
    options: Options, contract: str, size: tuple[int, int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the simulation and of the policy's node; size: (H, W) of the images."""
    given = {"num_steps": options.num_steps, "threads": options.threads}
    node = parameters(
        policy=Path(str(options.policy)).resolve(),
        contract=contract,
        device=options.device,
        precision=options.precision,
        dry_run=False,
        use_sim_time=True,
        **{name: value for name, value in given.items() if value is not None},
    )
    world = parameters(
        contract=contract,
        seed=options.seed,
        split=options.split,
        kinds=list(options.kinds),
        time_limit=float(options.time_limit),
        image_height=size[0],
        image_width=size[1],
    )
    return python("sim.node", *world), python("vla_node", *node)


@dataclass(frozen=True)
class _Place:
    """Where the programs run. log: of all they print."""

    contract: Contract
    domain: int
    log: Path


@contextmanager
def _ears(place: _Place, seeds: range) -> Iterator[tuple[_Listener, Callable[[], None]]]:
    """A listener, and what lets it hear for a moment."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    context = rclpy.Context()
    rclpy.init(
        context=context, domain_id=place.domain, signal_handler_options=rclpy.signals.SignalHandlerOptions.NO
    )
    ros = rclpy.create_node("evaluation", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(ros)
    try:
        yield _Listener(ros, place.contract, seeds), lambda: executor.spin_once(timeout_sec=0.1)
    finally:
        executor.shutdown(timeout_sec=1.0)
        ros.destroy_node()
        rclpy.shutdown(context=context)


def _listen(
    programs: Programs, node: Program, options: Options, place: _Place, progress: Callable[[Outcome], None]
) -> tuple[Outcome, ...]:
    """The outcomes of a simulation that runs. The policy's node, whose first command begins the first episode, is
    started when the simulation is heard: discovery can take longer than a short episode."""
    seeds = range(options.seed, options.seed + options.episodes)
    with _ears(place, seeds) as (listener, hear):
        told, started = 0, False
        while told < len(seeds):
            hear()
            if listener.connected and not started:
                programs.start("node", node)
                started, listener.heard = True, time.monotonic()
            for outcome in listener.outcomes[told:]:
                progress(outcome)
                told += 1
            limit = START_LIMIT if not listener.outcomes else 0.0
            limit = max(limit, _SLOWEST * (options.time_limit + _BETWEEN))
            problem = listener.problem or programs.ended()
            if not problem and time.monotonic() > listener.heard + limit:
                problem = f"waited {limit:.0f} s for {listener.waits_for}"
            if problem and told < len(seeds):
                raise ReplayError("\n".join([f"through DDS: {problem}", *last_lines(place.log)]))
        return tuple(listener.outcomes)
