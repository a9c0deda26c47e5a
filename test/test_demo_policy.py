"""The policy that comes with the package, in simulation: a wrong kernel, unit or word would show as failures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sim_support import need_simulation

from vla_infer.demo.__main__ import POLICY, _tasks
from vla_infer.policy import load_policy
from vla_infer.sim.evaluate import Options, evaluate
from vla_infer.sim.world import World


def successes(episodes: int, *kinds: str, **options: object) -> int:
    need_simulation()
    given = {
        "kinds": kinds,
        "inference": 0.05,
        "threads": 1,
        "time_limit": 6.0,
        "precision": "bf16",
        **options,
    }
    return sum(o.success for o in evaluate(Options(str(POLICY), episodes, **given)).outcomes)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_it_touches_the_cube_that_is_named(precision: str) -> None:
    assert successes(5, "touch", precision=precision) >= 4  # 100 of 100


def test_it_pushes_to_the_side_that_is_named() -> None:
    assert successes(6, "push_left", "push_right") >= 5  # 199 of 200


def test_it_picks_the_cube_up() -> None:
    assert successes(4, "pick") >= 2  # 83 of 100


def test_it_does_what_is_said_and_not_what_it_sees() -> None:
    assert successes(6, "touch", "push_left", wrong_instruction=True) <= 1  # 0 of 200


def test_its_scales_for_fp8_are_of_these_weights() -> None:
    pytest.importorskip("torch", reason="the reference executor needs PyTorch")
    need_simulation()
    chunks = []
    for precision in ("bf16", "fp8"):
        policy = load_policy(POLICY, device="reference", precision=precision)
        world = World(image_size=(96, 96), cameras=policy.info.cameras)
        task = world.reset(3, split="eval")
        policy.seed(0)
        chunks.append(
            policy.predict(world.images(), np.zeros(policy.info.state_dim, np.float32), task.instruction)
        )
        world.close()
        policy.close()
    off = np.linalg.norm(chunks[1] - chunks[0]) / np.linalg.norm(chunks[0])
    assert 0 < off < 0.0998  # the bound of `vla-infer calibrate`


def test_its_card_and_its_record_are_of_these_weights() -> None:
    record = json.loads((POLICY / "training.json").read_text())
    assert record["weight_bytes"] == (POLICY / "model.safetensors").stat().st_size
    assert f"| {record['steps']} steps" in (POLICY / "README.md").read_text()
    assert _tasks(POLICY) == {"kinds": ["touch", "push_left", "push_right", "pick"]}
    assert _tasks(POLICY.parent) == {}
