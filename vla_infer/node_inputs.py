"""Subscriptions of vla_node: check the header, keep the newest, return. Decoding is the inference thread's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from .codecs import CODECS, message_class, stamp_ns
from .codecs_image import check_compressed, check_image
from .contract import Camera, Contract, StateSource
from .errors import ObservationError
from .frame import FrameBuffer
from .instruction import check_allowed, clean_instruction
from .node_support import NodeClock, Reporter
from .stats import Window

_CHECKS = {"sensor_msgs/msg/Image": check_image, "sensor_msgs/msg/CompressedImage": check_compressed}


def input_qos(*, reliable: bool, depth: int) -> QoSProfile:
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.VOLATILE,
    )


class InstructionSlot:
    """The instruction in force: the last valid one, by topic or parameter, else the default; empty for none.

    `current` is replaced whole, so that any thread may read it: the text and its generation, which grows
    with every change.
    """

    def __init__(self, default: str, *, allowed: tuple[str, ...] = ()) -> None:
        self.current = (default, 0)
        self.running = True  # the run switch; False holds whatever the instruction says
        self._allowed = allowed

    @property
    def text(self) -> str:
        return self.current[0]

    def put(self, text: str) -> bool:
        """Take an instruction; False for one that is empty. Raises ObservationError for what is no text
        or is not allowed."""
        cleaned = clean_instruction(text).strip()
        if not cleaned:
            return False
        check_allowed(cleaned, self._allowed)
        if cleaned != self.current[0]:
            self.current = (cleaned, self.current[1] + 1)
        return True


class Inputs:
    """All subscriptions of one contract. `arrived` is called after each message that was kept."""

    def __init__(
        self,
        node: Any,
        contract: Contract,
        buffer: FrameBuffer,
        slot: InstructionSlot,
        *,
        clock: NodeClock,
        reporter: Reporter,
        arrived: Callable[[], None],
    ) -> None:
        self._node = node
        self._buffer = buffer
        self._slot = slot
        self._clock = clock
        self._reporter = reporter
        self._arrived = arrived
        self.image_age = Window()  # s from stamp to callback
        self.refusals: dict[str, str] = {}  # topic -> why its last refused message was refused
        self._subscriptions: list[Any] = []
        try:
            self._subscribe_all(contract)
        except Exception:
            self.destroy()
            raise

    def _subscribe_all(self, contract: Contract) -> None:
        for camera in contract.cameras:
            qos = input_qos(reliable=camera.reliable, depth=camera.depth)
            self._subscribe(camera.type, camera.topic, partial(self._on_image, camera), qos)
        for index, source in enumerate(contract.states):
            qos = input_qos(reliable=source.reliable, depth=10)
            self._subscribe(
                "sensor_msgs/msg/JointState", source.topic, partial(self._on_state, index, source), qos
            )
        topic = contract.instruction.topic
        self._subscribe(
            "std_msgs/msg/String", topic, self._on_instruction, input_qos(reliable=True, depth=10)
        )

    def destroy(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _subscribe(self, kind: str, topic: str, callback: Callable[[Any], None], qos: QoSProfile) -> None:
        def receive(message: Any) -> None:
            self._reporter.counts.add(f"received {topic}")
            try:
                callback(message)
            except ObservationError as error:
                self._reporter.counts.add(f"rejected {topic}")
                self.refusals[topic] = str(error)
                self._reporter.warn(f"rejected {topic}", f"{topic}: {error}; message ignored")

        guarded = self._reporter.guarded(topic, receive)
        self._subscriptions.append(self._node.create_subscription(message_class(kind), topic, guarded, qos))

    def _on_image(self, camera: Camera, message: Any) -> None:
        now = self._clock.now()
        stamp = now.ros if camera.receipt_stamp else stamp_ns(message)
        self.image_age.add((now.ros - stamp) * 1e-9)
        if self._reporter.observer is not None:
            self._reporter.observer.received(camera.topic, stamp, now)
        _CHECKS[camera.type](message)
        self._buffer.add_image(camera.feature, message, stamp, now)
        self._arrived()

    def _on_state(self, index: int, source: StateSource, message: Any) -> None:
        now = self._clock.now()
        sample = CODECS["sensor_msgs/msg/JointState"].decode(message)
        self._buffer.add_state(index, sample, now.ros if source.receipt_stamp else stamp_ns(message), now)
        self._arrived()

    def _on_instruction(self, message: Any) -> None:
        if not self._slot.put(CODECS["std_msgs/msg/String"].decode(message)):
            raise ObservationError("the instruction is empty; the one in force stays")
        self._reporter.info(f"instruction: '{self._slot.text}'")
        self._arrived()
