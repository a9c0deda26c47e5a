"""The tokenizer of a policy: Hugging Face `tokenizers`, with truncation as stated and never any padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from vla_infer.checkpoint import Checkpoint, ProcessorStep
from vla_infer.errors import CheckpointError, ObservationError, UnsupportedError
from vla_infer.hub import cache_directory, find_in_cache, is_repo_id
from vla_infer.json_io import (
    MAX_TOKENIZER_BYTES,
    Fields,
    is_plain_name,
    load_json_object,
    read_small_file,
    show,
)

_T = TypeVar("_T")


class PromptTokenizer:
    """Text → token ids. Special tokens come from the tokenizer's template only, never from the text.

    Safe to use from several threads.
    """

    def __init__(self, directory: Path, *, max_length: int, vocabulary: int | None) -> None:
        """Load `directory/tokenizer.json`.

        Args:
            directory: holds tokenizer.json, and tokenizer_config.json when it has one.
            max_length: tokens of a prompt, special ones included.
            vocabulary: rows of the policy's token embedding; an id beyond them is an error.
        """
        self.path = directory / "tokenizer.json"
        self.max_length = max_length
        self._vocabulary = vocabulary
        data = read_small_file(self.path, MAX_TOKENIZER_BYTES)
        self._tokenizer: Tokenizer = self._guarded(lambda: Tokenizer.from_str(data.decode("utf-8")))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        path = directory / "tokenizer_config.json"
        config = Fields(load_json_object(path) if path.exists() else {}, str(path))
        self._cut_left = config.text("truncation_side", "right", choices=("left", "right")) == "left"
        self._set_template(config)
        self._special = self._hide_special_tokens()
        self._last: tuple[str, npt.NDArray[np.int32]] | None = None
        self._encoded: tuple[str, list[int], list[int]] | None = None

    def _guarded(self, call: Callable[[], _T]) -> _T:
        # The library reports a malformed file as Exception, or as a Rust panic, which is a BaseException.
        try:
            return call()
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as err:
            reason = "".join(c if c.isprintable() else "?" for c in " ".join(str(err).split())[:200])
            raise CheckpointError(f"{self.path}: not a usable tokenizer ({reason})") from None

    def _set_template(self, config: Fields) -> None:
        """As transformers has it: tokenizer.json says which special tokens frame a text, unless
        tokenizer_config.json states add_bos_token or add_eos_token."""
        if "add_bos_token" not in config.data and "add_eos_token" not in config.data:
            return
        bos, eos = (self._framing_token(config, name) for name in ("bos_token", "eos_token"))
        template = f"{bos + ':0 ' if bos else ''}$A:0{' ' + eos + ':0' if eos else ''}"
        known = [(token, self._tokenizer.token_to_id(token)) for token in (bos, eos) if token]
        self._tokenizer.post_processor = self._guarded(
            lambda: TemplateProcessing(single=template, special_tokens=known)
        )

    def _framing_token(self, config: Fields, name: str) -> str:
        """The text of bos_token or eos_token when it is to be added, else nothing."""
        if not config.data.get(f"add_{name}", False):
            return ""
        value = config.data.get(name)
        token = value.get("content") if isinstance(value, dict) else value
        if not isinstance(token, str) or self._tokenizer.token_to_id(token) is None:
            raise CheckpointError(f"{config.where}: {name}: {show(value)} is not a token of {self.path.name}")
        return token

    def _hide_special_tokens(self) -> frozenset[int]:
        """Make text that spells an added token "<…>" ordinary text; returns the ids that text cannot have."""
        added = self._tokenizer.get_added_tokens_decoder()
        angled = [
            AddedToken(token.content, special=True, normalized=token.normalized)
            for token in added.values()
            if not token.special and token.content.startswith("<") and token.content.endswith(">")
        ]
        if angled:
            self._tokenizer.add_special_tokens(angled)
        self._tokenizer.encode_special_tokens = True
        return frozenset(i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special)

    def count(self, text: str) -> int:
        """Tokens of a prompt before truncation."""
        return len(self._encode(text)[0])

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids (L,) int32 of a prompt, unpadded, cut to `max_length`.

        Raises:
            ObservationError: the text holds something that has no token in the policy's vocabulary.
        """
        last = self._last  # an instruction stays for many observations
        if last is None or last[0] != text:
            last = self._last = (text, self._tokens(text))
        return np.array(last[1])

    def _tokens(self, text: str) -> npt.NDArray[np.int32]:
        ids, template = self._encode(text)
        body = [i for i, special in zip(ids, template, strict=True) if not special]
        if not self._special.isdisjoint(body):
            raise ObservationError(
                "instruction: it holds a special token of the policy's tokenizer; remove it"
            )
        if self._vocabulary is not None and max(ids, default=0) >= self._vocabulary:
            raise ObservationError(
                f"instruction: token {max(ids)} is beyond the policy's vocabulary of {self._vocabulary}"
            )
        if len(ids) > self.max_length:
            ids = self._truncate(ids, template)
        return np.asarray(ids, np.int32)

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        last = self._encoded  # π0.5's prompt, new with each state, is counted and then encoded
        if last is None or last[0] != text:
            encoding = self._tokenizer.encode(text, add_special_tokens=True)
            last = self._encoded = (text, encoding.ids, encoding.special_tokens_mask)
        return last[1], last[2]

    def _truncate(self, ids: list[int], template: list[int]) -> list[int]:
        """Drop tokens of the text, from its end or its start, and keep the template's own."""
        excess = len(ids) - self.max_length
        order = range(len(ids)) if self._cut_left else range(len(ids) - 1, -1, -1)
        dropped = set([i for i in order if not template[i]][:excess])
        return [token for i, token in enumerate(ids) if i not in dropped]


def find_tokenizer(ckpt: Checkpoint, step: ProcessorStep) -> Path:
    """The directory with a policy's tokenizer.json.

    In this order: the artifact that the step names, `tokenizer_name` as a directory inside the policy,
    `tokenizer/`, and `tokenizer_name` as a hub id in the Hugging Face cache.

    Raises:
        CheckpointError: it is nowhere; the message says how to get it.
    """
    name = step.config.text("tokenizer_name", "tokenizer")
    for candidate in (step.artifacts.get("tokenizer_name", "tokenizer"), name, "tokenizer"):
        parts = Path(candidate).parts
        if parts and all(is_plain_name(part) for part in parts):
            directory = ckpt.path.joinpath(*parts)
            if (directory / "tokenizer.json").exists():
                return directory
    if not is_repo_id(name):
        raise CheckpointError(
            f"{step.where}: no tokenizer.json in {ckpt.path / 'tokenizer'}; copy that of {show(name)} there"
        )
    cached = find_in_cache(name)
    if cached is not None and (cached / "tokenizer.json").exists():
        return cached
    raise CheckpointError(
        f"{step.where}: tokenizer {name} is neither in {ckpt.path / 'tokenizer'} nor in the Hugging Face "
        f"cache ({cache_directory()}); get it with: hf download {name} tokenizer.json tokenizer_config.json"
    )


def load_tokenizer(ckpt: Checkpoint, step: ProcessorStep) -> PromptTokenizer:
    """The tokenizer that a `tokenizer_processor` step describes."""
    config = step.config
    if config.text("task_key", "task") != "task":
        raise UnsupportedError(f"{step.where}: task_key {show(config.data['task_key'])} is not supported")
    if not config.boolean("truncation", default=True):
        raise UnsupportedError(f"{step.where}: truncation = false is not supported; supported: true")
    if config.text("padding_side", "right", choices=("left", "right")) != "right":
        raise UnsupportedError(f"{step.where}: padding_side = left is not supported; supported: right")
    embedding = [i for name, i in ckpt.tensors.items() if name.endswith("embed_tokens.weight")]
    return PromptTokenizer(
        find_tokenizer(ckpt, step),
        max_length=config.integer("max_length", 512, high=4096),
        vocabulary=embedding[0].shape[0] if embedding else None,
    )
