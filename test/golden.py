"""The golden policies: checkpoints with random weights and what LeRobot's own code makes of an observation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.safetensors_io import open_safetensors, read_tensor

ROOT = Path(__file__).parent / "golden"


class Golden:
    """One policy's directory and its expected values, by name."""

    def __init__(self, family: str) -> None:
        self.path = ROOT / family
        self.meta = json.loads((self.path / "golden.json").read_text())
        self.task: str = self.meta["task"]
        self._file = open_safetensors(self.path / "golden.safetensors")
        features = json.loads((self.path / "config.json").read_text())["input_features"]
        self.cameras = [name for name, feature in features.items() if feature["type"] == "VISUAL"]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return read_tensor(self._file.tensors[name])

    def images(self) -> dict[str, npt.NDArray[np.uint8]]:
        return dict(zip(self.cameras, self["frames"], strict=True))


def relative(got: npt.NDArray[np.floating], want: npt.NDArray[np.floating]) -> float:
    """Relative L2 error; infinite where anything is not finite or shapes differ."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))
