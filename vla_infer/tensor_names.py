"""One set of tensor names per policy family, whatever wrote the file.

Canonical are the names of LeRobot 0.6's current files. Also known are openpi's PyTorch files (no "model."
prefix; time MLPs named after the other family), earlier transformers (a "vision_model" level in the vision
tower; `language_model.model`, and the parts of PaliGemma one level higher), torch.compile's "_orig_mod", and
files that keep the token embedding only as the output head that it is tied to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
_NUMBER = re.compile(r"\.\d+\.")
# What files hold beside what is read: output heads, the last norm of the language model (only its keys and values
# are needed), constants, statistics from before LeRobot 0.4, and what LeRobot drops from π0.5's.
_UNUSED = re.compile(
    r".*\.(lm_head\.weight|rotary_emb\.inv_freq|embeddings\.position_ids)"
    r"|.*\.(language_model|text_model)\.norm\.weight"
    r"|(un)?normalize_(inputs|targets|outputs)\..*"
)
_UNUSED_PI05 = re.compile(
    r"model\.state_proj\..*"
    r"|.*\.gemma_expert\.model\.(norm|layers\.\d+\.(input|post_attention)_layernorm)\.weight"
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


def unknown_tensors(family: str, names: Iterable[str], used: Iterable[str]) -> list[str]:
    """Those of `names` that this family has no use for: neither `used`, nor the same tensor of another layer (some
    layers are used in part, or not at all), nor known to be left over."""
    known = {_NUMBER.sub(".0.", name) for name in used}
    left = (name for name in names if _NUMBER.sub(".0.", name) not in known)
    left = (name for name in left if not _UNUSED.fullmatch(name))
    return sorted(name for name in left if family != "pi05" or not _UNUSED_PI05.fullmatch(name))
