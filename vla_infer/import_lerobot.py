"""`vla-infer import-lerobot`: a LeRobot dataset as a rosbag2 recording, so that it can be replayed."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from vla_infer.errors import ReplayError

if TYPE_CHECKING:
    from vla_infer.contract import CommandSink, Contract, StateSource
    from vla_infer.replay.lerobot import Dataset, FloatArray

START = 1_700_000_000_000_000_000  # ns, stamp of the first row
_PAUSE = 1.0  # s between two episodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="directory of the dataset (v2.1 or v3.0)")
    parser.add_argument("out", type=Path, help="the recording to write, such as out.mcap; must not exist")
    parser.add_argument(
        "--episode", type=int, nargs="+", default=[0], help="episodes, one after the other (0)"
    )
    parser.add_argument(
        "--contract", help="contract of the robot; default: one is written beside the recording"
    )


def main(args: argparse.Namespace) -> int:
    from vla_infer.contract import load_contract
    from vla_infer.replay.lerobot import Dataset

    if args.out.exists():
        raise ReplayError(f"{args.out}: exists already; remove it or name another file")
    dataset = Dataset(args.dataset)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    name = args.contract
    if name is None:
        path = args.out.with_suffix(".yaml")
        if path.exists():
            raise ReplayError(f"{path}: exists already; name it with --contract, or remove it")
        path.write_text(contract_text(dataset), encoding="utf-8")
        name = str(path)
    contract = load_contract(name)
    check_fit(dataset, contract)
    count = write(dataset, contract, args.episode, args.out)
    print(
        f"{args.out}: {len(args.episode)} episodes, {count} rows, {len(contract.cameras)} cameras; contract {name}"
    )
    return 0


def contract_text(dataset: Dataset) -> str:
    """A contract for replaying: numbers as they are in the dataset, so units are the policy's."""
    document = {
        "robot": dataset.root.resolve().name,
        "cameras": {
            name: {"topic": f"{name.removeprefix('observation.images.').replace('.', '_')}/image_raw"}
            for name in dataset.cameras
        },
        "state": {"topic": "joint_states", "joints": list(dataset.state_names)},
        "instruction": {"topic": "instruction"},
        "command": {
            "topic": "commands",
            "type": "Float64MultiArray",
            "joints": list(dataset.action_names),
        },
        "policy_rate": dataset.fps,
    }
    head = "# For replaying a recording made from a LeRobot dataset. It has no limits: not for a robot.\n"
    return head + str(yaml.safe_dump(document, sort_keys=False))


def check_fit(dataset: Dataset, contract: Contract) -> None:
    """Raise ReplayError where a contract's sizes or cameras are not the dataset's."""
    for what, ours, theirs in (
        ("state", contract.state_dim, len(dataset.state_names)),
        ("action", contract.action_dim, len(dataset.action_names)),
    ):
        if ours != theirs:
            raise ReplayError(f"{contract.path}: {what} has {ours} numbers, the dataset's {theirs}")
    for camera in contract.cameras:
        if camera.feature not in dataset.cameras:
            raise ReplayError(
                f"{contract.path}: cameras.{camera.feature}: the dataset has {', '.join(dataset.cameras)}"
            )


Row = tuple[int, str, str, bytes]


def write(dataset: Dataset, contract: Contract, episodes: list[int], out: Path) -> int:
    """Write the recording; the count of dataset rows. A file for .mcap and .db3, else a folder."""
    from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

    maker = _Maker(contract)
    plugin = StoragePlugin.SQLITE3 if out.suffix == ".db3" else StoragePlugin.MCAP
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch) / "bag"
        writer = Writer(folder, version=9, storage_plugin=plugin)
        if plugin is StoragePlugin.MCAP:
            # By chunk, so that the file can be read without the metadata beside it.
            writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        with writer:
            connections: dict[str, Any] = {}
            for when, topic, kind, data in maker.rows(dataset, episodes):
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, kind, typestore=maker.store)
                writer.write(connections[topic], when, data)
        if out.suffix in (".mcap", ".db3"):
            shutil.move(next(folder.glob(f"*{out.suffix}")), out)
        else:
            shutil.move(folder, out)
    return maker.count


class _Maker:
    """Messages of a contract's types out of a dataset's numbers."""

    def __init__(self, contract: Contract) -> None:
        from rosbags.typesys import Stores, get_typestore

        self.store = get_typestore(Stores.ROS2_JAZZY)
        self._types: dict[str, Any] = self.store.types
        self._contract = contract
        self.count = 0

    def rows(self, dataset: Dataset, episodes: list[int]) -> Iterator[Row]:
        start = START
        for episode in episodes:
            task, steps = dataset.steps(episode)
            stamp = start
            kind = "std_msgs/msg/String"
            if task:
                yield stamp, _absolute(self._contract.instruction.topic), kind, self._cdr(kind, task)
            for step in steps:
                stamp = start + round(step.time * 1e9)
                yield from self._states(stamp, step.state)
                yield from self._commands(stamp, step.action)
                for camera in self._contract.cameras:
                    data = self._image(camera.type, stamp, step.images[camera.feature])
                    yield stamp, _absolute(camera.topic), camera.type, data
                self.count += 1
            start = stamp + round(_PAUSE * 1e9)

    def _cdr(self, kind: str, *fields: Any) -> bytes:
        return bytes(self.store.serialize_cdr(self._types[kind](*fields), kind))

    def _header(self, stamp: int, frame: str = "") -> Any:
        time = self._types["builtin_interfaces/msg/Time"](*divmod(stamp, 1_000_000_000))
        return self._types["std_msgs/msg/Header"](time, frame)

    def _image(self, kind: str, stamp: int, image: Any) -> bytes:
        if kind.endswith("CompressedImage"):
            import cv2

            done, stream = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
            if not done:
                raise ReplayError(f"an image of shape {image.shape} cannot be encoded as PNG")
            return self._cdr(kind, self._header(stamp), "png", stream.reshape(-1))
        height, width = image.shape[:2]
        pixels = np.ascontiguousarray(image).reshape(-1)
        return self._cdr(kind, self._header(stamp), height, width, "rgb8", 0, 3 * width, pixels)

    def _states(self, stamp: int, state: FloatArray) -> Iterator[Row]:
        at, kind = 0, "sensor_msgs/msg/JointState"
        for source in self._contract.states:
            part = state[at : at + source.size]
            at += source.size
            fields = _fields(source, part)
            yield (
                stamp,
                _absolute(source.topic),
                kind,
                self._cdr(kind, self._header(stamp), list(source.joints), *fields),
            )

    def _commands(self, stamp: int, action: FloatArray) -> Iterator[Row]:
        at = 0
        for sink in self._contract.commands:
            values = sink.units.to_ros(action[at : at + sink.size])
            at += sink.size
            yield stamp, _absolute(sink.topic), sink.type, self._command(sink, stamp, values)

    def _command(self, sink: CommandSink, stamp: int, values: FloatArray) -> bytes:
        types, empty = self._types, np.empty(0)
        kind = sink.type.rsplit("/", 1)[-1]
        if kind == "Float64MultiArray":
            return self._cdr(sink.type, types["std_msgs/msg/MultiArrayLayout"]([], 0), values)
        if kind == "JointState":
            parts = [values if sink.interface == f else empty for f in ("position", "velocity", "effort")]
            return self._cdr(sink.type, self._header(stamp, sink.frame_id), list(sink.joints), *parts)
        if kind == "JointTrajectory":
            soon = types["builtin_interfaces/msg/Duration"](0, round(1e9 / self._contract.control_rate))
            point = types["trajectory_msgs/msg/JointTrajectoryPoint"](values, empty, empty, empty, soon)
            return self._cdr(sink.type, self._header(stamp, sink.frame_id), list(sink.joints), [point])
        axes = dict(zip(sink.joints, values, strict=True))
        linear, angular = (
            types["geometry_msgs/msg/Vector3"](*(float(axes.get(f"{part}.{axis}", 0.0)) for axis in "xyz"))
            for part in ("linear", "angular")
        )
        twist = types["geometry_msgs/msg/Twist"](linear, angular)
        if kind == "Twist":
            return bytes(self.store.serialize_cdr(twist, sink.type))
        return self._cdr(sink.type, self._header(stamp, sink.frame_id), twist)


def _fields(source: StateSource, part: FloatArray) -> list[FloatArray]:
    """Position, velocity and effort of a JointState for a part of the policy's state."""
    found = []
    size = len(source.joints)
    for field in ("position", "velocity", "effort"):
        if field not in source.fields:
            found.append(np.empty(0))
            continue
        at = source.fields.index(field) * size
        values = part[at : at + size]
        if field == "position":
            values = source.units.to_ros(values)
        elif field == "velocity":
            values = values / np.asarray(source.units.scale)
        found.append(np.asarray(values, np.float64))
    return found


def _absolute(topic: str) -> str:
    return "/" + topic.lstrip("/")
