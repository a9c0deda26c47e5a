"""Demonstrations on disk: shards of observations with the chunk of actions that followed each."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.errors import TrainingError
from vla_infer.policy_config import ACTION, STATE

_RECIPE = "recipe.json"
_LEAST_SPREAD = 0.5  # policy units: a joint that hardly moves is not blown up to order one
#: name -> dtype and shape of one observation's row; pictures are in a file of their own.
_ROWS: Mapping[str, str] = {
    "state": "float32 (state,), in the policy's units",
    "actions": "float32 (horizon, action), in the policy's units, from the observation's instant on",
    "valid": "bool (horizon,): rows that the expert had decided when nothing disturbed it",
    "cubes": "float32 (colours, 3): where each cube is, m; NaN where there is none of the colour",
    "places": "float32 (colours, 2): column and row of its centre in the first camera's picture, 0 to 1; or NaN",
    "kind": "int8: index into KINDS",
    "colour": "int8: index into COLOURS",
    "episode": "int64: seed of the scene",
}


@dataclass(frozen=True)
class Recipe:
    """Everything the demonstrations depend on.

    image: side of the pictures; horizon: rows of a chunk; kinds: of task; seed: the first scene's, the others
    follow; stride: policy steps from one observation to the next; bursts: of disturbance a second; cameras: features.
    """

    image: int
    horizon: int
    kinds: tuple[str, ...]
    cameras: tuple[str, ...]
    seed: int = 0
    stride: int = 2
    bursts: float = 0.7

    def document(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "kinds": list(self.kinds), "cameras": list(self.cameras)}


@dataclass(frozen=True)
class Demonstrations:
    """N observations: frames uint8 (N, cameras, H, W, 3), and `_ROWS` by name, each (N, ...)."""

    recipe: Recipe
    frames: list[npt.NDArray[np.uint8]]  # by shard, in the rows' order
    rows: Mapping[str, npt.NDArray[Any]]
    shards: int

    def __len__(self) -> int:
        return len(self.rows["state"])


def prepare(folder: Path, recipe: Recipe) -> None:
    """Make the folder of a recipe's shards. Raises TrainingError where it holds those of another."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _RECIPE
    if path.exists() and read_recipe(folder) != recipe:
        raise TrainingError(f"{path}: holds demonstrations of another recipe: name another folder")
    part = path.with_suffix(f".{os.getpid()}.part")  # of several calls at once none reads half of it
    part.write_text(json.dumps(recipe.document(), indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a folder. Raises TrainingError where there is none."""
    path = folder / _RECIPE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Recipe(**values | {"kinds": tuple(values["kinds"]), "cameras": tuple(values["cameras"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{path}: no recipe of demonstrations ({error}); make them first") from None


def rows_path(folder: Path, shard: int) -> Path:
    """The file whose presence says that a shard is complete."""
    return folder / f"{shard:05d}.npz"


def write_shard(
    folder: Path, shard: int, frames: npt.NDArray[np.uint8], rows: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Write one shard; it counts once its rows are there, which come last."""
    path = rows_path(folder, shard)
    np.save(path.with_suffix(".npy"), frames)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: rows[name] for name in _ROWS})
    os.replace(part, path)


def load_demonstrations(folder: Path) -> Demonstrations:
    """Every complete shard of a folder, pictures memory-mapped. Raises TrainingError where there is none."""
    recipe = read_recipe(folder)
    frames, rows = [], []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            rows.append({name: file[name] for name in _ROWS})
        frames.append(np.load(path.with_suffix(".npy"), mmap_mode="r"))
    if not rows:
        raise TrainingError(f"{folder}: no complete shard; make demonstrations first")
    joined = {name: np.concatenate([part[name] for part in rows]) for name in _ROWS}
    return Demonstrations(recipe, frames, joined, len(frames))


def statistics(demonstrations: Demonstrations) -> dict[str, npt.NDArray[np.float32]]:
    """Mean, deviation and range of states and of valid action rows, by LeRobot's names."""
    rows = demonstrations.rows
    stats: dict[str, npt.NDArray[np.float32]] = {}
    for key, values in (
        (STATE, rows["state"]),
        (ACTION, rows["actions"][rows["valid"]]),
    ):
        wide = values.astype(np.float64)
        found = {"mean": wide.mean(0), "std": np.maximum(wide.std(0), _LEAST_SPREAD)}
        found |= {"min": wide.min(0), "max": wide.max(0)}
        percents = (1, 10, 90, 99)
        quantiles = np.quantile(wide, np.array(percents) / 100, axis=0)  # at once: each alone sorts all anew
        found |= {f"q{p:02d}": row for p, row in zip(percents, quantiles, strict=True)}
        stats |= {f"{key}.{name}": value.astype(np.float32) for name, value in found.items()}
    return stats
