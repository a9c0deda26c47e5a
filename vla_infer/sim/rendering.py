"""Draws a MuJoCo scene without a display, through whichever of EGL and OSMesa is there."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import weakref
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.errors import UnsupportedError

Image = npt.NDArray[np.uint8]
BACKENDS = ("egl", "osmesa")
_EGL_PLATFORM_DEVICE, _EGL_DEVICES = 0x313F, 16  # EGL_EXT_platform_device; how many devices to ask for


def choose_backend() -> str:
    """ "egl" where an EGL device can be initialised, else "osmesa" where its library is there.

    Raises:
        UnsupportedError: neither is there.
    """
    if _egl_device():
        return "egl"
    if ctypes.util.find_library("OSMesa"):
        return "osmesa"
    raise UnsupportedError(
        "simulation: found neither EGL nor OSMesa to draw with; apt install libegl1 libegl-mesa0, or libosmesa6"
    )


def load_mujoco() -> Any:
    """The module mujoco. It must be imported through here first: it looks for a display unless told otherwise.

    Raises:
        UnsupportedError: mujoco is not installed, or nothing to draw with is there.
    """
    os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = choose_backend()
    try:
        return import_module("mujoco")
    except ImportError as error:
        raise UnsupportedError(f"simulation: {error}; pip install 'vla_infer[sim]'") from error


class Renderer:
    """Images of one model's cameras. Belongs to the thread that made it: an OpenGL context does."""

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        """size: (H, W) of every image."""
        self._mujoco = mujoco = load_mujoco()
        self._model = model
        height, width = size
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        backend = import_module(f"mujoco.{os.environ['MUJOCO_GL']}")
        self._gl = backend.GLContext(width, height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE", "FOG"):
            self._scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._option = mujoco.MjvOption()
        self._option.sitegroup[:] = 0
        self._perturbation = mujoco.MjvPerturb()
        self._pixels = np.empty((height, width, 3), np.uint8)
        # At the process's end too: afterwards OpenGL is gone, and freeing complains.
        self._free = weakref.finalize(self, _free, self._context, self._gl)

    def draw(self, data: Any, camera: str) -> Image:
        """The image (H, W, 3), RGB, of a camera by name; owned by the caller."""
        mujoco = self._mujoco
        self._camera.fixedcamid = self._model.camera(camera).id
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self._model,
            data,
            self._option,
            self._perturbation,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._viewport, self._context)
        return np.ascontiguousarray(self._pixels[::-1])  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Free the OpenGL context. Nothing can be drawn afterwards."""
        self._free()


def _free(*contexts: Any) -> None:
    for context in contexts:
        context.free()


def _egl_device() -> bool:
    """Whether some EGL device initialises: the library alone may have no driver behind it."""
    try:
        egl = ctypes.CDLL(ctypes.util.find_library("EGL") or "libEGL.so.1")
        address = egl.eglGetProcAddress
    except (OSError, AttributeError):
        return False
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    query, display_of = address(b"eglQueryDevicesEXT"), address(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return False
    pointer = ctypes.c_void_p
    devices, count = (pointer * _EGL_DEVICES)(), ctypes.c_int()
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, pointer, pointer)(query)
    if not query_devices(_EGL_DEVICES, ctypes.addressof(devices), ctypes.addressof(count)):
        return False
    platform_display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(display_of)
    initialise = egl.eglInitialize
    initialise.restype, initialise.argtypes = ctypes.c_uint, [pointer, pointer, pointer]
    for device in devices[: count.value]:
        display = platform_display(_EGL_PLATFORM_DEVICE, device, None)
        if display and initialise(display, None, None):
            return True
    return False
