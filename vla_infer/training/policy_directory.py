"""A policy directory before and after training, exactly as LeRobot saves one: no reader needs to know of us."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vla_infer.checkpoint import WEIGHTS, Checkpoint, assemble_checkpoint
from vla_infer.policy_config import IMAGE_PREFIX
from vla_infer.policy_files import policy_config, write_json, write_processors
from vla_infer.processors import Processors, build_processors
from vla_infer.random_weights import tensor_shapes
from vla_infer.safetensors_io import TensorInfo, to_bfloat16_bits, write_safetensors

from .objective import GOAL
from .presets import Preset
from .shards import Demonstrations, statistics
from .vocabulary import train_tokenizer

_LONGEST = 32  # tokens of an instruction


def write_small_files(
    root: Path, preset: Preset, demonstrations: Demonstrations, instructions: list[str]
) -> tuple[Checkpoint, Processors]:
    """Write everything but the weights; returns a checkpoint without them, and its processors."""
    recipe = demonstrations.recipe
    image = {"type": "VISUAL", "shape": [3, recipe.image, recipe.image]}
    names = tuple(camera.removeprefix(IMAGE_PREFIX) for camera in recipe.cameras)
    config = policy_config("smolvla", preset.sizes, names)
    config |= {"num_steps": preset.denoising, "tokenizer_max_length": _LONGEST, "vlm_model_name": preset.name}
    config["input_features"] |= dict.fromkeys(recipe.cameras, image)
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "config.json", config)
    write_processors(root, config, statistics(demonstrations))
    train_tokenizer(root / "tokenizer", [text + "\n" for text in instructions], size=preset.sizes.vocabulary)
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
