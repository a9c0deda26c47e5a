"""How far a policy's actions are from those recorded in the bag (open loop), per joint and per step.

Row i of a chunk is compared with what was recorded at the observation's stamp plus i periods, in policy
units. Where the bag has no command topic, the joint positions that the robot reached stand in for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.codecs import CODECS, COMMAND_CODECS
from vla_infer.contract import CommandSink, Contract
from vla_infer.errors import ObservationError, ReplayError

from .bag import Bag, Decoder
from .observe import Stamps, TopicMap
from .trace import FloatArray, Inference, Trace

_JOINT_STATE = "sensor_msgs/msg/JointState"


@dataclass(frozen=True, eq=False)
class Recorded:
    """What was recorded. source: "commands" or "states"; per number of the action its times (s, bag time)
    and values (policy units), empty where the bag has none."""

    source: str
    names: tuple[str, ...]
    times: tuple[FloatArray, ...]
    values: tuple[FloatArray, ...]

    def at(self, joint: int, times: FloatArray) -> FloatArray:
        """Values at `times`, linear in between, NaN outside of what was recorded."""
        have = self.times[joint]
        if have.size < 2:
            return np.full(times.shape, np.nan)
        found: FloatArray = np.interp(times, have, self.values[joint], left=np.nan, right=np.nan)
        return found


def read_recorded(bag: Bag, contract: Contract, topics: TopicMap) -> Recorded | None:
    """The actions recorded in a bag; None where neither its commands nor its joint states tell."""
    names = tuple(joint for sink in contract.commands for joint in sink.joints)
    if topics.commands:
        columns = _commands(bag, contract, topics)
        source = "commands"
    else:
        columns = _states(bag, contract, topics)
        source = "states"
    if all(len(column) < 2 for column in columns):
        return None
    tables = [np.array(sorted(column), np.float64).reshape(-1, 2) for column in columns]
    return Recorded(source, names, tuple(t[:, 0] for t in tables), tuple(t[:, 1] for t in tables))


Column = list[tuple[float, float]]


def _commands(bag: Bag, contract: Contract, topics: TopicMap) -> list[Column]:
    columns: list[Column] = [[] for _ in range(contract.action_dim)]
    starts = np.cumsum([0, *(sink.size for sink in contract.commands)])
    decode = Decoder()
    for message in bag.messages(tuple(topics.commands)):
        index = topics.commands[message.topic]
        sink = contract.commands[index]
        try:
            value = COMMAND_CODECS[sink.type].decode(decode(message.data, sink.type))
        except (ObservationError, ReplayError):
            continue
        row = _in_order(sink, value.names, value.values[0])
        if row is None:
            continue
        for joint, number in enumerate(sink.units.to_policy(row)):
            columns[starts[index] + joint].append((message.time * 1e-9, float(number)))
    return columns


def _in_order(sink: CommandSink, names: tuple[str, ...], values: FloatArray) -> FloatArray | None:
    """The numbers of a recorded command in the contract's order; None where it has others."""
    if not names:
        return values if values.size == sink.size else None
    where = {name: index for index, name in enumerate(names)}
    if not all(joint in where for joint in sink.joints):
        return None
    picked: FloatArray = values[[where[joint] for joint in sink.joints]]
    return picked


def _states(bag: Bag, contract: Contract, topics: TopicMap) -> list[Column]:
    columns: list[Column] = []
    wanted: dict[str, tuple[int, CommandSink, int]] = {}
    for sink in contract.commands:
        for joint, name in enumerate(sink.joints):
            if sink.interface == "position":
                wanted[name] = (len(columns), sink, joint)
            columns.append([])
    decode, stamps = Decoder(), Stamps(bag, topics)
    for message in bag.messages(tuple(topics.states)):
        try:
            sample = CODECS[_JOINT_STATE].decode(decode(message.data, _JOINT_STATE))
            when = stamps.stamp(message) * 1e-9
        except (ObservationError, ReplayError):
            continue
        for index, name in enumerate(sample.names if sample.position is not None else ()):
            if name in wanted:
                column, sink, joint = wanted[name]
                number = sample.position[index] * sink.units.scale[joint] + sink.units.offset[joint]
                columns[column].append((when, float(number)))
    return columns


def recorded_chunk(recorded: Recorded, inference: Inference, policy_rate: float) -> FloatArray:
    """What was recorded for each row of a chunk: float64 (H, A), NaN where nothing was."""
    steps, width = inference.actions.shape
    times = inference.bag_time + np.arange(steps) / policy_rate
    return np.stack([recorded.at(joint, times) for joint in range(width)], axis=1)


def agreement(trace: Trace, recorded: Recorded | None) -> dict[str, Any] | None:
    """Errors of all chunks against what was recorded, in policy units; None where there is nothing.

    per joint: mean absolute and root mean square error, and the latter over the standard deviation of what
    was recorded, so that 1 is as good as always saying its mean; per step: mean absolute error of each joint.
    """
    if recorded is None or not trace.inferences:
        return None
    shape = trace.inferences[0].actions.shape
    total: FloatArray = np.zeros(shape)
    squares: FloatArray = np.zeros(shape)
    count: FloatArray = np.zeros(shape)
    for one in trace.inferences:
        error = one.actions.astype(np.float64) - recorded_chunk(recorded, one, trace.policy_rate)
        there = np.isfinite(error)
        error = np.where(there, error, 0.0)
        total += np.abs(error)
        squares += error**2
        count += there
    if not count.any():
        return None
    joints = {}
    for index, name in enumerate(recorded.names):
        number = count[:, index].sum()
        if not number:
            continue
        rmse = float(np.sqrt(squares[:, index].sum() / number))
        spread = float(np.std(recorded.values[index]))
        joints[name] = {
            "mae": _round(total[:, index].sum() / number),
            "rmse": _round(rmse),
            "rmse_over_std": _round(rmse / spread) if spread > 0 else None,
            "compared": int(number),
        }
    return {
        "source": recorded.source,
        "joints": joints,
        "mae_per_step": [
            [_round(total[i, j] / count[i, j]) if count[i, j] else None for j in range(count.shape[1])]
            for i in range(count.shape[0])
        ],
    }


def _round(value: npt.ArrayLike) -> float:
    return float(f"{float(np.asarray(value)):.6g}")


def open_loop_errors(trace: Trace, recorded: Recorded | None) -> FloatArray:
    """One number a chunk: root mean square error over the standard deviation of what was recorded, taken
    over all joints and steps that can be compared. Chunks with nothing to compare are left out."""
    if recorded is None:
        return np.zeros(0)
    spread = np.array([values.std() if values.size else 0.0 for values in recorded.values])
    spread[spread == 0] = np.nan
    found = []
    for one in trace.inferences:
        error = (one.actions - recorded_chunk(recorded, one, trace.policy_rate)) / spread
        if np.isfinite(error).any():
            found.append(float(np.sqrt(np.nanmean(error**2))))
    return np.array(found)
