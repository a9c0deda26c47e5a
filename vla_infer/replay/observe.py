"""A recording's messages to observations, by the same contract and frame buffer as the node's, without ROS."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from vla_infer.codecs import CODECS, stamp_ns
from vla_infer.codecs_image import check_compressed, check_image
from vla_infer.contract import Camera, Contract, StateSource
from vla_infer.contract_parse import nearest
from vla_infer.errors import ObservationError, ReplayError
from vla_infer.frame import FrameBuffer, Now
from vla_infer.instruction import check_allowed, clean_instruction

from .bag import STAMPED, Bag, BagMessage, Decoder, header_stamp, resolve_topic, with_stamp

_CHECKS: dict[str, Callable[[Any], None]] = {
    "sensor_msgs/msg/Image": check_image,
    "sensor_msgs/msg/CompressedImage": check_compressed,
}
_JOINT_STATE, _STRING = "sensor_msgs/msg/JointState", "std_msgs/msg/String"
_SAMPLE = 500  # messages that are looked at to compare stamps with the recorder's clock
_DELAYS = (-0.05, 1.0)  # s from stamp to arrival that a live robot can have


@dataclass(frozen=True)
class TopicMap:
    """The bag's topics of one contract: bag topic -> what it feeds, and the type of each."""

    cameras: dict[str, Camera]
    states: dict[str, int]
    instruction: str | None
    commands: dict[str, int]  # index into contract.commands: what was sent when the bag was recorded
    types: dict[str, str]

    @property
    def inputs(self) -> tuple[str, ...]:
        extra = (self.instruction,) if self.instruction else ()
        return (*self.cameras, *self.states, *extra)


def map_topics(bag: Bag, contract: Contract, remaps: dict[str, str]) -> TopicMap:
    """Find every input of the contract in the bag. Raises ReplayError for one that is missing."""
    known = [camera.topic for camera in contract.cameras] + [source.topic for source in contract.states]
    known += [contract.instruction.topic, *(sink.topic for sink in contract.commands)]
    for topic in remaps:
        if topic not in known:
            raise ReplayError(f"--remap {topic}: the contract has no such topic; {nearest(topic, known)}")
    cameras: dict[str, Camera] = {}
    states: dict[str, int] = {}
    types: dict[str, str] = {}
    for camera in contract.cameras:
        found = resolve_topic(bag, camera.topic, camera.type, remaps)
        if found is not None:
            cameras[found], types[found] = camera, camera.type
        elif camera.feature not in contract.allow_missing_cameras:
            raise _missing(bag, camera.topic, camera.type)
    for index, source in enumerate(contract.states):
        found = resolve_topic(bag, source.topic, _JOINT_STATE, remaps)
        if found is None:
            raise _missing(bag, source.topic, _JOINT_STATE)
        states[found], types[found] = index, _JOINT_STATE
    instruction = resolve_topic(bag, contract.instruction.topic, _STRING, remaps)
    if instruction is not None:
        types[instruction] = _STRING
    commands: dict[str, int] = {}
    for index, sink in enumerate(contract.commands):
        found = resolve_topic(bag, sink.topic, sink.type, remaps)
        if found is not None:
            commands[found], types[found] = index, sink.type
    return TopicMap(cameras, states, instruction, commands, types)


def _missing(bag: Bag, topic: str, kind: str) -> ReplayError:
    of_kind = [name for name, info in bag.topics.items() if info.type == kind] or list(bag.topics)
    return ReplayError(
        f"{bag.path}: no topic {topic} ({kind}), which the contract needs; the bag has "
        f"{', '.join(of_kind[:6])}; name it with --remap {topic}:=TOPIC"
    )


class Stamps:
    """Where a replayed message's stamp lies relative to its arrival, topic by topic.

    `recorded` keeps the delay between stamp and arrival that the bag has. Where stamps come from another
    clock than the recorder's (the median delay is no delay a live robot can have), the arrival is taken.
    """

    def __init__(self, bag: Bag, topics: TopicMap) -> None:
        delays: dict[str, list[int]] = {}
        stamped = [topic for topic in topics.inputs if topics.types[topic] in STAMPED]
        for message in islice(bag.messages(stamped), _SAMPLE):
            delay = bag.start + message.time - header_stamp(message.data)
            delays.setdefault(message.topic, []).append(delay)
        self.replaced = tuple(
            topic
            for topic, values in delays.items()
            if not _DELAYS[0] <= float(np.median(values)) * 1e-9 <= _DELAYS[1]
        )
        self._kept = frozenset(delays) - frozenset(self.replaced)
        self._stamped = frozenset(stamped)
        self._start = bag.start

    def stamp(self, message: BagMessage) -> int:
        """ns since the bag's start."""
        if message.topic in self._kept:
            return header_stamp(message.data) - self._start
        return message.time

    def moved(self, message: BagMessage, offset: int) -> bytes:
        """The serialized message with its stamp at `offset` (ns) later than bag time."""
        if message.topic not in self._stamped:
            return message.data
        return with_stamp(message.data, max(0, self.stamp(message) + offset))


class Feeder:
    """Gives messages to a FrameBuffer as the node's subscriptions do; counts what is refused."""

    def __init__(
        self, contract: Contract, topics: TopicMap, buffer: FrameBuffer, *, instruction: str
    ) -> None:
        self._buffer = buffer
        self._contract = contract
        self._decode = Decoder()
        self.generation = 0  # grows with every new instruction
        self.instruction = clean_instruction(instruction).strip() or contract.instruction.default
        self.rejected: Counter[str] = Counter()
        self.reordered: Counter[str] = Counter()
        self.last_error = ""
        self._newest: dict[str, int] = {}
        self._handlers: dict[str, Callable[[Any, Now], None]] = {}
        for topic, camera in topics.cameras.items():
            self._handlers[topic] = partial(self._image, camera)
        for topic, index in topics.states.items():
            self._handlers[topic] = partial(self._state, index, contract.states[index])
        if topics.instruction:
            self._handlers[topics.instruction] = self._instruct
        self._types = topics.types

    def feed(self, topic: str, data: bytes, now: Now) -> bool:
        """Take one serialized message; False when it was refused, the reason being in `last_error`."""
        try:
            if self._types[topic] in STAMPED:
                stamp = header_stamp(data)
                self.reordered[topic] += stamp < self._newest.get(topic, stamp)
                self._newest[topic] = max(stamp, self._newest.get(topic, stamp))
            self._handlers[topic](self._decode(data, self._types[topic]), now)
        except (ObservationError, ReplayError) as error:
            self.rejected[topic] += 1
            self.last_error = f"{topic}: {error}"
            return False
        return True

    def _image(self, camera: Camera, message: Any, now: Now) -> None:
        stamp = now.ros if camera.receipt_stamp else stamp_ns(message)
        _CHECKS[camera.type](message)
        self._buffer.add_image(camera.feature, message, stamp, now)

    def _state(self, index: int, source: StateSource, message: Any, now: Now) -> None:
        sample = CODECS[_JOINT_STATE].decode(message)
        stamp = now.ros if source.receipt_stamp else stamp_ns(message)
        self._buffer.add_state(index, sample, stamp, now)

    def _instruct(self, message: Any, now: Now) -> None:
        text = clean_instruction(CODECS[_STRING].decode(message)).strip()
        if not text:
            raise ObservationError("the instruction is empty; the one in force stays")
        check_allowed(text, self._contract.instruction.allowed)
        if text != self.instruction:
            self.instruction = text
            self.generation += 1
