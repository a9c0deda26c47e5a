"""The page's side of ROS: what it hears, and what it can ask of the node."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from ..codecs import CODECS, COMMAND_CODECS, message_class
from ..contract import DRY_SUFFIX, CommandSink, Contract, StateSource
from ..errors import ObservationError
from ..instruction import check_allowed, clean_instruction
from ..node_support import describe, make_executor
from .board import Board, Status
from .channels import Channels, Row
from .feed import Feed
from .pictures import picture

JOINT_RATE = 15.0  # Hz of the samples
STALE = 1.0  # s after which a number no longer counts as the present one
LINGER = 5.0  # s that the cameras' subscriptions outlast the last reader: a page that is loaded again
_REPORT = 1.0  # s at most between two documents


@dataclass(frozen=True)
class Look:
    """How pictures are made. rate: Hz for each camera; width: pixels, at most about so many."""

    rate: float
    width: int


class _Newest:
    """A subscription that nobody spins: `take` gives the newest message, and what came in between costs nothing
    in Python. Its node must never be given to an executor."""

    def __init__(self, node: Any, kind: str, topic: str) -> None:
        # Best effort hears every publisher; one message deep, the newest replaces what was not taken.
        qos = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        self.kind = kind
        self._node = node
        self._subscription = node.create_subscription(message_class(kind), topic, lambda _: None, qos)

    def take(self) -> Any:
        """The newest message, or None when there is none since the last call."""
        with self._subscription.handle:
            taken = self._subscription.handle.take_message(self._subscription.msg_type, False)  # noqa: FBT003
        return None if taken is None else taken[0]

    def destroy(self) -> None:
        self._node.destroy_subscription(self._subscription)


class RosSide:
    """Runs in a thread of its own from `start` to `close`; what it hears goes to `feed`.

    The node `vla_page` is spun; a second one, `vla_page_eyes`, is only asked, `JOINT_RATE` times a second, for the
    newest images, joint states and commands.
    """

    def __init__(
        self, context: Any, node: Any, *, contract: Contract, target: str, look: Look, feed: Feed
    ) -> None:
        self._node, self._contract, self._target, self._look, self._feed = node, contract, target, look, feed
        self._eyes = rclpy.create_node(
            "vla_page_eyes",
            context=context,
            namespace=node.get_namespace(),
            enable_rosout=False,
            start_parameter_services=False,
        )
        self.channels = Channels(contract)
        self._board = Board(target, contract.instruction.topic)
        self._cameras: list[_Newest] = []
        self._watched_at = -math.inf
        self._unreadable: dict[str, str] = {}  # topic -> why its last message could not be shown
        joint_state = "sensor_msgs/msg/JointState"
        self._states = [
            (source, _Newest(self._eyes, joint_state, source.topic)) for source in contract.states
        ]
        self._commands = [
            (sink, _Newest(self._eyes, sink.type, topic))
            for sink in contract.commands
            for topic in (sink.topic, sink.topic + DRY_SUFFIX)
        ]
        self._measured = Row(len(self.channels.all), stale=STALE)
        self._commanded = Row(len(self.channels.all), stale=STALE)
        self._reported = -math.inf
        self._changed = True
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        node.create_subscription(DiagnosticStatus, "simulation/status", self._on_simulation, 10)
        self._instruct = node.create_publisher(String, contract.instruction.topic, 10)
        self._press = node.create_publisher(Bool, "emergency_stop", 10)
        kinds = (("run", SetBool), ("emergency_stop", Trigger), ("reset_emergency_stop", Trigger))
        self._clients = {name: node.create_client(kind, f"{target}/{name}") for name, kind in kinds}
        self._clients["simulation"] = node.create_client(Trigger, "simulation/reset")
        self._clients["change_state"] = node.create_client(ChangeState, f"{target}/change_state")
        self._executor = make_executor(context)
        self._executor.add_node(node)
        self._stop = threading.Event()
        self.failed = ""  # why the thread ended by itself
        self.ended: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="page_ros", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(5.0)
        self._executor.remove_node(self._node)
        self._executor.shutdown()
        for newest in [*self._cameras, *(n for _, n in self._states), *(n for _, n in self._commands)]:
            newest.destroy()
        self._eyes.destroy_node()

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            self.failed = describe(error)
            self.ended()

    def _loop(self) -> None:
        joints_due = images_due = time.monotonic()
        while not self._stop.is_set():
            now = time.monotonic()
            wait = min(joints_due, images_due) - now
            if wait > 0:
                self._spin(wait)
                continue
            if now >= joints_due:
                joints_due = max(joints_due + 1 / JOINT_RATE, now)
                self._look_at_joints(now)
            if now >= images_due:
                images_due = max(images_due + 1 / self._look.rate, now)
                self._look_at_cameras(now)
            if self._changed or now > self._reported + _REPORT:
                self._changed, self._reported = False, now
                self._feed.put_document({**self._board.document(now), "unreadable": dict(self._unreadable)})
            self._feed.woken()

    def _spin(self, seconds: float) -> None:
        try:
            self._executor.spin_once(timeout_sec=seconds)
        except Exception as error:  # a message that rclpy itself cannot read
            self._node.get_logger().warning(f"executor: {describe(error)}", throttle_duration_sec=5.0)
            self._stop.wait(0.01)

    def _look_at_joints(self, now: float) -> None:
        for source, newest in self._states:

            def fill(message: Any, source: StateSource = source) -> None:
                sample = CODECS["sensor_msgs/msg/JointState"].decode(message)
                self._measured.take(partial(self.channels.measured, source, sample), now)

            self._show(source.topic, newest, fill)
        for sink, newest in self._commands:

            def follow(message: Any, sink: CommandSink = sink) -> None:
                setpoint = COMMAND_CODECS[sink.type].decode(message)
                self._commanded.take(partial(self.channels.commanded, sink, setpoint), now)

            self._show(sink.topic, newest, follow)
        self._feed.put_sample(now, self._measured.present(now), self._commanded.present(now))

    def _look_at_cameras(self, now: float) -> None:
        """Subscribed only while somebody looks: an image costs its sender and this machine most."""
        if self._feed.watched:
            self._watched_at = now
            if not self._cameras:
                self._cameras = [_Newest(self._eyes, c.type, c.topic) for c in self._contract.cameras]
        elif self._cameras and now > self._watched_at + LINGER:
            for newest in self._cameras:
                newest.destroy()
            self._cameras = []
        for index, (camera, newest) in enumerate(zip(self._contract.cameras, self._cameras, strict=False)):

            def encode(message: Any, index: int = index, kind: str = camera.type) -> None:
                self._feed.put_picture(index, picture(message, kind, width=self._look.width))

            self._show(camera.topic, newest, encode)

    def _show(self, topic: str, newest: _Newest, use: Callable[[Any], None]) -> None:
        """Take what is new; why it could not be shown is kept for the page, whatever it was."""
        try:
            message = newest.take()
            if message is None:
                return
            use(message)
        except Exception as error:
            self._unreadable[topic] = describe(error)
        else:
            self._unreadable.pop(topic, None)

    def _on_diagnostics(self, message: Any) -> None:
        statuses = {status.name: _status(status) for status in message.status}
        self._changed |= self._board.diagnostics(statuses, time.monotonic())

    def _on_simulation(self, message: Any) -> None:
        self._board.simulation(_status(message), time.monotonic())
        self._changed = True

    # What follows is called from the server's thread; publishing and calling are safe from any.

    def instruct(self, text: str) -> tuple[str, str]:
        """Publish an instruction by the rules that the node has. Returns it as sent, and what to tell the operator.

        Raises:
            ObservationError: the node would refuse it; it is not published.
        """
        cleaned = clean_instruction(text).strip()
        if not cleaned:
            raise ObservationError("the instruction is empty; the one in force stays")
        check_allowed(cleaned, self._contract.instruction.allowed)
        self._instruct.publish(String(data=cleaned))
        topic = self._instruct.topic_name
        if not self._instruct.get_subscription_count():
            return cleaned, f"sent, but nobody listens on {topic}"
        return cleaned, f"sent on {topic}"

    def press_emergency_stop(self) -> None:
        """By topic, which needs no answer; the service then confirms."""
        self._press.publish(Bool(data=True))

    def call(self, service: str, answer: Callable[[bool, str], None]) -> Callable[[], None]:
        """Ask one of `SERVICES`; `answer(success, message)` follows in the ROS thread, or never.

        Returns what to call when the answer is no longer wanted. Raises LookupError where there is no such service.
        """
        name, request = SERVICES[service]
        client = self._clients[name]
        if not client.service_is_ready():
            owner = "the simulation" if service == "new_scene" else self._target
            raise LookupError(f"{client.srv_name} is not there; is {owner} running?")
        future = client.call_async(request())

        def done(future: Any) -> None:
            if future.exception() is not None:
                answer(False, describe(future.exception()))  # noqa: FBT003
            elif future.result() is not None:
                result = future.result()
                answer(bool(result.success), getattr(result, "message", ""))

        future.add_done_callback(done)
        return lambda: client.remove_pending_request(future)


SERVICES: dict[str, tuple[str, Callable[[], Any]]] = {
    "run": ("run", lambda: SetBool.Request(data=True)),
    "hold": ("run", lambda: SetBool.Request(data=False)),
    "emergency_stop": ("emergency_stop", Trigger.Request),
    "reset": ("reset_emergency_stop", Trigger.Request),
    "new_scene": ("simulation", Trigger.Request),
    "activate": (
        "change_state",
        lambda: ChangeState.Request(transition=Transition(id=Transition.TRANSITION_ACTIVATE)),
    ),
}


def start_ros(arguments: list[str]) -> tuple[Any, Any]:
    """A context and the node `vla_page`. Signals stay this process's own."""
    context = rclpy.Context()
    rclpy.init(args=arguments, context=context, signal_handler_options=SignalHandlerOptions.NO)
    return context, rclpy.create_node("vla_page", context=context)


def _status(status: Any) -> Status:
    severity = status.level[0] if isinstance(status.level, bytes) else int(status.level)
    return Status(severity, status.message, {item.key: item.value for item in status.values})
