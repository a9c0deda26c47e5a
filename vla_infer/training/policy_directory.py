"""A policy directory before and after training, exactly as LeRobot saves one: no reader needs to know of us."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vla_infer.checkpoint import WEIGHTS, Checkpoint, assemble_checkpoint
from vla_infer.policy_files import policy_config, write_json, write_processors
from vla_infer.processors import Processors, build_processors
from vla_infer.random_weights import tensor_shapes
from vla_infer.safetensors_io import TensorInfo, to_bfloat16_bits, write_safetensors

from .objective import GOAL
from .presets import Preset
from .shards import Demonstrations
from .vocabulary import train_tokenizer

_LONGEST = 32  # tokens of an instruction
_LEAST_SPREAD = 0.5  # policy units: a joint that hardly moves is not blown up to order one


def write_small_files(
    root: Path, preset: Preset, demonstrations: Demonstrations, instructions: list[str]
) -> tuple[Checkpoint, Processors]:
    """Write everything but the weights; returns a checkpoint without them, and its processors."""
    recipe = demonstrations.recipe
    image = {"type": "VISUAL", "shape": [3, recipe.image, recipe.image]}
    config = policy_config("smolvla", preset.sizes, recipe.cameras)
    config |= {"num_steps": preset.denoising, "tokenizer_max_length": _LONGEST, "vlm_model_name": preset.name}
    config["input_features"] |= dict.fromkeys(recipe.cameras, image)
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "config.json", config)
    write_processors(root, config, statistics(demonstrations))
    train_tokenizer(
        root / "tokenizer", [text + "\n" for text in instructions], size=preset.sizes.vocabulary
    )
    shapes = tensor_shapes("smolvla", preset.sizes)
    tensors = {
        name: TensorInfo(name, "BF16", shape, root / WEIGHTS, 0, 2 * math.prod(shape), (0, 0))
        for name, shape in shapes.items()
    }
    ckpt = assemble_checkpoint(root, tensors, "in training")
    return ckpt, build_processors(ckpt)


def write_weights(root: Path, parameters: Mapping[str, Tensor]) -> int:
    """Write model.safetensors in bfloat16; returns its size in bytes.

    Tensors that inference has no use for (the language model's head, what follows its last keys and values) were
    never made and are not in it.
    """
    values = {
        name: to_bfloat16_bits(tensor.detach().float().cpu().numpy())
        for name, tensor in sorted(parameters.items())
        if not name.startswith(GOAL)
    }
    layout = {name: ("BF16", array.shape) for name, array in values.items()}
    write_safetensors(root / WEIGHTS, layout, values.values(), {"format": "pt"})
    return (root / WEIGHTS).stat().st_size


def statistics(demonstrations: Demonstrations) -> dict[str, npt.NDArray[np.float32]]:
    """Mean, deviation and range of states and of valid action rows, by LeRobot's names."""
    rows = demonstrations.rows
    stats: dict[str, npt.NDArray[np.float32]] = {}
    for key, values in (
        ("observation.state", rows["state"]),
        ("action", rows["actions"][rows["valid"]]),
    ):
        wide = values.astype(np.float64)
        found = {"mean": wide.mean(0), "std": np.maximum(wide.std(0), _LEAST_SPREAD)}
        found |= {"min": wide.min(0), "max": wide.max(0)}
        found |= {f"q{p:02d}": np.quantile(wide, p / 100, axis=0) for p in (1, 10, 90, 99)}
        stats |= {f"{key}.{name}": value.astype(np.float32) for name, value in found.items()}
    return stats
