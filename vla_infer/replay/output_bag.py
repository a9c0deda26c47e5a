"""The output bag of a live replay: what was sent, what came back, and which observation each command is from.

    <command topic>                   the commands, at the time of receipt
    /replay/sent<camera topic>        std_msgs/Header: the stamp of an image, at the time it was sent
    /replay/chunk                     std_msgs/Header: an observation's stamp, at the time its chunk was there
    /replay/command                   std_msgs/Header: at each control tick that sent a command, the stamp of the
                                      observation behind it; zero when held

`frame_id` is the observation's number. All are standard types, so any tool for bags can recount a report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer, WriterError
from rosbags.typesys import Stores, get_typestore

from vla_infer.contract import DRY_SUFFIX, Contract
from vla_infer.errors import ReplayError

_HEADER = "std_msgs/msg/Header"


def write_output(
    path: Path,
    arrays: dict[str, Any],
    sent: dict[str, Any],
    commands: list[tuple[int, str, bytes]],
    contract: Contract,
) -> None:
    """Write the bag to the folder `path`, which must not exist. Raises ReplayError."""
    store = get_typestore(Stores.ROS2_JAZZY)

    def header(stamp: int, name: str) -> bytes:
        seconds, nanoseconds = divmod(int(stamp), 1_000_000_000)
        time = store.types["builtin_interfaces/msg/Time"](seconds, nanoseconds)
        return bytes(store.serialize_cdr(store.types[_HEADER](time, name), _HEADER))

    rows: list[tuple[int, str, str, bytes]] = []
    kinds = {sink.topic + DRY_SUFFIX: sink.type for sink in contract.commands}
    rows += [(when, _absolute(topic), kinds[topic], data) for when, topic, data in commands]
    for topic, one in sent.items():
        for stamp, when in zip(one.stamps, one.times, strict=True):
            rows.append((when, f"/replay/sent{topic}", _HEADER, header(stamp, topic)))
    stamps: dict[int, int] = {}
    for row, (stamp, taken) in zip(arrays["inferences"], arrays["stamps"], strict=True):
        stamps[int(row[0])] = int(stamp)
        ready = int(taken) + round(float(row[3]) * 1e9)
        rows.append((ready, "/replay/chunk", _HEADER, header(stamp, str(int(row[0])))))
    was_sent = np.isfinite(arrays["values"]).any(axis=1)
    for tick, when, is_sent in zip(arrays["ticks"], arrays["tick_times"], was_sent, strict=True):
        if is_sent:
            chunk = int(tick[2])
            data = header(stamps.get(chunk, 0), str(chunk) if chunk >= 0 else "held")
            rows.append((int(when), "/replay/command", _HEADER, data))
    try:
        writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
    except WriterError as error:
        raise ReplayError(f"--record {path}: {error}; name a folder that does not exist") from error
    with writer:
        connections: dict[str, Any] = {}
        for when, topic, kind, data in sorted(rows, key=lambda row: row[0]):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=store)
            writer.write(connections[topic], when, data)


def _absolute(topic: str) -> str:
    return "/" + topic.lstrip("/")
