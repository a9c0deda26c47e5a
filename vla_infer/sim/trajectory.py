"""Joint trajectories as a controller follows them: straight from point to point, each at its time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vla_infer.codecs import Setpoint
from vla_infer.contract_parse import one_line
from vla_infer.errors import ObservationError

FloatArray = npt.NDArray[np.float64]


class Trajectory:
    """What is to be commanded at each time from the receipt of a message on."""

    def __init__(self, setpoint: Setpoint, joints: tuple[str, ...], now: float, start: FloatArray) -> None:
        """joints: the arm's, in the order of `start`, which is what is commanded `now` (s); others are refused.

        A joint that the message leaves out stays where `start` has it.

        Raises:
            ObservationError: an unknown joint, a number that is not finite, or times that go back.
        """
        unknown = [name for name in setpoint.names if name not in joints]
        if unknown or len(set(setpoint.names)) != len(setpoint.names):
            raise ObservationError(
                f"trajectory: joints {one_line(list(setpoint.names))}: expected some of {', '.join(joints)}, each once"
            )
        times = np.asarray(setpoint.times, np.float64)
        finite = np.isfinite(setpoint.values).all() and np.isfinite(times).all()
        if not finite or (np.diff(times, prepend=0.0) < 0).any():
            raise ObservationError(
                "trajectory: expected finite positions, and times that never go back from 0"
            )
        rows = np.tile(start, (len(times), 1))
        rows[:, [joints.index(name) for name in setpoint.names]] = setpoint.values
        self._rows = np.vstack([start, rows])  # (points + 1, joints)
        self._times = now + np.concatenate([[0.0], times])

    def at(self, now: float) -> FloatArray:
        """The positions (joints,) for `now` in seconds; after the last point, that point."""
        after = int(np.searchsorted(self._times, now, side="right"))
        if after >= len(self._times):
            return np.array(self._rows[-1])
        if after == 0:
            return np.array(self._rows[0])
        before = after - 1
        share = (now - self._times[before]) / (self._times[after] - self._times[before])
        row: FloatArray = self._rows[before] + share * (self._rows[after] - self._rows[before])
        return row
