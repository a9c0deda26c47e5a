"""One set of tensor names per policy family, whatever wrote the file.

Canonical are the names of LeRobot 0.6's current files. Also known are openpi's PyTorch files (no "model."
prefix; time MLPs named after the other family), earlier transformers (a "vision_model" level in the vision
tower; `language_model.model`, and the parts of PaliGemma one level higher), torch.compile's "_orig_mod", and
files that keep the token embedding only as the output head that it is tied to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from vla_infer.errors import CheckpointError
from vla_infer.safetensors_io import TensorInfo

_PALIGEMMA = "model.paligemma_with_expert.paligemma."
_HEAD = _PALIGEMMA + "lm_head.weight"
_EMBEDDING = _PALIGEMMA + "model.language_model.embed_tokens.weight"
_TIME_MLP = re.compile(r"model\.(?:action_)?time_mlp_(in|out)\.")
_OLD_PARTS = re.compile(
    re.escape(_PALIGEMMA) + r"(language_model\.model|vision_tower|multi_modal_projector)\."
)


def canonical_name(family: str, name: str) -> str:
    """The name under which this package knows a tensor."""
    name = name.replace("_orig_mod.", "")
    if family == "smolvla":
        return name
    if not name.startswith("model."):
        name = f"model.{name}"
    name = _TIME_MLP.sub(r"model.time_mlp_\1." if family == "pi05" else r"model.action_time_mlp_\1.", name)
    old = _OLD_PARTS.match(name)
    if old is not None:
        part = old[1].removesuffix(".model")
        name = f"{_PALIGEMMA}model.{part}.{name[old.end() :]}"
    return name.replace(".vision_tower.vision_model.", ".vision_tower.")


def canonical_tensors(family: str, tensors: Mapping[str, TensorInfo], where: Path) -> dict[str, TensorInfo]:
    """Tensors by canonical name.

    Raises:
        CheckpointError: two tensors have the same canonical name.
    """
    result: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        known = canonical_name(family, name)
        if known in result:
            raise CheckpointError(f"{where}: tensors {result[known].name} and {name} are both {known}")
        result[known] = info
    if _EMBEDDING not in result and _HEAD in result:
        result[_EMBEDDING] = result[_HEAD]
    return result
