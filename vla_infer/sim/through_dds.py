"""Seeded episodes through ROS: the simulation's node and the policy's node as they are, each a process of its own.

The same scenes as in this process, in real time: an inference takes what it takes, and transport, executor and timers
take part. What comes back is what a listener sees: outcomes, times by /clock, and the joints' motion.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable
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

START_LIMIT = 90.0  # s until the first episode runs
_SLOWEST = 8.0  # how much longer than simulated an episode may take before it counts as stuck
_BETWEEN = 3.0  # s, simulated: what the simulation waits between episodes, and some
_JERK_PERIOD = 0.02  # s: every second joint state, as often as commands go out


class _Listener:
    """Follows the episodes of /simulation/status by their seeds."""

    def __init__(self, node: Any, contract: Contract) -> None:
        from diagnostic_msgs.msg import DiagnosticStatus
        from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import JointState

        self.outcomes: dict[int, Outcome] = {}
        self.heard = time.monotonic()
        self._clock = 0.0
        self._running: tuple[int, float] | None = None  # seed, and when it began
        self._positions: list[list[float]] = []
        kept = QoSProfile(depth=50, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        best = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
        node.create_subscription(DiagnosticStatus, "simulation/status", self._on_status, kept)
        node.create_subscription(Clock, "/clock", self._on_clock, best)
        node.create_subscription(JointState, contract.states[0].topic, self._on_joints, best)

    def _on_clock(self, message: Any) -> None:
        self._clock = message.clock.sec + 1e-9 * message.clock.nanosec

    def _on_joints(self, message: Any) -> None:
        if self._running is not None:
            self._positions.append(list(message.position))

    def _on_status(self, message: Any) -> None:
        values = {item.key: item.value for item in message.values}
        seed, phase = int(values["seed"]), values["phase"]
        if phase == "running" and (self._running is None or self._running[0] != seed):
            self._running, self._positions = (seed, self._clock), []
            self.heard = time.monotonic()
        elif phase == "ended" and seed not in self.outcomes:
            began = self._running[1] if self._running and self._running[0] == seed else math.nan
            motion = np.array(self._positions[::2], np.float64)
            jerk = np.diff(motion, n=3, axis=0) / _JERK_PERIOD**3 if len(motion) > 3 else np.zeros(1)
            done = values["success"] == "true"
            self.outcomes[seed] = Outcome(
                seed,
                values["kind"],
                values["instruction"],
                success=done,
                obeyed=done,
                seconds=self._clock - began,
                squared_jerk=float(np.square(jerk).mean()),
            )
            self._running = None
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
        domain = str(1 + os.getpid() % 100)
        environment = {"ROS_DOMAIN_ID": domain, "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
        log = Path(folder) / "programs.log"
        with log.open("wb") as file:
            programs = Programs(file)
            try:
                _start(programs, options, contract, sizes.pop(), environment)
                outcomes = _listen(programs, options, load_contract(contract), int(domain), log, progress)
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


def _start(
    programs: Programs, options: Options, contract: str, size: tuple[int, int], environment: dict[str, str]
) -> None:
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
    programs.start("node", Program(python("vla_node", *node), environment=environment))
    programs.start("simulation", Program(python("sim.node", *world), environment=environment))


def _listen(
    programs: Programs,
    options: Options,
    contract: Contract,
    domain: int,
    log: Path,
    progress: Callable[[Outcome], None],
) -> tuple[Outcome, ...]:
    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    context = rclpy.Context()
    rclpy.init(
        context=context, domain_id=domain, signal_handler_options=rclpy.signals.SignalHandlerOptions.NO
    )
    ros = rclpy.create_node("evaluation", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(ros)
    listener = _Listener(ros, contract)
    wanted = range(options.seed, options.seed + options.episodes)
    told = 0
    try:
        while told < len(wanted):
            executor.spin_once(timeout_sec=0.1)
            while told < len(wanted) and wanted[told] in listener.outcomes:
                progress(listener.outcomes[wanted[told]])
                told += 1
            limit = START_LIMIT if not listener.outcomes else 0.0
            limit = max(limit, _SLOWEST * (options.time_limit + _BETWEEN))
            problem = programs.ended()
            if not problem and time.monotonic() > listener.heard + limit:
                problem = f"no episode began or ended for {limit:.0f} s"
            if problem:
                raise ReplayError("\n".join([f"through DDS: {problem}", *last_lines(log)]))
    finally:
        ros.destroy_node()
        rclpy.shutdown(context=context)
    return tuple(dataclasses.replace(listener.outcomes[seed]) for seed in wanted)
