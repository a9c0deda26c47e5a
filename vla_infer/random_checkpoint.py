"""A policy with random weights in LeRobot's form: for measuring, and for tests that need a whole checkpoint.

    python -m vla_infer.random_checkpoint smolvla OUT_DIR [--seed 0] [--cameras 2] [--small]

writes config.json, model.safetensors (bfloat16), both processors with statistics, and a small byte-level
tokenizer, made by the code below. Full size is SmolVLA 450M, π0 and π0.5 with PaliGemma 3B; `--small` has the
sizes of the golden policies. Memory stays below 1 GB: tensors are made and written in blocks.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.checkpoint import WEIGHTS, Checkpoint, assemble_checkpoint, read_checkpoint
from vla_infer.errors import VlaInferError
from vla_infer.policy_config import FAMILIES
from vla_infer.policy_files import STATE_DIM, policy_config, write_json, write_processors
from vla_infer.random_weights import (
    Sizes,
    full_sizes,
    random_blocks,
    random_tensor,
    small_sizes,
    tensor_shapes,
)
from vla_infer.safetensors_io import TensorInfo, write_safetensors

_CAMERA_NAMES = ("top", "wrist", "left", "right", "front", "back", "side", "overhead")
_PHRASES = (
    "Task: pick up the red cube and place it in the box, State: ;\nAction: ",
    "open the drawer, then put the green cup on the plate",
    "stack the yellow block on the blue block and close the gripper",
    "push the button, fold the towel, hand over the bottle, wipe the table",
)
_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


def write_random_checkpoint(
    directory: str | Path,
    family: str,
    *,
    seed: int = 0,
    small: bool = False,
    cameras: int = 2,
    weights: bool = True,
) -> Path:
    """Write a random policy directory.

    Args:
        directory: made when it is missing; files of a policy in it are replaced.
        family: "smolvla", "pi0" or "pi05".
        seed: of the weights and the statistics.
        small: the golden policies' sizes instead of full size.
        cameras: 1 to 8 of them.
        weights: without, everything but model.safetensors (see `random_policy`).
    """
    if family not in FAMILIES or not 1 <= cameras <= len(_CAMERA_NAMES):
        raise ValueError(f"family {family!r} of {FAMILIES}, {cameras} cameras of 1 to {len(_CAMERA_NAMES)}")
    root = Path(directory)
    sizes = small_sizes(family) if small else full_sizes(family)
    (root / "tokenizer").mkdir(parents=True, exist_ok=True)
    config = policy_config(family, sizes, _CAMERA_NAMES[:cameras])
    write_json(root / "config.json", config)
    write_processors(root, config, _statistics(np.random.default_rng(seed)))
    write_json(root / "tokenizer" / "tokenizer.json", make_tokenizer(add_bos=family != "smolvla"))
    architecture = root / "vla_infer.json"
    if small:  # the head size of 64 cannot be told from the tensors' shapes
        write_json(architecture, {"architecture": _architecture(family, sizes)})
    else:
        architecture.unlink(missing_ok=True)
    if weights:
        shapes = tensor_shapes(family, sizes)
        layout = {name: ("BF16", shape) for name, shape in shapes.items()}
        blocks = (random_blocks(name, shape, seed) for name, shape in shapes.items())
        write_safetensors(root / WEIGHTS, layout, blocks, {"format": "pt"})
    return root


@dataclass(frozen=True)
class _RandomCheckpoint(Checkpoint):
    """A checkpoint whose weights are made when they are read."""

    seed: int = 0

    def read(self, name: str) -> npt.NDArray[Any]:
        return random_tensor(name, self.info(name).shape, self.seed)


def random_policy(directory: str | Path, family: str, *, seed: int = 0, small: bool = False) -> Checkpoint:
    """A checkpoint of two cameras whose weights are made on the fly, equal to those that would be written.

    Args:
        directory: where its small files (configuration, processors, tokenizer) are written; they are needed as
            long as it takes to build its processors.
        family, seed, small: as for `write_random_checkpoint`.
    """
    root = write_random_checkpoint(directory, family, seed=seed, small=small, weights=False)
    shapes = tensor_shapes(family, small_sizes(family) if small else full_sizes(family))
    tensors = {
        name: TensorInfo(name, "BF16", shape, root / WEIGHTS, 0, 2 * math.prod(shape), (0, 0))
        for name, shape in shapes.items()
    }
    base = assemble_checkpoint(root, tensors, f"random {seed}")
    return _RandomCheckpoint(
        **{item.name: getattr(base, item.name) for item in fields(Checkpoint)}, seed=seed
    )


def _statistics(rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    """Statistics of joints in degrees."""
    stats: dict[str, npt.NDArray[np.float32]] = {}
    for key in ("action", "observation.state"):
        mean, std = rng.normal(0, 20, STATE_DIM), rng.uniform(5, 35, STATE_DIM)
        values = {"mean": mean, "std": std, "min": mean - 3 * std, "max": mean + 3 * std}
        values |= {"q01": mean - 2 * std, "q10": mean - std, "q90": mean + std, "q99": mean + 2 * std}
        stats |= {f"{key}.{name}": value.astype(np.float32) for name, value in values.items()}
    return stats


def make_tokenizer(*, add_bos: bool, merges: int = 96) -> dict[str, Any]:
    """A byte-level BPE tokenizer.json: three special tokens, 256 bytes, and merges learnt from a few phrases.

    Merges follow Sennrich et al. 2016: again and again the most frequent pair of neighbours becomes a symbol.
    """
    alphabet = _byte_alphabet()
    words = Counter(
        "".join(alphabet[byte] for byte in part.encode())
        for phrase in _PHRASES
        for part in (("" if i == 0 else " ") + word for i, word in enumerate(phrase.split(" ")))
    )
    spelled = {word: list(word) for word in words}
    learnt: list[list[str]] = []
    while len(learnt) < merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in ((symbols[i], symbols[i + 1]) for i in range(len(symbols) - 1)):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learnt.append(list(best))
        spelled = {word: _merge(symbols, best) for word, symbols in spelled.items()}
    tokens = [*_SPECIAL_TOKENS, *sorted(alphabet), *dict.fromkeys(left + right for left, right in learnt)]
    template: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special: dict[str, Any] = {}
    if add_bos:
        template.insert(0, {"SpecialToken": {"id": "<bos>", "type_id": 0}})
        special = {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(_SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": bytes_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": special,
        },
        "decoder": bytes_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": learnt,
        },
    }


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself when it is printable Latin-1, else from U+0100 on."""
    spare = iter(range(0x100, 0x200))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(symbols):
        together = tuple(symbols[i : i + 2]) == pair
        merged.append("".join(pair) if together else symbols[i])
        i += 2 if together else 1
    return merged


def _architecture(family: str, sizes: Sizes) -> dict[str, Any]:
    v, t, e = sizes.vision, sizes.text, sizes.expert
    vision = {
        "hidden_size": v.hidden,
        "num_hidden_layers": v.layers,
        "num_attention_heads": v.heads,
        "patch_size": v.patch,
        "intermediate_size": v.mlp,
        "image_size": v.image,
    }
    if family == "smolvla":
        text = {
            "hidden_size": t.width,
            "intermediate_size": t.mlp,
            "num_attention_heads": t.heads,
            "num_key_value_heads": t.kv_heads,
            "head_dim": t.head_dim,
            "num_hidden_layers": t.depth,
            "vocab_size": sizes.vocabulary,
        }
        return {"vision": vision, "text": text, "scale_factor": sizes.scale_factor, "num_vlm_layers": t.depth}
    names = {"width": "width", "depth": "depth", "mlp": "mlp_dim", "heads": "num_heads"}
    names |= {"kv_heads": "num_kv_heads", "head_dim": "head_dim"}
    text, expert = ({key: getattr(d, name) for name, key in names.items()} for d in (t, e))
    return {"vision": vision, "text": text, "expert": expert, "vocab_size": sizes.vocabulary}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vla_infer.random_checkpoint", description=__doc__.split("\n")[0]
    )
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("directory", type=Path, help="where to write the policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cameras", type=int, default=2, choices=range(1, len(_CAMERA_NAMES) + 1))
    parser.add_argument("--small", action="store_true", help="the sizes of the golden policies")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        write_random_checkpoint(
            options.directory, options.family, seed=options.seed, small=options.small, cameras=options.cameras
        )
        ckpt = read_checkpoint(options.directory)
    except (OSError, ValueError, VlaInferError) as err:
        print(f"random_checkpoint: {err}", file=sys.stderr)
        return 1
    millions = sum(math.prod(info.shape) for info in ckpt.tensors.values()) / 1e6
    print(
        f"{options.directory}: {options.family}, {len(ckpt.tensors)} tensors, {millions:.1f} M parameters, "
        f"{ckpt.weight_bytes / 1e6:.1f} MB, {time.monotonic() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
