"""config.json of a LeRobot policy, checked: known keys typed and bounded, what is not supported refused.

Unknown keys are ignored, because LeRobot adds some with every release. Keys that change what the model
computes in a way that this package does not do raise UnsupportedError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vla_infer.errors import CheckpointError, UnsupportedError
from vla_infer.json_io import Fields, show

FAMILIES = ("smolvla", "pi0", "pi05")
NORMALIZATION_MODES = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")
FEATURE_TYPES = ("STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE")
STATE = "observation.state"
ACTION = "action"
IMAGE_PREFIX = "observation.images."
EMPTY_CAMERA = IMAGE_PREFIX + "empty_camera_"
_GEMMA_VARIANTS = ("gemma_300m", "gemma_2b")


@dataclass(frozen=True)
class PolicyConfig:
    """What config.json says, with LeRobot's defaults filled in for known keys that it lacks."""

    family: str
    values: dict[str, Any]
    cameras: tuple[str, ...]
    #: (height, width) of each camera in the training data, as config.json states it.
    camera_sizes: dict[str, tuple[int, int]]
    state_dim: int
    action_dim: int


def parse_config(data: Mapping[str, Any], where: str) -> PolicyConfig:
    """Check a parsed config.json.

    Raises:
        CheckpointError: a key of the wrong type or value.
        UnsupportedError: a policy family, or an option of one, that this package does not run.
    """
    fields = Fields(data, where)
    family = fields.text("type")
    if family not in FAMILIES:
        raise UnsupportedError(
            f"{where}: type {show(family)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    _require(fields, "use_peft", (False,), "false (merge the adapter into the weights first)")
    _require(fields, "n_obs_steps", (1,), "1")
    values = dict(data)
    values.update(_common(fields))
    values.update(_smolvla(fields) if family == "smolvla" else _pi(fields, family))
    inputs, outputs = _features(fields, "input_features"), _features(fields, "output_features")
    state_dim = _vector(inputs, STATE, "STATE", values)
    action_dim = _vector(outputs, ACTION, "ACTION", values)
    sizes = _cameras(inputs)
    if not sizes:
        raise CheckpointError(f"{where}: input_features has no camera (a feature of type VISUAL)")
    return PolicyConfig(family, values, tuple(sizes), sizes, state_dim, action_dim)


def _require(fields: Fields, key: str, allowed: tuple[object, ...], supported: str) -> None:
    """The key, when present, has one of the allowed values, of the same type."""
    value = fields.data.get(key, allowed[0])
    if not any(type(value) is type(good) and value == good for good in allowed):
        raise UnsupportedError(
            f"{fields.where}: {key} = {show(value)} is not supported; supported: {supported}"
        )


def _common(fields: Fields) -> dict[str, Any]:
    chunk = fields.integer("chunk_size", 50, high=4096)
    steps = fields.integer("n_action_steps", min(50, chunk), high=4096)
    if steps > chunk:
        raise CheckpointError(f"{fields.where}: n_action_steps {steps} is above chunk_size {chunk}")
    low, high = fields.number("min_period", 4e-3), fields.number("max_period", 4.0)
    if low >= high:
        raise CheckpointError(f"{fields.where}: min_period {low:g} is not below max_period {high:g}")
    modes = fields.object("normalization_mapping", {"VISUAL": "IDENTITY"})
    for kind in modes.data:
        if kind not in FEATURE_TYPES:
            raise CheckpointError(f"{modes.where}: unknown feature type {show(kind)}")
        modes.text(kind, choices=NORMALIZATION_MODES)
    _require(modes, "VISUAL", ("IDENTITY",), "IDENTITY")
    rtc = fields.data.get("rtc_config")
    if rtc is not None and not isinstance(rtc, Mapping):
        raise CheckpointError(f"{fields.where}: rtc_config: expected an object or null, got {show(rtc)}")
    return {
        "chunk_size": chunk,
        "n_action_steps": steps,
        "min_period": low,
        "max_period": high,
        "max_state_dim": fields.integer("max_state_dim", 32, high=1024),
        "max_action_dim": fields.integer("max_action_dim", 32, high=1024),
        "empty_cameras": fields.integer("empty_cameras", 0, low=0, high=16)
        if "empty_cameras" in fields.data
        else 0,
    }


def _smolvla(fields: Fields) -> dict[str, Any]:
    for key in ("adapt_to_pi_aloha", "use_delta_joint_actions_aloha", "add_image_special_tokens"):
        _require(fields, key, (False,), "false")
    _require(fields, "use_cache", (True,), "true")
    _require(fields, "attention_mode", ("cross_attn", "self_attn"), "cross_attn, self_attn")
    resize = fields.data.get("resize_imgs_with_padding", [512, 512])
    if resize is None:
        raise UnsupportedError(
            f"{fields.where}: resize_imgs_with_padding = null is not supported; supported: [width, height]"
        )
    prefix = fields.integer("prefix_length", low=-1) if "prefix_length" in fields.data else -1
    if prefix > 0:
        raise UnsupportedError(
            f"{fields.where}: prefix_length = {prefix} is not supported; supported: -1 or 0"
        )
    layers = _signed(fields, "num_vlm_layers", 16)
    expert_layers = _signed(fields, "num_expert_layers", -1)
    if expert_layers > 0 and layers > 0 and layers % expert_layers:
        raise CheckpointError(
            f"{fields.where}: num_expert_layers {expert_layers} does not divide num_vlm_layers {layers}"
        )
    return {
        "num_steps": fields.integer("num_steps", 10, high=1000),
        "tokenizer_max_length": fields.integer("tokenizer_max_length", 48, high=4096),
        "resize_imgs_with_padding": list(
            Fields({"resize_imgs_with_padding": resize}, fields.where).sizes(
                "resize_imgs_with_padding", length=2, high=4096
            )
        ),
        "prefix_length": prefix,
        "num_vlm_layers": layers,
        "num_expert_layers": expert_layers,
        "self_attn_every_n_layers": _signed(fields, "self_attn_every_n_layers", 2),
        "expert_width_multiplier": fields.number("expert_width_multiplier", 0.75),
        "vlm_model_name": fields.text("vlm_model_name", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"),
        "pad_language_to": fields.text("pad_language_to", "longest", choices=("longest", "max_length")),
    }


def _signed(fields: Fields, key: str, default: int) -> int:
    """An integer where zero and below mean "off" or "all"."""
    return fields.integer(key, low=-1, high=256) if key in fields.data else default


def _pi(fields: Fields, family: str) -> dict[str, Any]:
    if family == "pi05":
        for key in ("use_visual_memory", "use_proprioceptive_memory"):
            _require(fields, key, (False,), "false")
    resolution = Fields(
        {"image_resolution": fields.data.get("image_resolution", [224, 224])}, fields.where
    ).sizes("image_resolution", length=2, high=4096)
    if resolution[0] != resolution[1]:
        raise CheckpointError(f"{fields.where}: image_resolution: expected a square, got {list(resolution)}")
    return {
        "num_steps": fields.integer("num_inference_steps", 10, high=1000),
        "num_inference_steps": fields.integer("num_inference_steps", 10, high=1000),
        "tokenizer_max_length": fields.integer(
            "tokenizer_max_length", 200 if family == "pi05" else 48, high=4096
        ),
        "image_resolution": list(resolution),
        "paligemma_variant": fields.text("paligemma_variant", "gemma_2b", choices=_GEMMA_VARIANTS),
        "action_expert_variant": fields.text("action_expert_variant", "gemma_300m", choices=_GEMMA_VARIANTS),
        "use_relative_actions": fields.boolean("use_relative_actions", default=False),
    }


def _features(fields: Fields, key: str) -> Fields:
    features = (
        fields.object(key, {}) if fields.data.get(key) is not None else Fields({}, f"{fields.where}: {key}")
    )
    for name in features.data:
        if not name or len(name) > 200 or not name.isprintable():
            raise CheckpointError(f"{features.where}: feature name {show(name)} is not printable text")
        feature = features.object(name)
        feature.text("type", choices=FEATURE_TYPES)
        feature.sizes("shape")
    return features


def _vector(features: Fields, name: str, kind: str, values: Mapping[str, Any]) -> int:
    limit = int(values[f"max_{kind.lower()}_dim"])
    if name not in features.data and values["type"] != "smolvla":
        return limit  # π0 and π0.5 take the padded width when a feature is not stated
    feature = features.object(name)
    if feature.text("type") != kind:
        raise CheckpointError(f"{feature.where}: type: expected {kind}, got {feature.text('type')}")
    (size,) = feature.sizes("shape", length=1)
    if size > limit:
        raise CheckpointError(f"{feature.where}: {size} values, at most {limit} fit (max_{kind.lower()}_dim)")
    return size


def _cameras(features: Fields) -> dict[str, tuple[int, int]]:
    """Cameras in the model's order; "empty" ones are always masked, and a masked image changes nothing."""
    sizes: dict[str, tuple[int, int]] = {}
    for name in features.data:
        feature = features.object(name)
        if feature.text("type") != "VISUAL" or name.startswith(EMPTY_CAMERA):
            continue
        shape = feature.sizes("shape", length=3, high=1 << 14)
        if 3 not in (shape[0], shape[2]):
            raise UnsupportedError(
                f"{feature.where}: shape {list(shape)} is not supported; supported: [3, height, width] (RGB)"
            )
        # Some data sets state (height, width, 3), which LeRobot does not look at.
        sizes[name] = (shape[1], shape[2]) if shape[0] == 3 else (shape[0], shape[1])
    return sizes
