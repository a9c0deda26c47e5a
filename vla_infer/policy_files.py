"""The small files of a policy directory as LeRobot writes them: config.json and both processors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.random_weights import Sizes
from vla_infer.safetensors_io import save_tensors

STATE_DIM = 6
EPS = 1e-8  # of normalisation
Statistics = Mapping[str, npt.NDArray[np.float32]]


def policy_config(family: str, sizes: Sizes, cameras: tuple[str, ...]) -> dict[str, Any]:
    """config.json of a policy of these sizes: pictures of 640 x 480, STATE_DIM joints, ten denoising steps."""
    side = sizes.vision.image
    image = {"type": "VISUAL", "shape": [3, 480, 640]}
    mode = "QUANTILES" if family == "pi05" else "MEAN_STD"
    config: dict[str, Any] = {
        "type": family,
        "n_obs_steps": 1,
        "input_features": {
            **{f"observation.images.{name}": image for name in cameras},
            "observation.state": {"type": "STATE", "shape": [STATE_DIM]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [STATE_DIM]}},
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        "device": "cpu",
        "chunk_size": sizes.horizon,
        "n_action_steps": sizes.horizon,
        "max_state_dim": sizes.padded,
        "max_action_dim": sizes.padded,
        "empty_cameras": 0,
        "tokenizer_max_length": 200 if family == "pi05" else 48,
        "min_period": 0.004,
        "max_period": 4.0,
        "rtc_config": None,
    }
    if family == "smolvla":
        return config | {
            "num_steps": 10,
            "resize_imgs_with_padding": [side, side],
            "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
            "attention_mode": "cross_attn",
            "prefix_length": -1,
            "pad_language_to": "longest",
            "num_expert_layers": -1,
            "num_vlm_layers": sizes.text.depth,
            "self_attn_every_n_layers": 2,
            "expert_width_multiplier": 0.75,
        }
    return config | {
        "num_inference_steps": 10,
        "image_resolution": [side, side],
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": "bfloat16",
    }


def write_processors(root: Path, config: Mapping[str, Any], stats: Statistics) -> None:
    """Both pipelines and their statistics, for a `config` made by `policy_config`.

    stats: float32 by "<feature>.<statistic>", such as "action.mean": (dim,).
    """
    family = config["type"]
    normalizer = {
        "eps": EPS,
        "features": {**config["input_features"], **config["output_features"]},
        "norm_map": config["normalization_mapping"],
    }
    relative = _step(
        "relative_actions_processor", enabled=False, exclude_joints=["gripper"], action_names=None
    )
    tokenizer = _step(
        "tokenizer_processor",
        max_length=config["tokenizer_max_length"],
        task_key="task",
        padding_side="right",
        padding="longest" if family == "smolvla" else "max_length",
        truncation=True,
        tokenizer_name="tokenizer",
    ) | {"artifacts": {"tokenizer_name": "tokenizer"}}
    start = [_step("rename_observations_processor", rename_map={}), _step("to_batch_processor")]
    device, normalize = (
        _step("device_processor", device="cpu", float_dtype=None),
        _step("normalizer_processor"),
    )
    normalize["config"] = normalizer
    if family == "smolvla":
        before = [*start, _step("smolvla_new_line_processor"), tokenizer, device, normalize]
    elif family == "pi0":
        before = [*start, _step("pi0_new_line_processor"), tokenizer, device, relative, normalize]
    else:
        prompt = _step("pi05_prepare_state_tokenizer_processor_step")
        before = [*start, relative, normalize, prompt, tokenizer, device]
    after = [_step("unnormalizer_processor", **(normalizer | {"features": config["output_features"]}))]
    after += [] if family == "smolvla" else [_step("absolute_actions_processor", enabled=False)]
    for name, steps in (("policy_preprocessor", before), ("policy_postprocessor", [*after, device])):
        for i, step in enumerate(steps):
            if "normalizer" in step["registry_name"]:
                step["state_file"] = f"{name}_step_{i}_{step['registry_name']}.safetensors"
                save_tensors(root / step["state_file"], stats)
        write_json(root / f"{name}.json", {"name": name, "steps": steps})


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Readable JSON with a last line end."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
