"""From where the finger tips should be to joint positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.sim.model import TIP
from vla_infer.sim.rendering import load_mujoco

FloatArray = npt.NDArray[np.float64]

ARM = 5  # joints that move the tip; the sixth is the gripper's
_DAMPING = 0.008
_TURN = 0.015  # m that an error of 1 rad in direction counts as


class Kinematics:
    """Tip position and direction of an arm, by a model and scratch memory of its own."""

    def __init__(self, model: Any) -> None:
        self._mujoco = load_mujoco()
        self._model = model
        self._data = self._mujoco.MjData(model)
        self._site = model.site(TIP).id
        self._body = int(model.site_bodyid[self._site])
        self._limits = model.jnt_range[:ARM]

    def tip(self, joints: FloatArray) -> FloatArray:
        """Where the tip (3,) is in metres for joint positions (at least 5,) in rad."""
        self._place(joints)
        return np.array(self._data.site_xpos[self._site])

    def solve(self, tip: FloatArray, roll: float, joints: FloatArray, *, rounds: int = 12) -> FloatArray:
        """Joint positions (5,) with the tip at `tip` (m), pointing down, `roll` (rad) being the wrist's.

        Damped least squares on the Jacobian (Wampler, 1986; Nakamura and Hanafusa, 1986) from `joints` on: where
        tip and direction cannot both be had, the tip counts for more.
        """
        mujoco, data = self._mujoco, self._data
        solved = np.array(joints[:ARM], np.float64)
        solved[4] = roll
        linear, angular = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))
        down = np.array([0.0, 0.0, -1.0])
        free = slice(0, ARM - 1)  # the wrist's roll is given
        for _ in range(rounds):
            self._place(solved)
            mujoco.mj_jac(self._model, data, linear, angular, data.site_xpos[self._site], self._body)
            approach = data.site_xmat[self._site].reshape(3, 3)[:, 0]
            error = np.concatenate([tip - data.site_xpos[self._site], _TURN * np.cross(approach, down)])
            if np.abs(error[:3]).max() < 2e-4 and np.abs(error[3:]).max() < 2e-4:
                break
            jacobian = np.vstack([linear[:, free], _TURN * angular[:, free]])
            step = _damped(jacobian, error)
            beyond = solved[free] + step
            if (stuck := (beyond <= self._limits[free, 0]) | (beyond >= self._limits[free, 1])).any():
                solved[free] = np.clip(beyond, *self._limits[free].T) * stuck + solved[free] * ~stuck
                step = _damped(jacobian * ~stuck, error)  # the others make up for a joint at its limit
            solved[free] += np.clip(step, -0.2, 0.2)
            np.clip(solved, *self._limits.T, out=solved)
        return solved

    def _place(self, joints: FloatArray) -> None:
        self._data.qpos[:ARM] = joints[:ARM]
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_comPos(self._model, self._data)


def _damped(jacobian: FloatArray, error: FloatArray) -> FloatArray:
    square = jacobian @ jacobian.T + _DAMPING**2 * np.eye(len(error))
    step: FloatArray = jacobian.T @ np.linalg.solve(square, error)
    return step
