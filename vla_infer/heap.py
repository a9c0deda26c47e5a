"""Keeps freed memory in the process, so that each image does not fault its pages in again."""

from __future__ import annotations

import ctypes

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
