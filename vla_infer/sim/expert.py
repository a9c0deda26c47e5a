"""A scripted expert that does every kind of task, for demonstrations to learn from.

What it does next follows from where cubes and gripper are now, not from a plan made at the beginning. So it can be
asked from any state, also one that a policy or added noise led to.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vla_infer.sim.kinematics import ARM, Kinematics
from vla_infer.sim.model import CUBE
from vla_infer.sim.scene import HOME
from vla_infer.sim.tasks import Task
from vla_infer.sim.world import PUSH_DISTANCE, World

FloatArray = npt.NDArray[np.float64]

RATE = 30.0  # Hz of `act`
TIME_LIMIT = 8.0  # s
_SETTLE = 0.4  # s from success to done

_SPEED, _ACCELERATION, _LAG = (
    0.25,
    1.5,
    0.12,
)  # of the tip: m/s, m/s²; s in which an error would be made up for
_JOINT_SPEED, _JOINT_ACCELERATION = 1.8, 12.0  # rad/s and rad/s², well within the contract's 3 and 20
_GRIPPER_SPEED = 2.5  # rad/s
_BRAKING = 8.0  # rad/s² before a joint's limit
_CLOSED, _OPEN, _GRIP = -0.12, 0.95, 0.28  # rad: gripper empty, before a grasp, on a cube
_CRUISE, _LOW, _GRASP, _PRESS = (
    0.08,
    0.020,
    0.016,
    CUBE - 0.008,
)  # m, heights of the tip: above cubes, to push, ...
_RIM, _SLOPE = 0.010, 1.6  # m from above the aim where the way down begins, and how steep it is
_BESIDE = CUBE / 2 + 0.034  # m from a cube's centre to where a push begins
_REACH_IN = 0.0245  # m from the tip to the middle of a cube about to be grasped, across the jaws


class Expert:
    """Does `task` in `world`: `act` once every 1 / RATE s until `done`, giving each result to `World.command`."""

    def __init__(self, world: World, task: Task, rng: np.random.Generator) -> None:
        """rng: no two experts are quite alike; speed, heights and aims differ a little."""
        self._world, self._task = world, task
        self._kinematics = Kinematics(world.model)
        self._speed = _SPEED * rng.uniform(0.8, 1.1)
        self._cruise = _CRUISE + rng.uniform(-0.01, 0.01)
        self._aim_off = rng.uniform(-0.004, 0.004, 2) * (task.kind != "pick")
        self._beyond = PUSH_DISTANCE + rng.uniform(0.012, 0.025)
        self._velocity, self._step = np.zeros(3), np.zeros(6)  # of the tip, m/s; of the joints, rad
        self._began = world.time
        self._succeeded_at: float | None = None
        self._start = world.cube(task.colour)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to do: it has succeeded a moment ago, cannot any more, or took too long."""
        now = self._world.time
        if self._succeeded_at is None and self._world.succeeded(self._task):
            self._succeeded_at = now
        if self._succeeded_at is not None and now >= self._succeeded_at + _SETTLE:
            return True
        return self._world.failed(self._task) or now >= self._began + TIME_LIMIT

    def act(self) -> FloatArray:
        """Joint positions (6,) in rad for the next 1 / RATE s, from the world as it is."""
        goal = self._world.commanded
        tip = self._kinematics.tip(goal)
        aim, roll, gripper = getattr(self, f"_{self._task.kind.partition('_')[0]}")(tip, goal)
        wanted = (aim - tip) / _LAG
        wanted *= min(1.0, self._speed / max(float(np.linalg.norm(wanted)), 1e-9))
        change = wanted - self._velocity
        change *= min(1.0, _ACCELERATION / RATE / max(float(np.linalg.norm(change)), 1e-9))
        self._velocity = self._velocity + change
        roll = goal[4] + np.clip(roll - goal[4], -1.5 / RATE, 1.5 / RATE)
        solved = self._kinematics.solve(tip + self._velocity / RATE, roll, goal)
        step = np.append(solved, goal[ARM] + 0.25 * (gripper - goal[ARM])) - goal
        most = np.array([_JOINT_SPEED] * ARM + [_GRIPPER_SPEED]) / RATE
        step[:ARM] *= min(1.0, most[0] / max(float(np.abs(step[:ARM]).max()), 1e-9))
        step[ARM] = np.clip(step[ARM], -most[ARM], most[ARM])
        change = _JOINT_ACCELERATION / RATE**2
        step = self._step + np.clip(step - self._step, -change, change)
        # No faster towards a limit than can be braked before it.
        low, high = self._world.limits.T
        brake = np.sqrt(2 * _BRAKING * np.clip([goal - low, high - goal], 0, None)) / RATE
        self._step = np.clip(step, -brake[0], brake[1])
        return goal + self._step

    def _touch(self, tip: FloatArray, goal: FloatArray) -> tuple[FloatArray, float, float]:
        cube = self._world.cube(self._task.colour)
        return self._descend(tip, cube[:2] + self._aim_off, _PRESS), HOME[4], _CLOSED

    def _push(self, tip: FloatArray, goal: FloatArray) -> tuple[FloatArray, float, float]:
        cube = self._world.cube(self._task.colour)
        side = 1.0 if self._task.kind == "push_left" else -1.0
        behind = side * (cube[1] - tip[1])  # m the tip is on the side from which to push
        roll = _square_roll(goal)
        if (
            behind > 0.010
            and behind < _BESIDE + 0.03
            and abs(tip[0] - cube[0]) < 0.015
            and tip[2] < _LOW + 0.015
        ):
            # Past where the cube is to go, less what lies between its middle and the tip.
            far = self._start[1] + side * (self._beyond - CUBE / 2)
            return np.array([cube[0] + self._aim_off[0], far, _LOW]), roll, _CLOSED
        beside = np.array([cube[0] + self._aim_off[0], cube[1] - side * _BESIDE])
        return self._descend(tip, beside, _LOW), roll, _CLOSED

    def _pick(self, tip: FloatArray, goal: FloatArray) -> tuple[FloatArray, float, float]:
        world = self._world
        cube, yaw = world.cube(self._task.colour), world.yaw(self._task.colour)
        roll = _square_roll(goal, yaw)
        across = np.array([np.cos(yaw), np.sin(yaw)])
        measured = self._kinematics.tip(world.joints()[0])  # it trails what is commanded, and holds the cube
        near = float(np.linalg.norm(measured[:2] + _REACH_IN * across - cube[:2]))
        if near < 0.016 and measured[2] < cube[2] + 0.008:
            if goal[ARM] <= _GRIP + 0.03:
                return np.array([tip[0], tip[1], self._cruise + 0.03]), goal[4], _GRIP
            if near < 0.010 or goal[ARM] < _OPEN - 0.1:
                return np.array([tip[0], tip[1], _GRASP]), goal[4], _GRIP
        return self._descend(tip, cube[:2] - _REACH_IN * across, _GRASP), roll, _OPEN

    def _descend(self, tip: FloatArray, place: FloatArray, height: float) -> FloatArray:
        """Where to head for to come to `place` (x, y) and `height` from above: a funnel, steep at its end."""
        offset = place - tip[:2]
        distance = float(np.linalg.norm(offset))
        funnel = height + float(np.clip(_SLOPE * (distance - _RIM), 0.0, self._cruise - height))
        too_low = max(0.0, funnel - tip[2] - 0.008)
        along = offset * max(0.0, 1.0 - too_low / 0.02)  # up first where a cube may be in the way
        return np.array([*(tip[:2] + along), funnel])


def _square_roll(goal: FloatArray, yaw: float = 0.0) -> float:
    """Wrist roll that turns the jaws square to a cube of `yaw`, whichever way the arm points."""
    return float(goal[0] + yaw)
