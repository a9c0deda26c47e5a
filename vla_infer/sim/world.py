"""One simulated arm before a table with cubes: no ROS, no wall clock, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vla_infer.sim.model import CAMERAS, CUBE, JOINTS, TIMESTEP, build_model
from vla_infer.sim.rendering import Renderer, load_mujoco
from vla_infer.sim.scene import Scene, make_scene
from vla_infer.sim.tasks import COLOURS, KINDS, Task

FloatArray = npt.NDArray[np.float64]

SERVO_SPEED = 4.7  # rad/s, what the STS3215 turns without load
TOUCH_TIME = 0.1  # s of contact that make a touch
PUSH_DISTANCE, LIFT_HEIGHT = 0.04, 0.03  # m
STRAY = 0.02  # m: a cube that was not meant may be moved by less
_LOOK = 3  # steps of the simulation from one look at the contacts to the next
_HANDS = ("gripper", "moving_jaw_so101_v1")


class World:
    """An arm, cubes and cameras. `reset` before anything else; images are drawn in the thread that drew first.

    Joint positions are those of the contract so101 in ROS units: radians, in the order of JOINTS.
    """

    def __init__(
        self, *, image_size: tuple[int, int] = (128, 128), cameras: Sequence[str] = tuple(CAMERAS)
    ) -> None:
        """image_size: (H, W); cameras: features of CAMERAS that `images` draws.

        Raises:
            UnsupportedError: MuJoCo, the arm's model or something to draw with is not installed.
            ValueError: an unknown camera.
        """
        if unknown := sorted(set(cameras) - set(CAMERAS)):
            raise ValueError(f"cameras: unknown '{unknown[0]}'; expected of {', '.join(CAMERAS)}")
        self._mujoco = load_mujoco()
        self.image_size, self.cameras = image_size, tuple(cameras)
        self.model = build_model()
        self.data = self._mujoco.MjData(self.model)
        self._renderer: Renderer | None = None
        model = self.model
        self.limits: FloatArray = model.actuator_ctrlrange.copy()  # (6, 2) rad, of positions
        if [model.actuator(i).name for i in range(model.nu)] != list(JOINTS):
            raise RuntimeError(f"the arm's model does not have the joints {JOINTS} in this order")
        self._hand_geoms = np.isin(model.geom_bodyid, [model.body(name).id for name in _HANDS])
        self._cube_of_geom = np.full(model.ngeom, -1)
        for index, colour in enumerate(COLOURS):
            self._cube_of_geom[model.geom(colour).id] = index
        self._cube_qpos = [int(model.joint(colour).qposadr[0]) for colour in COLOURS]
        self._plain = {
            name: np.array(getattr(model, name)) for name in ("geom_rgba", "mat_rgba", "cam_pos", "cam_quat")
        }
        self._shell = np.flatnonzero(model.mat_rgba[:, 0] > 0.5)
        self.scene: Scene | None = None
        self._commanded: FloatArray = self.limits.mean(axis=1)

    def reset(self, seed: int, *, split: str = "train", kinds: Sequence[str] = KINDS) -> Task:
        """Begin the episode of a seed: another scene, the arm at its start pose, time 0. Returns what to do."""
        self.scene = scene = make_scene(seed, split, kinds, len(CAMERAS))
        data, mujoco = self.data, self._mujoco
        mujoco.mj_resetData(self.model, data)
        data.qpos[: len(JOINTS)] = scene.start
        self._commanded = np.clip(scene.start, *self.limits.T)
        data.ctrl[:] = self._commanded
        for index, colour in enumerate(COLOURS):
            # What is not in the scene lies behind the arm, out of every camera's sight.
            x, y, yaw = scene.cubes.get(colour, (-1.0, 0.2 * index, 0.0))
            first = self._cube_qpos[index]
            data.qpos[first : first + 7] = (x, y, CUBE / 2, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
        self._dress(scene)
        mujoco.mj_forward(self.model, data)
        self._steps = 0
        self._due = 0.0
        self.mark()
        return scene.task

    def mark(self) -> None:
        """From now on `moved`, `succeeded` and `failed` count from where the cubes are, and nothing was touched."""
        self._begun = {colour: self.cube(colour) for colour in self.scene.cubes} if self.scene else {}
        self._contact = dict.fromkeys(COLOURS, 0.0)
        self._first: str | None = None
        self._resting = self._touched()  # what the gripper still rests on is no mistake yet

    def _dress(self, scene: Scene) -> None:
        """Give colours, lamp and cameras this episode's look."""
        model = self.model
        for name, value in self._plain.items():
            getattr(model, name)[:] = value
        for index, colour in enumerate(COLOURS):
            model.geom_rgba[model.geom(colour).id, :3] *= scene.tint[index]
        model.geom_rgba[model.geom("table").id, :3] *= scene.tint[-2]
        model.mat_rgba[self._shell, :3] *= scene.tint[-1]
        np.clip(model.geom_rgba, 0, 1, out=model.geom_rgba)
        np.clip(model.mat_rgba, 0, 1, out=model.mat_rgba)
        lamp = model.light("lamp").id
        model.light_pos[lamp] = scene.light[:3]
        model.light_diffuse[lamp] = scene.light[3]
        for move, name in zip(scene.camera, CAMERAS.values(), strict=True):
            camera = model.camera(name).id
            model.cam_pos[camera] += move[:3]
            turn, turned = np.empty(4), np.empty(4)
            angle = float(np.linalg.norm(move[3:]))
            self._mujoco.mju_axisAngle2Quat(turn, move[3:] / max(angle, 1e-9), angle)
            self._mujoco.mju_mulQuat(turned, model.cam_quat[camera], turn)
            model.cam_quat[camera] = turned

    @property
    def time(self) -> float:
        """Seconds simulated since `reset`."""
        return float(self.data.time)

    @property
    def commanded(self) -> FloatArray:
        """The joint positions (6,) last commanded, within the limits."""
        return np.array(self._commanded)

    def command(self, positions: Sequence[float] | FloatArray) -> None:
        """Where the servos are to go: (6,) radians, held within the arm's limits; reached no faster than they turn.

        Raises:
            ValueError: not six finite numbers; the last command stays.
        """
        wanted = np.asarray(positions, np.float64)
        if wanted.shape != (len(JOINTS),) or not np.isfinite(wanted).all():
            raise ValueError(f"command: expected {len(JOINTS)} finite positions in rad, got {wanted}")
        self._commanded = np.clip(wanted, *self.limits.T)

    def advance(self, seconds: float) -> None:
        """Simulate. Fractions of a time step are carried over to the next call."""
        self._due += seconds
        step = SERVO_SPEED * TIMESTEP
        data = self.data
        while (self._steps + 0.5) * TIMESTEP < self._due:
            data.ctrl[:] += np.clip(self._commanded - data.ctrl, -step, step)
            self._mujoco.mj_step(self.model, data)
            self._steps += 1
            if self._steps % _LOOK == 0:
                self._look()

    def _touched(self) -> set[str]:
        """The cubes that the gripper touches now."""
        pairs = self.data.contact.geom
        if not len(pairs):
            return set()
        cubes, hands = self._cube_of_geom[pairs], self._hand_geoms[pairs]
        return {COLOURS[index] for index in cubes[hands[:, ::-1] & (cubes >= 0)].tolist()}

    def _look(self) -> None:
        """Note how long the gripper has touched which cube, and which one first."""
        touched = self._touched()
        for colour in self._resting - touched:
            self._contact[colour] = 0.0
        self._resting &= touched
        for colour in touched:
            self._contact[colour] += _LOOK * TIMESTEP
            long = self._contact[colour] >= TOUCH_TIME and colour not in self._resting
            if long and self._first is None:
                self._first = colour

    def joints(self) -> tuple[FloatArray, FloatArray]:
        """Positions (6,) in rad and velocities (6,) in rad/s as measured."""
        return self.data.qpos[: len(JOINTS)].copy(), self.data.qvel[: len(JOINTS)].copy()

    def images(self) -> dict[str, npt.NDArray[np.uint8]]:
        """An image (H, W, 3), RGB, of each camera by its feature; owned by the caller."""
        if self._renderer is None:
            self._renderer = Renderer(self.model, self.image_size)
        return {feature: self._renderer.draw(self.data, CAMERAS[feature]) for feature in self.cameras}

    def cube(self, colour: str) -> FloatArray:
        """Centre (3,) of a cube in metres, base frame."""
        first = self._cube_qpos[COLOURS.index(colour)]
        return np.array(self.data.qpos[first : first + 3])

    def yaw(self, colour: str) -> float:
        """Turn of a cube about the vertical in rad, within a quarter turn: -π/4 to π/4."""
        first = self._cube_qpos[COLOURS.index(colour)] + 3
        w, x, y, z = self.data.qpos[first : first + 4]
        turn = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        return float((turn + np.pi / 4) % (np.pi / 2) - np.pi / 4)

    def moved(self, colour: str) -> FloatArray:
        """How far (3,) a cube of the scene is from where it lay, in metres."""
        shift: FloatArray = self.cube(colour) - self._begun[colour]
        return shift

    def succeeded(self, task: Task) -> bool:
        """Whether a task is done now: the right cube, touched first, pushed far enough, or in the air."""
        if self.scene is None or task.colour not in self.scene.cubes or self.failed(task):
            return False
        if task.kind == "touch":
            return self._contact[task.colour] >= TOUCH_TIME
        shift = self.moved(task.colour)
        if task.kind == "pick":
            return bool(shift[2] >= LIFT_HEIGHT)
        side = 1.0 if task.kind == "push_left" else -1.0
        return bool(side * shift[1] >= PUSH_DISTANCE)

    def failed(self, task: Task) -> bool:
        """Whether a task cannot be done any more: the wrong cube touched or moved, or the right one the wrong way."""
        if self.scene is None:
            return False
        others = [colour for colour in self.scene.cubes if colour != task.colour]
        if any(np.linalg.norm(self.moved(colour)[:2]) >= STRAY for colour in others):
            return True
        if task.kind == "touch":
            return self._first not in (None, task.colour)
        if task.kind.startswith("push") and task.colour in self.scene.cubes:
            side = 1.0 if task.kind == "push_left" else -1.0
            return bool(side * self.moved(task.colour)[1] <= -STRAY)
        return False

    def close(self) -> None:
        """Free what drawing holds."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
