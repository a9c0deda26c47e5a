"""vla_node: a lifecycle node that wires cameras, joint states and an instruction to a policy and its
actions to a robot. It holds no cleverness: contract, frame, chunk and scheduler decide.

    vla_node --ros-args -p policy:=DIRECTORY -p contract:=so101
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import JumpThreshold
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions

from .contract import Contract, load_contract
from .doctor import FAIL
from .errors import ObservationError
from .failsafe import Level
from .first_observations import calibrating
from .frame import FrameBuffer
from .heap import keep_heap, set_aside
from .node_assembly import JOIN, Running, Surroundings, assemble
from .node_diagnostics import array, describe_running, describe_state
from .node_inputs import InstructionSlot
from .node_observer import Observer
from .node_parameters import NodeParameters, Settings
from .node_safety import EmergencyStop, Preflight, RunSwitch
from .node_support import Interrupted, NodeClock, Reporter, describe, make_executor, run_interruptible
from .stop_signals import ignore_signals, stop_on_signals
from .time_slice import ask_for_realtime, ask_for_short_slice

#: Of a process that the failsafe gave up: the device is lost or an inference hangs. It is to be started anew.
EXIT_STATUS = 3


def load_policy(path: str, **options: Any) -> Any:
    """vla_infer.load_policy."""
    from . import policy  # the engine is needed at configuration, not to import this module

    return policy.load_policy(path, **options)


def _set_instruction(slot: InstructionSlot, text: str) -> None:
    if not slot.put(text):
        raise ObservationError("the instruction is empty; the one in force stays, and ~/run stops")


Transition = Callable[["VlaNode", LifecycleState], TransitionCallbackReturn]


def _logged(transition: Transition) -> Transition:
    """rclpy swallows what a transition raises; this says it first."""

    @functools.wraps(transition)
    def call(node: VlaNode, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(node, state)
        except Exception as error:
            node._fail(f"{transition.__name__} failed: {describe(error)}")
            return TransitionCallbackReturn.ERROR

    return call


class VlaNode(LifecycleNode):  # type: ignore[misc]  # rclpy's classes have no usable types
    """The node. `policy_loader` has the signature of vla_infer.load_policy; `stop` ends loading early."""

    def __init__(
        self,
        *,
        policy_loader: Callable[..., Any] = load_policy,
        stop: threading.Event | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> None:
        super().__init__("vla_node", **options)
        self._policy_loader = policy_loader
        self.stop_requested = stop or threading.Event()
        self._table = NodeParameters(self)
        self._clock_pair = NodeClock(self.get_clock())
        self._reporter = Reporter(self.get_logger(), self._clock_pair)
        self._reporter.observer = observer
        self._running: Running | None = None
        self._problem = ""
        self._label = "unconfigured"
        #: Called when control is about to start; for what only the owner of a process may do.
        self.before_motion: Callable[[], None] = lambda: None
        self.thread_left = False  # an inference or a load outlasted its stop
        self.exit_status = 0
        self._emergency = EmergencyStop(self, self._reporter)
        self._run_switch = RunSwitch(self, self._reporter, self._active_slot)
        self._preflight = Preflight(self, self._reporter, self._configured)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._diagnostics_timer = self.create_timer(
            1.0,
            self._reporter.guarded("diagnostics", self._publish_diagnostics),
            clock=self._clock_pair.steady_clock,
        )
        threshold = JumpThreshold(
            min_forward=Duration(seconds=1), min_backward=Duration(nanoseconds=-1), on_clock_change=True
        )
        self._jump = self.get_clock().create_jump_callback(threshold, post_callback=self._on_jump)

    @property
    def autostart(self) -> bool:
        return bool(self.get_parameter("autostart").value)

    def start(self) -> bool:
        """Configure and activate; False where one of them failed, the reason being logged."""
        done = TransitionCallbackReturn.SUCCESS
        return bool(self.trigger_configure() == done and self.trigger_activate() == done)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            self._running = self._configure(self._table.settings())
        except Interrupted as interruption:
            self.thread_left = True
            return self._fail(str(interruption))
        except Exception as error:
            return self._fail(f"configuration failed: {describe(error)}")
        self._problem, self._label = "", "inactive"
        self._table.changeable = False
        return TransitionCallbackReturn.SUCCESS

    def _fail(self, problem: str) -> TransitionCallbackReturn:
        self._problem = problem
        self.get_logger().error(problem)
        return TransitionCallbackReturn.FAILURE

    def _configure(self, settings: Settings) -> Running:
        contract = load_contract(settings.contract)
        self.get_logger().info(f"loading {settings.policy} for {settings.device} in {settings.precision}")
        load = calibrating(self._policy_loader, settings.calibrate_first, self.get_logger().warning)
        policy = run_interruptible(
            lambda: load(
                settings.policy,
                device=settings.device,
                precision=settings.precision,
                num_steps=settings.num_steps or None,
                threads=settings.threads or None,
            ),
            self.stop_requested,
            discard=lambda late: late.close(),
        )
        around = Surroundings(self, self._reporter, self._emergency, self._stop)
        running = assemble(around, settings, contract, policy)
        info, control, motion = running.info, running.control, running.control.motion
        if self._reporter.observer is not None:
            self._reporter.observer.configured(motion, self._reporter.counts)
        self.get_logger().info(
            f"{info.family} for '{contract.robot}': {len(contract.cameras)} cameras, state {info.state_dim}, "
            f"actions {info.horizon}x{info.action_dim}, {info.weight_bytes / 2**20:.1f} MiB of weights"
        )
        if settings.dry_run:
            self.get_logger().warning(
                f"dry run: commands go to {', '.join(control.topics)}; start with dry_run:=false to arm"
            )
        if motion.unlimited:
            self.get_logger().warning(
                f"{contract.path}: no limit at all for {', '.join(motion.unlimited)}; give limits or a urdf"
            )
        self._table.live["instruction"] = functools.partial(_set_instruction, running.slot)
        return running

    def _active_slot(self) -> InstructionSlot | None:
        return self._running.slot if self._running is not None and self._label == "active" else None

    def _configured(self) -> tuple[Contract, FrameBuffer] | None:
        return (self._running.contract, self._running.buffer) if self._running is not None else None

    def _stop(self, level: Level, reason: str) -> None:
        """The failsafe wants the node to deactivate or to exit. Not from within the control timer, which is
        destroyed on the way."""
        self._problem = f"{level.name}: {reason}"
        if level >= Level.EXIT:
            self.exit_status = EXIT_STATUS
            self.stop_requested.set()
        elif self.executor is not None:
            self.executor.create_task(self._deactivate)

    def _deactivate(self) -> None:
        if self._label == "active":
            self.trigger_deactivate()

    @_logged
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self._running is None:
            return self._fail("nothing is configured")
        if self._emergency.latched:
            return self._fail(f"not activated: {self._emergency.reason}")
        if self._running.settings.preflight:
            failed = [finding for finding in self._preflight.findings() if finding.level == FAIL]
            if failed:
                return self._fail(f"not activated: preflight: {' | '.join(map(str, failed))}")
        self._problem = ""
        self._running.slot.running = True
        super().on_activate(state)
        self._label = "active"
        self.before_motion()
        self._running.control.start()
        self._running.worker.enable()
        return TransitionCallbackReturn.SUCCESS

    @_logged
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._halt()
        super().on_deactivate(state)
        self._label = "inactive"
        return TransitionCallbackReturn.SUCCESS

    @_logged
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        self._label = "unconfigured"
        return TransitionCallbackReturn.SUCCESS

    @_logged
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        self._label = "finalized"
        self.stop_requested.set()  # a finalized node can do nothing more: the process ends
        return TransitionCallbackReturn.SUCCESS

    @_logged
    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        self._label = "unconfigured"
        self._problem = self._problem or "a transition failed; see the log"
        return TransitionCallbackReturn.SUCCESS

    def _halt(self) -> None:
        """Stop inferring and moving; the last message is a hold."""
        if self._running is not None:
            self._running.worker.disable()
            self._running.control.stop()

    def _release(self) -> None:
        if self._running is None:
            return
        self._halt()
        running, self._running = self._running, None
        self._table.live.clear()
        running.inputs.destroy()
        running.control.destroy()
        if not running.worker.stop(JOIN):
            self.thread_left = True
            self.get_logger().info("an inference is still under way; its policy is closed when it ends")
        self._table.changeable = True

    def close(self) -> None:
        """Shut down from any state and give back what rclpy holds. The node is of no use afterwards."""
        with suppress(Exception):  # no such transition from finalized
            self.trigger_shutdown()
        self._release()
        self._jump.unregister()
        self.destroy_node()

    def spin_guarded(self, executor: Any) -> None:
        """One callback, then the control tick if it is due. What rclpy itself raises is said and does not end the
        node."""
        try:
            executor.spin_once(timeout_sec=0.1)
        except Exception as error:
            self._reporter.counts.add("internal_errors")
            self._reporter.error("executor", f"executor: {describe(error)}")
        if self._running is not None:
            self._running.control.turn()

    def _on_jump(self, jump: Any) -> None:
        if self._running is not None:
            self._running.buffer.clear()
            reason = f"the clock was set by {jump.delta.nanoseconds * 1e-9:.3f} s: starting anew"
            self._running.control.jump(reason)
            self.get_logger().warning(reason)

    def _publish_diagnostics(self) -> None:
        running = self._running
        statuses = [describe_state(self._label, self._problem, running)]
        if running is not None:
            statuses += describe_running(running, self._reporter.counts.snapshot(), self._clock_pair)
        hardware = running.contract.robot if running else ""
        stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array(self.get_name(), hardware, statuses, stamp))


def run(node: VlaNode, executor: Any) -> None:
    """Spin until `node.stop_requested`, with spin_once: spin() was seen not to return on shutdown. For a process that
    is the node's own."""
    node.before_motion = set_aside
    executor.add_node(node)
    if node.autostart and not node.stop_requested.is_set():
        node.start()
    while not node.stop_requested.is_set():
        node.spin_guarded(executor)
    executor.remove_node(node)
    executor.shutdown()


def _come_first(node: VlaNode) -> None:
    """Let this thread, and the executor's that it starts, run as soon as a tick is due."""
    priority = int(node.get_parameter("realtime_priority").value)
    refused = ask_for_realtime(priority) if priority else ""
    if refused:
        node.get_logger().warning(
            f"parameter 'realtime_priority': {priority} is refused ({refused}); give the user an rtprio limit of "
            f"{priority} in /etc/security/limits.conf, or set 0"
        )
    if refused or not priority:
        ask_for_short_slice()


def main(args: Sequence[str] | None = None, *, policy_loader: Callable[..., Any] = load_policy) -> int:
    """Run the node until SIGINT, SIGTERM or a shutdown transition.

    Exit status 0; 1 if it cannot start; EXIT_STATUS when the failsafe gave the process up.
    """
    keep_heap()  # half of what receiving an image costs
    # rclpy's own handlers would take the context away before the last hold is published.
    stop = stop_on_signals()
    rclpy.init(args=list(args) if args is not None else None, signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = VlaNode(policy_loader=policy_loader, stop=stop)
    except Exception as error:
        print(f"vla_node: cannot start: {describe(error)}", file=sys.stderr)
        rclpy.try_shutdown()
        return 1
    # Inference would otherwise keep a control tick waiting: in Python code for 5 ms, in the engine for a slice.
    sys.setswitchinterval(0.0005)
    _come_first(node)
    run(node, make_executor())
    node.close()
    rclpy.try_shutdown()
    ignore_signals()  # the interpreter gives back its handlers before it is gone
    if node.thread_left:
        # A thread inside the engine cannot be ended, and the interpreter must not go away under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(node.exit_status)
    return node.exit_status


if __name__ == "__main__":
    sys.exit(main())
