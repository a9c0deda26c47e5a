"""rosbag2 recordings (mcap, sqlite3, compressed or not) as a stream of serialized messages.

Nothing larger than one storage chunk is in memory at a time: a bag of any size can be iterated. `Preload`
reads ahead into a buffer of fixed size, so that whoever publishes never waits for the disk.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from rosbags.interfaces import ConnectionExtRosbag2
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_typestore

from vla_infer.contract import COMMAND_TYPES, IMAGE_TYPES
from vla_infer.contract_parse import nearest, one_line
from vla_infer.errors import ReplayError

# Types of a contract whose first field is std_msgs/Header.
STAMPED = frozenset(
    {
        *IMAGE_TYPES,
        *(t for t in COMMAND_TYPES if t.endswith(("JointState", "JointTrajectory", "TwistStamped"))),
    }
)
_STAMP_OFFSET = 4  # bytes of the encapsulation before the header's stamp (CDR)
DEFAULT_BUFFER = 256 << 20  # bytes


class BagMessage(NamedTuple):
    """time: ns since the bag's start, of its arrival at the recorder; data: as serialized, in CDR."""

    time: int
    topic: str
    data: bytes


@dataclass(frozen=True)
class TopicInfo:
    """What a bag says of one topic. qos: a rosbags Qos as its publisher offered it, where recorded."""

    type: str
    count: int
    qos: Any


class Bag:
    """One rosbag2 recording: a folder with metadata.yaml, or a single .mcap or .db3 file.

    Raises ReplayError, on one line, for what is missing, damaged or empty.
    """

    def __init__(self, path: str | Path) -> None:
        given = Path(path)
        # A file of a compressed recording cannot be read without the metadata beside it.
        inside = given.is_file() and (given.parent / "metadata.yaml").is_file()
        if given.suffix in (".zstd", ".yaml") or inside:
            given = given.parent
        self.path = given
        self.topics: dict[str, TopicInfo] = {}
        with self._reading(), Reader(given) as reader:
            self.start = reader.start_time  # ns, log time of the first message
            self.duration = reader.duration  # ns
            self.count = reader.message_count
            for connection in reader.connections:
                extra = connection.ext
                offered = extra.offered_qos_profiles if isinstance(extra, ConnectionExtRosbag2) else []
                known = self.topics.get(connection.topic)
                self.topics[connection.topic] = TopicInfo(
                    connection.msgtype,
                    connection.msgcount + (known.count if known else 0),
                    offered[0] if offered else None,
                )
        if not self.count:
            raise ReplayError(f"{self.path}: the bag has no messages; record it anew")

    def messages(self, topics: Collection[str]) -> Iterator[BagMessage]:
        """The messages of `topics`, file by file in order of time."""
        with self._reading(), Reader(self.path) as reader:
            wanted = [connection for connection in reader.connections if connection.topic in topics]
            for connection, stamp, data in reader.messages(wanted) if wanted else ():
                yield BagMessage(stamp - self.start, connection.topic, bytes(data))

    def files(self) -> list[Path]:
        """The files that hold messages."""
        if self.path.is_file():
            return [self.path]
        kinds = (".mcap", ".db3", ".zstd")
        return sorted(file for file in self.path.iterdir() if file.suffix in kinds)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.files())

    def digest(self) -> str:
        """SHA-256 over every topic's messages and their times: the same however a recording is stored."""
        topics = {topic: hashlib.sha256() for topic in self.topics}
        for message in self.messages(tuple(self.topics)):
            topics[message.topic].update(struct.pack("<qQ", message.time, len(message.data)))
            topics[message.topic].update(message.data)
        total = hashlib.sha256()
        for topic, digest in sorted(topics.items()):
            total.update(f"{topic}\n{self.topics[topic].type}\n".encode() + digest.digest())
        return total.hexdigest()

    def _reading(self) -> _Reading:
        return _Reading(self.path)


class _Reading:
    """Turns whatever a damaged file makes the reader raise into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ReplayError):
            reason = one_line(error, limit=200)
            raise ReplayError(
                f"{self._path}: not a readable rosbag2 recording ({reason}); expected a folder with "
                "metadata.yaml, or a .mcap or .db3 file"
            ) from error


class Decoder:
    """Serialized messages to objects with the fields of their ROS type, without ROS."""

    def __init__(self) -> None:
        self._store = get_typestore(Stores.ROS2_JAZZY)

    def __call__(self, data: bytes, kind: str) -> Any:
        try:
            return self._store.deserialize_cdr(data, kind)
        except Exception as error:
            reason = one_line(error, limit=120)
            raise ReplayError(f"a message of {len(data)} bytes is no valid {kind} ({reason})") from error


def header_stamp(data: bytes) -> int:
    """header.stamp (ns) of a serialized message whose first field is a header. Raises ReplayError."""
    if len(data) < _STAMP_OFFSET + 8:
        raise ReplayError(f"a message of {len(data)} bytes is too short for a header; the bag is damaged")
    order = "<" if data[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(order + "iI", data, _STAMP_OFFSET)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def with_stamp(data: bytes, stamp: int) -> bytes:
    """The same serialized message with another header.stamp (ns)."""
    order = "<" if data[1] & 1 else ">"
    fresh = struct.pack(order + "iI", *divmod(stamp, 1_000_000_000))
    return b"".join((data[:_STAMP_OFFSET], fresh, data[_STAMP_OFFSET + len(fresh) :]))


def resolve_topic(bag: Bag, topic: str, kind: str, remaps: dict[str, str]) -> str | None:
    """The bag's topic for a contract's, None when it has none. Raises ReplayError for another type."""
    wanted = remaps.get(topic, topic)
    found = next((name for name in (wanted, "/" + wanted.lstrip("/")) if name in bag.topics), None)
    if found is None:
        if topic in remaps:
            raise ReplayError(
                f"{bag.path}: --remap {topic}:={wanted}: no such topic; {nearest(wanted, bag.topics)}"
            )
        return None
    if bag.topics[found].type != kind:
        raise ReplayError(
            f"{bag.path}: {found} is {bag.topics[found].type}, the contract expects {kind}; "
            "change `type` in the contract"
        )
    return found


Item = TypeVar("Item")


class Preload(Generic[Item]):
    """Reads ahead of its consumer in a thread of its own, holding at most `limit` bytes.

    The consumer sees the items in order; `waits` counts those that were not there in time. One item larger
    than `limit` is still read, alone. size: bytes of an item.
    """

    def __init__(
        self, items: Iterable[Item], size: Callable[[Item], int], *, limit: int = DEFAULT_BUFFER
    ) -> None:
        self._source = iter(items)
        self._size = size
        self._limit = limit
        self._queue: deque[Item] = deque()
        self._held = 0
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self.waits = 0
        self.peak = 0  # bytes, most that was held
        self._thread = threading.Thread(target=self._read, name="bag_reader", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for item in self._source:
                size = self._size(item)
                with self._changed:
                    while self._queue and self._held + size > self._limit and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
                    self._queue.append(item)
                    self._held += size
                    self.peak = max(self.peak, self._held)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def fill(self, *, timeout: float = 60.0) -> None:
        """Wait until the buffer is full or the bag is read."""
        end = time.monotonic() + timeout
        with self._changed:
            while not self._ended and self._held < 0.9 * self._limit and time.monotonic() < end:
                self._changed.wait(0.05)

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                if not self._queue and not self._ended:
                    self.waits += 1
                    while not self._queue and not self._ended:
                        self._changed.wait()
                if not self._queue:
                    if self._error is not None:
                        raise self._error
                    return
                item = self._queue.popleft()
                self._held -= self._size(item)
                self._changed.notify_all()
            yield item

    def close(self) -> None:
        """Stop reading; what is buffered is dropped."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join()
