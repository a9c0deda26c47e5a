"""A LeRobot policy directory, read and validated before anything of the weights' size is allocated.

    config.json                  the policy family and its sizes
    model.safetensors            weights; or model.safetensors.index.json and its shards
    policy_preprocessor.json     processor pipelines, with their *.safetensors states
    policy_postprocessor.json
    tokenizer/                   the tokenizer; or it is in the Hugging Face cache
    vla_infer.json               optional: {"architecture": {...}}, sizes that a real checkpoint takes from
                                 its variant's name

Only JSON and safetensors are read. Every file name found in a file must be a plain name: nothing outside the
directory is opened on a file's word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.errors import CheckpointError
from vla_infer.hub import find_policy
from vla_infer.json_io import (
    MAX_TOKENIZER_BYTES,
    Fields,
    is_plain_name,
    load_json_object,
    read_small_file,
    show,
)
from vla_infer.policy_config import parse_config
from vla_infer.safetensors_io import (
    SafetensorsFile,
    TensorInfo,
    open_safetensors,
    read_prefixes,
    read_tensor,
    to_float32,
)
from vla_infer.tensor_names import canonical_tensors

PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_SHARDS = 256
_MAX_STEPS = 64
#: Bytes of every tensor that enter the fingerprint.
_FINGERPRINT_BYTES = 256
_MIGRATION = "python -m lerobot.processor.migrate_policy_normalization --pretrained-path"


@dataclass(frozen=True)
class ProcessorStep:
    """One entry of a processor pipeline as its JSON states it."""

    name: str
    config: Fields
    state_file: str | None
    artifacts: Mapping[str, str]
    where: str


@dataclass(frozen=True)
class Checkpoint:
    """A validated policy directory. `read` reads one tensor at a time; nothing is kept open or mapped."""

    path: Path
    family: str
    #: config.json, with LeRobot's defaults for the known keys that it lacks.
    config: dict[str, Any]
    #: "architecture" of vla_infer.json, or None.
    architecture: dict[str, Any] | None
    #: Image features in the model's order, without LeRobot's always-masked "empty" cameras.
    cameras: tuple[str, ...]
    #: (height, width) in the training data, by camera.
    camera_sizes: dict[str, tuple[int, int]]
    state_dim: int
    action_dim: int
    #: Weights by canonical name (`vla_infer.tensor_names`).
    tensors: Mapping[str, TensorInfo]
    preprocessor: tuple[ProcessorStep, ...]
    postprocessor: tuple[ProcessorStep, ...]
    #: SHA-256 over the JSON files as parsed, the tokenizer in the directory, the headers and sizes of the
    #: safetensors files and the first 256 bytes of every tensor: cheap to compute, equal for copies of a
    #: policy, and different for two trainings of one; not a proof that every byte is the same.
    fingerprint: str
    _states: Mapping[str, SafetensorsFile] = field(repr=False, default_factory=dict)

    @property
    def horizon(self) -> int:
        """Actions in one chunk (chunk_size)."""
        return int(self.config["chunk_size"])

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in set(self.tensors.values()))

    def info(self, name: str) -> TensorInfo:
        """Where a tensor is.

        Raises:
            CheckpointError: the weights have no such tensor.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path / WEIGHTS}: tensor {name} is missing") from None

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError when it is missing."""
        return self.info(name).shape

    def count(self, prefix: str) -> int:
        """How many layers there are under `prefix`: tensors are named `<prefix>.<number>.…`, numbered from 0.

        Raises:
            CheckpointError: there is none, or a number is missing between the first and the last.
        """
        start = len(prefix) + 1
        found = {name[start:].split(".", 1)[0] for name in self.tensors if name.startswith(prefix + ".")}
        numbers = {int(part) for part in found if part.isascii() and part.isdigit() and len(part) < 5}
        if not numbers or numbers != set(range(len(numbers))):
            raise CheckpointError(
                f"{self.path / WEIGHTS}: layers {prefix}.0, .1, … are missing or have a gap"
            )
        return len(numbers)

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor as an array of its own: float32 for F32, uint16 bit patterns for BF16 and F16.

        Raises:
            CheckpointError: the tensor is missing, or its file changed since it was validated.
        """
        return read_tensor(self.info(name))

    def read_state(self, state_file: str) -> dict[str, npt.NDArray[np.float32]]:
        """The tensors of a processor's state file as float32, by name."""
        return {
            name: to_float32(read_tensor(info), info.dtype)
            for name, info in self._states[state_file].tensors.items()
        }


def read_checkpoint(path: str | Path, *, revision: str = "main", download: bool = False) -> Checkpoint:
    """Read and validate a policy; its weights are not read yet.

    Args:
        path: a directory as LeRobot saves it, or a hub id (`org/name`) that is in the Hugging Face cache.
        revision: branch, tag or commit of a hub id.
        download: fetch a hub id that is not in the cache (needs the `huggingface_hub` package).

    Raises:
        CheckpointError: a file is missing or not valid; one line with file, key and mend.
        UnsupportedError: a policy, or an option of it, that this package does not run.
    """
    root = find_policy(path, revision=revision, download=download)
    if not (root / "config.json").exists():
        inner = root / "pretrained_model"
        hint = f"; did you mean {inner}" if (inner / "config.json").exists() else ""
        raise CheckpointError(f"{root}: no config.json, so not a LeRobot policy directory{hint}")
    family = parse_config(load_json_object(root / "config.json"), str(root / "config.json")).family
    files = _open_weights(root)
    stored = {name: info for file in files for name, info in file.tensors.items()}
    tensors = canonical_tensors(family, stored, root)
    return assemble_checkpoint(root, tensors, _sample(files))


def assemble_checkpoint(root: Path, tensors: Mapping[str, TensorInfo], weights: str) -> Checkpoint:
    """The checkpoint of a directory whose weights are known already.

    Args:
        root: the policy's directory.
        tensors: its weights.
        weights: text that identifies them, for the fingerprint.
    """
    raw_config = load_json_object(root / "config.json")
    config = parse_config(raw_config, str(root / "config.json"))
    architecture = _read_architecture(root)
    pipelines = [_read_pipeline(root, name, tensors) for name in (PREPROCESSOR, POSTPROCESSOR)]
    states = {
        step.state_file: open_safetensors(root / step.state_file)
        for _, steps in pipelines
        for step in steps
        if step.state_file is not None
    }
    identity: list[Any] = [raw_config, architecture, *(document for document, _ in pipelines)]
    identity += [weights, _sample(list(states.values()))]
    tokenizer = root / "tokenizer" / "tokenizer.json"
    if tokenizer.exists():
        identity.append(hashlib.sha256(read_small_file(tokenizer, MAX_TOKENIZER_BYTES)).hexdigest())
    return Checkpoint(
        path=root,
        family=config.family,
        config=config.values,
        architecture=architecture,
        cameras=config.cameras,
        camera_sizes=config.camera_sizes,
        state_dim=config.state_dim,
        action_dim=config.action_dim,
        tensors=tensors,
        preprocessor=pipelines[0][1],
        postprocessor=pipelines[1][1],
        fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        _states=states,
    )


def _read_architecture(root: Path) -> dict[str, Any] | None:
    path = root / "vla_infer.json"
    if not path.exists():
        return None
    architecture = Fields(load_json_object(path), str(path)).object("architecture").data
    _check_sizes(architecture, f"{path}: architecture")
    return dict(architecture)


def _check_sizes(node: Mapping[str, Any], where: str) -> None:
    """Numbers of an architecture are sizes or constants: finite and never negative."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            _check_sizes(value, f"{where}: {key}")
        elif isinstance(value, list) or value is None:
            raise CheckpointError(f"{where}: {key}: expected a number, text or object, got {show(value)}")
        elif not isinstance(value, (bool, str)) and not 0 <= value < 1 << 31:
            raise CheckpointError(f"{where}: {key}: expected 0 to 2^31, got {show(value)}")


def _open_weights(root: Path) -> list[SafetensorsFile]:
    if (root / WEIGHTS).exists():
        files = [open_safetensors(root / WEIGHTS)]
        index: dict[str, str] = {}
    elif (root / INDEX).exists():
        index = Fields(load_json_object(root / INDEX), str(root / INDEX)).string_map("weight_map")
        files = [open_safetensors(root / name) for name in _shard_names(root / INDEX, index)]
    else:
        adapter = (root / "adapter_model.safetensors").exists()
        hint = (
            "it holds a PEFT adapter: merge it into its base policy first"
            if adapter
            else "weights are missing"
        )
        raise CheckpointError(f"{root}: neither {WEIGHTS} nor {INDEX}; {hint}")
    seen: dict[str, Path] = {}
    for file in files:
        for name in file.tensors:
            if name in seen:
                raise CheckpointError(f"{file.path}: tensor {name} is also in {seen[name].name}")
            seen[name] = file.path
    for name, shard in index.items():
        if name not in seen or seen[name].name != shard:
            raise CheckpointError(f"{root / INDEX}: tensor {name} is not in {shard}")
    if not seen:
        raise CheckpointError(f"{root}: the weights hold no tensor")
    return files


def _shard_names(index: Path, weight_map: Mapping[str, str]) -> list[str]:
    names = sorted(set(weight_map.values()))
    for name in names:
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: shard {show(name)} is not the name of a safetensors file beside it"
            )
    if not 1 <= len(names) <= _MAX_SHARDS:
        raise CheckpointError(f"{index}: {len(names)} shards, expected 1 to {_MAX_SHARDS}")
    return names


def _read_pipeline(
    root: Path, name: str, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, Any], tuple[ProcessorStep, ...]]:
    path = root / name
    if not path.exists():
        old = any("normalize_" in tensor and ".buffer_" in tensor for tensor in tensors)
        why = "its weights hold the normalisation, as LeRobot wrote it before 0.4" if old else "file missing"
        raise CheckpointError(f"{path}: {why}; migrate the policy with: {_MIGRATION} {root}")
    document = load_json_object(path)
    raw = document.get("steps")
    if not isinstance(raw, list) or len(raw) > _MAX_STEPS:
        raise CheckpointError(
            f"{path}: steps: expected a list of at most {_MAX_STEPS} steps, got {show(raw)}"
        )
    return document, tuple(_parse_step(entry, f"{path}: steps[{i}]") for i, entry in enumerate(raw))


def _parse_step(entry: Any, where: str) -> ProcessorStep:
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{where}: expected an object, got {show(entry)}")
    fields = Fields(entry, where)
    # LeRobot names a step by its registry, or by class when it is not registered.
    name = fields.text("class" if "class" in entry and "registry_name" not in entry else "registry_name")
    state_file = entry.get("state_file")
    if state_file is not None and (not is_plain_name(state_file) or not state_file.endswith(".safetensors")):
        raise CheckpointError(f"{where}: state_file {show(state_file)} is not a safetensors file beside it")
    return ProcessorStep(
        name=name,
        config=fields.object("config", {}),
        state_file=state_file,
        artifacts=fields.string_map("artifacts"),
        where=f"{where} ({show(name)[1:-1]})",
    )


def _sample(files: list[SafetensorsFile]) -> str:
    """A digest of headers, sizes and the start of every tensor."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path.name} {file.size} {file.digest}\n".encode())
        tensors = (file.tensors[name] for name in sorted(file.tensors))
        for start in read_prefixes(file.path, tensors, _FINGERPRINT_BYTES):
            digest.update(start)
    return digest.hexdigest()
