"""The policy that comes with the package, in simulation: a wrong kernel, unit or word would show as failures."""

from __future__ import annotations

import json

import pytest
from sim_support import need_simulation

from vla_infer.demo.__main__ import POLICY, _tasks
from vla_infer.sim.evaluate import Options, evaluate

EPISODES = 12


def successes(**options: object) -> int:
    need_simulation()
    given = {"kinds": ("touch",), "inference": 0.05, "threads": 1, "time_limit": 5.0, **options}
    return sum(o.success for o in evaluate(Options(str(POLICY), EPISODES, **given)).outcomes)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_it_touches_the_cube_that_is_named(precision: str) -> None:
    assert successes(precision=precision) >= 10  # 94 of 100


def test_it_does_what_is_said_and_not_what_it_sees() -> None:
    assert successes(wrong_instruction=True) <= 1  # 1 of 100


def test_its_card_and_its_record_are_of_these_weights() -> None:
    record = json.loads((POLICY / "training.json").read_text())
    assert record["weight_bytes"] == (POLICY / "model.safetensors").stat().st_size
    assert f"| {record['steps']} steps" in (POLICY / "README.md").read_text()
    assert _tasks(POLICY) == {"kinds": ["touch"]}
    assert _tasks(POLICY.parent) == {}
