"""Copies of the golden policies with something changed in them, and what building their processors says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_infer.checkpoint import read_checkpoint
from vla_infer.errors import VlaInferError
from vla_infer.processors import Processors, build_processors

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("smolvla", "pi0", "pi05")
PROCESSORS = {family: build_processors(read_checkpoint(GOLDEN / family)) for family in FAMILIES}
STATE = np.array([-3.0, 10, -9, 20, 5, 0], np.float32)


def copy_of(family: str, folder: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / family, folder / family))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_step(policy: Path, name: str, **config: Any) -> None:
    """Change the configuration of one step, in both pipelines."""

    def change(pipeline: Any) -> None:
        for step in pipeline["steps"]:
            if step["registry_name"] == name:
                step["config"].update(config)

    for file in ("policy_preprocessor.json", "policy_postprocessor.json"):
        edit(policy / file, change)


def build(policy: Path) -> Processors:
    return build_processors(read_checkpoint(policy))


def refused(policy: Path, error: type[VlaInferError], message: str) -> None:
    with pytest.raises(error, match=message) as info:
        build(policy)
    assert "\n" not in str(info.value)
