"""Which thread the scheduler runs first: by a short time slice (Linux 6.12 and later), or by a real-time priority.

A thread that wakes with a shorter slice than the running one takes its processor at once. So the thread with the
control timer asks for a short one, and inference, which keeps every processor busy, for the usual: with neither, a
tick that falls due in the middle of an inference waits until the inference's slice is over. No privilege is needed,
and nothing is taken from other processes.

A higher nice value for inference would do harm: the interpreter's lock is held by inference now and then, and when
another process then runs in its place, the control thread waits for both.

A real-time priority (SCHED_FIFO) also goes before other processes. It needs the system's leave.
"""

from __future__ import annotations

import ctypes
import os
import platform

SHORT = 100_000  # ns, the least that Linux grants
_USUAL = 0  # what sets a thread back to the kernel's own choice

_SYSCALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # sched_setattr, sched_getattr
_SCHED_OTHER = 0


class _Attributes(ctypes.Structure):
    """struct sched_attr of linux/sched/types.h, first version; `runtime` is the slice in ns."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def ask_for_short_slice() -> bool:
    """Let the calling thread, and threads it starts from now on, run soon after waking. Returns whether it took."""
    return _set(SHORT) and time_slice() == SHORT


def ask_for_realtime(priority: int) -> str:
    """SCHED_FIFO for the calling thread, and threads it starts from now on. priority: 1 to 99.

    Returns why the system refuses it; empty when it took.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except AttributeError:
        return "this system has no SCHED_FIFO"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def ask_for_usual_slice() -> bool:
    """Undo `ask_for_short_slice` and `ask_for_realtime` in the calling thread. Returns whether it took."""
    if hasattr(os, "SCHED_FIFO") and os.sched_getscheduler(0) == os.SCHED_FIFO:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return _set(_USUAL)


def time_slice() -> int | None:
    """The slice of the calling thread in ns; None where the kernel does not say."""
    attributes = _get()
    return int(attributes.runtime) or None if attributes is not None else None


def _get() -> _Attributes | None:
    """The calling thread's attributes; None elsewhere than on Linux, or for a real-time thread."""
    attributes = _Attributes()
    if platform.system() != "Linux" or platform.machine() not in _SYSCALLS:
        return None
    _, number = _SYSCALLS[platform.machine()]
    size = ctypes.sizeof(attributes)
    failed = ctypes.CDLL(None).syscall(number, 0, ctypes.byref(attributes), size, 0)
    return None if failed or attributes.policy != _SCHED_OTHER else attributes


def _set(slice_ns: int) -> bool:
    attributes = _get()
    if attributes is None:
        return False
    attributes.size = ctypes.sizeof(attributes)
    attributes.runtime = slice_ns
    number, _ = _SYSCALLS[platform.machine()]
    return bool(ctypes.CDLL(None).syscall(number, 0, ctypes.byref(attributes), 0) == 0)
