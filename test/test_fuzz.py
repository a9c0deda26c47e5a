"""A short run of the fuzzer; docs/safety.md has the command for a long one."""

from __future__ import annotations

import pytest
from fuzz import TARGETS, fuzz


@pytest.mark.parametrize("target", TARGETS)
def test_only_the_package_s_own_errors(target: str) -> None:
    cases = {"checkpoint": 400, "contract": 600, "calibration": 1000}.get(target, 3000)
    found = fuzz(target, seed=1, first=0, cases=cases, memory_every=20)
    assert sum(found.values()) == cases
    assert sum(count for kind, count in found.items() if kind != "taken") > cases / 10
