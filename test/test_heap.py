"""Page faults of image-sized allocations; what a full collection looks at."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from vla_infer.heap import set_aside

PROGRAM = """
import resource, sys
from vla_infer.heap import keep_heap
if sys.argv[1] == "keep":
    assert keep_heap()
def copies():
    for _ in range(100):
        one = bytes(921600)
        two = bytes(921600)
        three = bytes(921600)
        del one, two, three
copies()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
copies()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc's malloc")
def test_kept_heap_faults_no_page_in_twice() -> None:
    assert 10 * faults("keep") < faults("default")


class Node:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.me = self


def test_what_is_loaded_is_left_out_of_collections() -> None:
    dead, kept = Node(), Node()
    dead_ref, kept_ref = weakref.ref(dead), weakref.ref(kept)
    del dead
    try:
        set_aside()
        assert dead_ref() is None
        assert gc.get_freeze_count() > 1000
        assert len(gc.get_objects()) < 1000
        del kept
        gc.collect()
        assert kept_ref() is not None  # not even looked at
        later = Node()
        later_ref = weakref.ref(later)
        del later
        gc.collect()
        assert later_ref() is None
        set_aside()
        assert kept_ref() is None
    finally:
        gc.unfreeze()
