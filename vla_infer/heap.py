"""Memory that costs no time while the robot moves: freed pages stay, and what is loaded is no garbage."""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes, the most that glibc takes
_TRIM_THRESHOLD = 512 << 20  # bytes of free memory at the top of the heap before any goes back


def keep_heap() -> bool:
    """Tell malloc to keep up to 512 MB that was freed instead of giving it back to the system.

    An image of 0.9 MB is copied three times between the wire and a Python callback. By default glibc takes and
    returns the pages of each copy, about 700 page faults an image, which is most of what receiving it costs.
    Call once, before the first large message. Returns whether the C library took it; elsewhere than on glibc
    nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
    )


def set_aside() -> None:
    """Collect garbage now, and leave all that is alive out of later collections.

    A full collection looks at every object there is, 40 000 once ROS is imported, which takes 20 ms in which no thread
    runs Python, the control tick's neither. What comes into being later is collected as ever. May be called again: what
    was set aside and has become garbage since then goes.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
