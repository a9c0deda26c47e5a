"""What a configured node consists of, put together in one place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from .chunk import ActionLayout
from .contract import Contract
from .delay import InferenceWatchdog
from .failsafe import Level
from .frame import FrameBuffer
from .motion import Motion
from .node_control import Control, Observing
from .node_inference import InferenceWorker, Inferring
from .node_inputs import Inputs, InstructionSlot
from .node_parameters import Settings
from .node_safety import EmergencyStop
from .node_support import Reporter

# How long cleanup waits for an inference that is under way; the thread ends by itself after that.
JOIN = 0.2


@dataclass(frozen=True)
class Running:
    """Everything that exists between configuration and cleanup."""

    settings: Settings
    contract: Contract
    info: Any  # PolicyInfo
    slot: InstructionSlot
    buffer: FrameBuffer
    worker: InferenceWorker
    inputs: Inputs
    control: Control


@dataclass(frozen=True)
class Surroundings:
    """What the parts have in common. stop(level, reason): the failsafe wants the node to deactivate or exit."""

    node: Any
    reporter: Reporter
    emergency: EmergencyStop
    stop: Callable[[Level, str], None]


def assemble(
    around: Surroundings,
    settings: Settings,
    contract: Contract,
    policy: Any,
    *,
    make_worker: Callable[..., InferenceWorker] = InferenceWorker,
) -> Running:
    """All parts around `policy`, which is the worker's from here on and closed when something fails.

    Raises ContractError where contract and policy do not fit, ObservationError for the instruction.
    """
    reporter = around.reporter
    with ExitStack() as undo:  # what is made is unmade when a later part fails
        undo.callback(policy.close)
        info = policy.info
        contract.check_policy(info)
        slot = InstructionSlot(contract.instruction.default, allowed=contract.instruction.allowed)
        slot.put(settings.instruction)
        buffer, layout = FrameBuffer(contract), ActionLayout(contract)
        motion = Motion(contract, 1.0 / (settings.control_rate or contract.control_rate))
        least = InferenceWatchdog.CPU if info.device.startswith("cpu") else InferenceWatchdog.GPU
        watchdog = InferenceWatchdog(contract.failsafe.inference_timeout, least=least)
        source = Inferring(buffer, layout, slot, motion.scheduler, watchdog)
        worker = make_worker(policy, source, reporter=reporter)
        undo.pop_all()  # the policy is the worker's from here on
        undo.callback(worker.stop, JOIN)
        observing = Observing(buffer, worker, slot, around.emergency, around.stop)
        control = Control(around.node, layout, motion, observing, dry_run=settings.dry_run, reporter=reporter)
        undo.callback(control.destroy)
        inputs = Inputs(
            around.node,
            contract,
            buffer,
            slot,
            clock=reporter.clock,
            reporter=reporter,
            arrived=worker.wake,
        )
        undo.pop_all()
    return Running(settings, contract, info, slot, buffer, worker, inputs, control)
