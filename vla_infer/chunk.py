"""An action chunk with the instant of the observation it came from, in policy and in ROS units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .contract import CommandSink, Contract
from .errors import EngineError
from .frame import Frame


@dataclass(frozen=True, eq=False)
class Chunk:
    """actions: float32 (H, A) in policy units; commands: float64 (H, A), the same in ROS units.

    Row i is due from observed_at + i * period (s, steady clock) until the next row is. sequence: of the
    frame; generation: of the instruction, growing with every new one.
    """

    actions: npt.NDArray[np.float32]
    commands: npt.NDArray[np.float64]
    observed_at: float
    period: float
    sequence: int
    generation: int = 0

    @property
    def steps(self) -> int:
        return len(self.commands)

    @property
    def end(self) -> float:
        """When the last row stops being due."""
        return self.observed_at + self.steps * self.period

    def row_at(self, now: float) -> int:
        """The row due at `now`: 0 before the observation, `steps` or more once the chunk is past."""
        return max(0, math.floor((now - self.observed_at) / self.period + 1e-6))

    def due(self, row: int) -> float:
        return self.observed_at + row * self.period


class ActionLayout:
    """Which numbers of an action go to which command, and how they become ROS units."""

    def __init__(self, contract: Contract) -> None:
        self.size = contract.action_dim
        self._steps = contract.chunk_steps
        self._period = 1.0 / contract.policy_rate
        self.parts: list[tuple[CommandSink, slice]] = []
        start = 0
        for command in contract.commands:
            self.parts.append((command, slice(start, start + command.size)))
            start += command.size
        # A position is held where it is; a velocity or effort is held by sending zero.
        self.zero_on_hold = np.concatenate(
            [np.full(command.size, command.interface != "position") for command in contract.commands]
        )

    def to_ros(self, actions: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Actions (H, A) in policy units as float64 (H, A) in ROS units."""
        wide = actions.astype(np.float64)
        return np.concatenate([command.units.to_ros(wide[:, part]) for command, part in self.parts], axis=1)

    def chunk(self, actions: npt.NDArray[np.float32], frame: Frame, *, generation: int = 0) -> Chunk:
        """The chunk that a policy's actions (H, A) make for `frame`. Raises EngineError for a wrong shape."""
        if actions.ndim != 2 or actions.shape[1] != self.size or not actions.shape[0]:
            raise EngineError(f"policy: expected actions of shape (H, {self.size}), got {actions.shape}")
        kept = np.array(actions[: self._steps] if self._steps else actions, dtype=np.float32)
        return Chunk(kept, self.to_ros(kept), frame.observed_at, self._period, frame.sequence, generation)
