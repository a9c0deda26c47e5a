"""Processors: LeRobot's numbers and tokens, and what must never pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_infer.checkpoint import read_checkpoint
from vla_infer.processors import build_processors
from vla_infer.safetensors_io import open_safetensors, read_tensor

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("smolvla", "pi0", "pi05")


def golden(family: str) -> dict[str, Any]:
    file = open_safetensors(GOLDEN / family / "golden.safetensors")
    values: dict[str, Any] = {name: read_tensor(info) for name, info in file.tensors.items()}
    values["task"] = json.loads((GOLDEN / family / "golden.json").read_text())["task"]
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_state_tokens_and_robot_actions_are_exact(family: str) -> None:
    expected = golden(family)
    processors = build_processors(read_checkpoint(GOLDEN / family))
    encoded = processors.encode(expected["raw_state"], expected["task"])
    padded = np.zeros_like(expected["state"][0])
    padded[: len(encoded.state)] = encoded.state
    assert np.array_equal(padded, expected["state"][0])
    assert encoded.tokens.dtype == np.int32
    assert np.array_equal(encoded.tokens, expected["lang_tokens"][expected["lang_mask"]])
    robot = processors.decode(expected["actions"][0], expected["raw_state"])
    assert robot.dtype == np.float32
    assert np.array_equal(robot, expected["robot_actions"][0])
    back = processors.normalize_actions(robot, expected["raw_state"])
    assert np.allclose(back, expected["actions"][0, :, :6], atol=1e-6)
