"""Page faults of image-sized allocations."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
