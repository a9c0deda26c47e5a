"""Checkpoints: what a good directory gives, and that a bad one gives one typed line and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vla_infer.checkpoint import Checkpoint, read_checkpoint
from vla_infer.errors import CheckpointError, UnsupportedError, VlaInferError
from vla_infer.hub import cache_directory, find_in_cache
from vla_infer.processors import build_processors
from vla_infer.random_checkpoint import main as random_checkpoint_main
from vla_infer.random_checkpoint import random_policy, write_random_checkpoint
from vla_infer.random_weights import full_sizes, random_tensor, small_sizes, tensor_shapes
from vla_infer.safetensors_io import open_safetensors, read_tensor, write_safetensors

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("smolvla", "pi0", "pi05")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A copy of the golden SmolVLA policy, to be spoiled."""
    return Path(shutil.copytree(GOLDEN / "smolvla", tmp_path / "policy"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def refused(path: Path, error: type[VlaInferError], message: str) -> None:
    with pytest.raises(error, match=message) as info:
        build_processors(read_checkpoint(path))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_policies(family: str) -> None:
    ckpt = read_checkpoint(GOLDEN / family)
    assert ckpt.family == family
    assert ckpt.cameras == ("observation.images.top", "observation.images.wrist")
    assert ckpt.camera_sizes["observation.images.top"] == (48, 80)
    assert (ckpt.state_dim, ckpt.action_dim, ckpt.horizon) == (6, 6, 10)
    assert ckpt.config["num_steps"] == 10
    assert ckpt.architecture is not None
    assert ckpt.architecture["vision"]["num_attention_heads"] == 2
    name = "model.action_in_proj.weight"
    array = ckpt.read(name)
    assert (array.dtype, array.shape) == (np.uint16, ckpt.shape_of(name))
    assert array.flags.owndata
    assert ckpt.weight_bytes == sum(ckpt.read(n).nbytes for n in ckpt.tensors)
    with pytest.raises(CheckpointError, match=r"model\.nothing is missing"):
        ckpt.read("model.nothing")


@pytest.mark.parametrize("family", ["pi0", "pi05"])
@pytest.mark.parametrize("style", ["openpi", "transformers 4.48", "tied head", "compiled"])
def test_other_names_of_the_same_weights(family: str, style: str, tmp_path: Path) -> None:
    golden = read_checkpoint(GOLDEN / family)
    root = "model.paligemma_with_expert.paligemma."

    def other(name: str) -> str:
        if style == "compiled":
            return name.replace("model.", "model._orig_mod.", 1)
        if style == "tied head":
            return name.replace("model.language_model.embed_tokens.weight", "lm_head.weight")
        name = name.replace(".vision_tower.", ".vision_tower.vision_model.")
        if style == "openpi":
            swapped = {"time_mlp": "action_time_mlp"} if family == "pi05" else {"action_time_mlp": "time_mlp"}
            for ours, theirs in swapped.items():
                name = name.replace(f"model.{ours}", f"model.{theirs}")
            return name.removeprefix("model.")
        name = name.replace(f"{root}model.language_model.", f"{root}language_model.model.")
        return name.replace(f"{root}model.", root)

    policy = Path(shutil.copytree(GOLDEN / family, tmp_path / "p"))
    layout = {other(n): (i.dtype, i.shape) for n, i in golden.tensors.items()}
    write_safetensors(policy / "model.safetensors", layout, (golden.read(n) for n in golden.tensors))
    assert set(layout) != set(golden.tensors)
    ckpt = read_checkpoint(policy)
    assert set(golden.tensors) <= set(ckpt.tensors)
    assert all(np.array_equal(ckpt.read(n), golden.read(n)) for n in golden.tensors)


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    policy = Path(shutil.copytree(GOLDEN / "pi0", tmp_path / "p"))
    layout = {"state_proj.bias": ("F32", (1,)), "model.state_proj.bias": ("F32", (1,))}
    write_safetensors(policy / "model.safetensors", layout, [np.zeros(1, np.float32)] * 2)
    refused(policy, CheckpointError, r"are both model\.state_proj\.bias")


def test_counts_layers(policy: Path) -> None:
    ckpt = read_checkpoint(GOLDEN / "smolvla")
    assert ckpt.count("model.vlm_with_expert.vlm.model.vision_model.encoder.layers") == 3
    assert ckpt.count("model.vlm_with_expert.vlm.model.text_model.layers") == 4
    with pytest.raises(CheckpointError, match="missing or have a gap"):
        ckpt.count("model.vlm_with_expert.vlm.model.text_model")
    layout = {f"model.layers.{i}.w": ("F32", (1,)) for i in (0, 1, 3)}
    write_safetensors(policy / "model.safetensors", layout, [np.zeros(1, np.float32)] * 3)
    with pytest.raises(CheckpointError, match="missing or have a gap"):
        read_checkpoint(policy).count("model.layers")


def test_reading_a_checkpoint_does_not_read_its_weights(policy: Path) -> None:
    tracemalloc.start()
    try:
        ckpt = read_checkpoint(policy)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < ckpt.weight_bytes / 5


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("type", "act", UnsupportedError, "type 'act' is not supported; supported: smolvla, pi0, pi05"),
        ("type", 3, CheckpointError, "type: expected a string"),
        ("n_obs_steps", 2, UnsupportedError, "n_obs_steps"),
        ("n_obs_steps", True, UnsupportedError, "n_obs_steps"),
        ("use_peft", True, UnsupportedError, "use_peft"),
        ("chunk_size", 0, CheckpointError, "chunk_size: expected an integer from 1"),
        ("chunk_size", 10.0, CheckpointError, "chunk_size"),
        ("chunk_size", "10", CheckpointError, "chunk_size"),
        ("chunk_size", True, CheckpointError, "chunk_size"),
        ("chunk_size", None, CheckpointError, "chunk_size"),
        ("chunk_size", 10**30, CheckpointError, "chunk_size"),
        ("n_action_steps", 11, CheckpointError, "above chunk_size"),
        ("max_state_dim", 5, CheckpointError, "6 values, at most 5 fit"),
        ("max_action_dim", 5, CheckpointError, "6 values, at most 5 fit"),
        ("min_period", 5.0, CheckpointError, "not below max_period"),
        ("min_period", -1, CheckpointError, "min_period: expected a number above 0"),
        ("rtc_config", 3, CheckpointError, "rtc_config"),
        ("normalization_mapping", {"STATE": "SQUARE"}, CheckpointError, "expected one of IDENTITY"),
        ("normalization_mapping", {"FOOT": "IDENTITY"}, CheckpointError, "unknown feature type 'FOOT'"),
        ("normalization_mapping", {"VISUAL": "MEAN_STD"}, UnsupportedError, "VISUAL"),
        ("adapt_to_pi_aloha", True, UnsupportedError, "adapt_to_pi_aloha"),
        ("use_delta_joint_actions_aloha", True, UnsupportedError, "use_delta_joint_actions_aloha"),
        ("add_image_special_tokens", True, UnsupportedError, "add_image_special_tokens"),
        ("add_image_special_tokens", 0, UnsupportedError, "add_image_special_tokens"),
        ("use_cache", False, UnsupportedError, "use_cache"),
        ("attention_mode", "linear", UnsupportedError, "attention_mode"),
        ("prefix_length", 300, UnsupportedError, "prefix_length"),
        ("num_expert_layers", 3, CheckpointError, "does not divide num_vlm_layers 4"),
        ("resize_imgs_with_padding", None, UnsupportedError, "resize_imgs_with_padding"),
        ("resize_imgs_with_padding", [64], CheckpointError, "resize_imgs_with_padding: expected 2 positive"),
        ("expert_width_multiplier", 0, CheckpointError, "expert_width_multiplier"),
        ("num_steps", 0, CheckpointError, "num_steps"),
        ("tokenizer_max_length", -4, CheckpointError, "tokenizer_max_length"),
        ("input_features", [], CheckpointError, "input_features: expected an object"),
        ("input_features", {}, CheckpointError, r"observation\.state is missing"),
        ("output_features", {}, CheckpointError, "action is missing"),
        ("output_features", {"action": {"type": "ACTION", "shape": []}}, CheckpointError, "shape"),
        ("output_features", {"action": {"type": "STATE", "shape": [6]}}, CheckpointError, "expected ACTION"),
        ("output_features", {"action": {"type": "ACTION", "shape": [6, 2]}}, CheckpointError, "shape"),
    ],
)
def test_config_values_that_are_refused(
    policy: Path, key: str, value: Any, error: type[VlaInferError], message: str
) -> None:
    edit(policy / "config.json", lambda c: c.__setitem__(key, value))
    refused(policy, error, message)


@pytest.mark.parametrize("key", ["use_visual_memory", "use_proprioceptive_memory"])
def test_pi05_memory_is_refused(tmp_path: Path, key: str) -> None:
    policy = Path(shutil.copytree(GOLDEN / "pi05", tmp_path / "p"))
    edit(policy / "config.json", lambda c: c.update({key: True}))
    refused(policy, UnsupportedError, key)


def test_cameras(policy: Path) -> None:
    def features(**cameras: list[int]) -> Callable[[Any], object]:
        entries = {f"observation.images.{n}": {"type": "VISUAL", "shape": s} for n, s in cameras.items()}
        state = {"observation.state": {"type": "STATE", "shape": [6]}}
        return lambda c: c.__setitem__("input_features", {**entries, **state})

    edit(policy / "config.json", features(left=[8, 9, 3], empty_camera_0=[3, 8, 9], right=[3, 7, 6]))
    ckpt = read_checkpoint(policy)
    assert ckpt.cameras == ("observation.images.left", "observation.images.right")
    assert list(ckpt.camera_sizes.values()) == [(8, 9), (7, 6)]
    edit(policy / "config.json", features(depth=[1, 8, 9]))
    refused(policy, UnsupportedError, r"shape \[1, 8, 9\] is not supported")
    edit(policy / "config.json", features(empty_camera_0=[3, 8, 9]))
    refused(policy, CheckpointError, "has no camera")


def test_missing_and_unknown_keys(policy: Path) -> None:
    """Older LeRobot writes fewer keys, newer ones more."""

    def change(config: Any) -> None:
        for key in ("num_steps", "attention_mode", "prefix_length", "self_attn_every_n_layers", "rtc_config"):
            del config[key]
        config["something_of_next_year"] = {"x": 1}

    edit(policy / "config.json", change)
    config = read_checkpoint(policy).config
    assert (config["num_steps"], config["prefix_length"], config["self_attn_every_n_layers"]) == (10, -1, 2)


def test_π0_takes_the_padded_width_for_features_it_does_not_state(tmp_path: Path) -> None:
    policy = Path(shutil.copytree(GOLDEN / "pi0", tmp_path / "p"))

    def change(config: Any) -> None:
        del config["input_features"]["observation.state"]
        config["output_features"] = None

    edit(policy / "config.json", change)
    ckpt = read_checkpoint(policy)
    assert (ckpt.state_dim, ckpt.action_dim) == (32, 32)


def test_architecture_file_is_optional_and_checked(policy: Path) -> None:
    file = policy / "vla_infer.json"
    for bad in ('{"architecture": []}', '{"architecture": {"a": [1]}}', '{"architecture": {"a": -1}}', "{}"):
        file.write_text(bad)
        refused(policy, CheckpointError, "architecture")
    file.unlink()
    assert read_checkpoint(policy).architecture is None


def split(policy: Path, shards: dict[str, list[str]]) -> None:
    """Replace model.safetensors by shards and their index."""
    file = open_safetensors(policy / "model.safetensors")
    for shard, names in shards.items():
        layout = {n: (file.tensors[n].dtype, file.tensors[n].shape) for n in names}
        write_safetensors(policy / shard, layout, (read_tensor(file.tensors[n]) for n in names))
    index = {name: shard for shard, names in shards.items() for name in names}
    (policy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (policy / "model.safetensors").unlink()


def test_shards(policy: Path) -> None:
    whole = read_checkpoint(policy)
    names = list(whole.tensors)
    split(policy, {"a.safetensors": names[::2], "b.safetensors": names[1::2]})
    ckpt = read_checkpoint(policy)
    assert set(ckpt.tensors) == set(names)
    assert all(
        np.array_equal(ckpt.read(n), whole_read) for n, whole_read in golden_weights(names[:4]).items()
    )

    index = policy / "model.safetensors.index.json"
    edit(index, lambda i: i["weight_map"].__setitem__(names[0], "b.safetensors"))
    refused(policy, CheckpointError, f"tensor {names[0]} is not in b.safetensors")
    shutil.copy(policy / "a.safetensors", policy / "b.safetensors")
    refused(policy, CheckpointError, "is also in a.safetensors")
    index.write_text('{"weight_map": {}}')
    refused(policy, CheckpointError, "0 shards")


def golden_weights(names: list[str]) -> dict[str, Any]:
    file = open_safetensors(GOLDEN / "smolvla" / "model.safetensors")
    return {name: read_tensor(file.tensors[name]) for name in names}


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..",
        "",
        "a.bin",
        "a\\b.safetensors",
        "a\0.safetensors",
    ],
)
def test_file_names_cannot_leave_the_directory(policy: Path, name: str) -> None:
    pre = policy / "policy_preprocessor.json"
    good = pre.read_text()
    edit(pre, lambda p: p["steps"][5].__setitem__("state_file", name))
    refused(policy, CheckpointError, "is not a safetensors file beside it")
    pre.write_text(good)
    (policy / "model.safetensors").rename(policy / "w.safetensors")
    (policy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    refused(policy, CheckpointError, "is not the name of a safetensors file beside it")


def test_tokenizer_artifact_cannot_leave_the_directory(policy: Path) -> None:
    outside = policy.parent / "tokenizer"
    (policy / "tokenizer").rename(outside)

    def change(pipeline: Any) -> None:
        step = pipeline["steps"][3]
        step["artifacts"]["tokenizer_name"] = "../tokenizer"
        step["config"]["tokenizer_name"] = str(outside)

    edit(policy / "policy_preprocessor.json", change)
    refused(policy, CheckpointError, r"no tokenizer\.json in .*; copy that of")


def test_missing_files_name_the_mend(policy: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", CheckpointError, "no such directory")
    refused(policy / "config.json", CheckpointError, "got a file; give the directory it is in")
    refused(tmp_path, CheckpointError, r"no config\.json")
    (tmp_path / "train").mkdir()
    shutil.copytree(policy, tmp_path / "train" / "pretrained_model")
    refused(tmp_path / "train", CheckpointError, "did you mean .*pretrained_model")
    (policy / "policy_postprocessor_step_0_unnormalizer_processor.safetensors").unlink()
    refused(policy, CheckpointError, "No such file")
    (policy / "policy_preprocessor.json").unlink()
    refused(policy, CheckpointError, "migrate_policy_normalization")
    (policy / "model.safetensors").unlink()
    refused(policy, CheckpointError, "weights are missing")
    (policy / "adapter_model.safetensors").write_bytes(b"")
    refused(policy, CheckpointError, "merge it into its base policy")


def test_old_checkpoint_with_normalisation_in_its_weights(policy: Path) -> None:
    layout = {"normalize_inputs.buffer_observation_state.mean": ("F32", (6,))}
    write_safetensors(policy / "model.safetensors", layout, [np.zeros(6, np.float32)])
    (policy / "policy_preprocessor.json").unlink()
    refused(policy, CheckpointError, "its weights hold the normalisation.*migrate_policy_normalization")


def test_truncated_weights_and_huge_claims(policy: Path) -> None:
    weights = policy / "model.safetensors"
    size = weights.stat().st_size
    for percent in range(0, 100, 7):
        os.truncate(weights, size * percent // 100)
        refused(policy, CheckpointError, str(weights))
        shutil.copy(GOLDEN / "smolvla" / "model.safetensors", weights)
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    weights.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(policy, CheckpointError, "it is cut, download it again")


def test_fingerprint(policy: Path) -> None:
    original = read_checkpoint(GOLDEN / "smolvla").fingerprint
    assert read_checkpoint(policy).fingerprint == original
    seen = {original}

    def changed() -> None:
        fingerprint = read_checkpoint(policy).fingerprint
        assert fingerprint not in seen
        seen.add(fingerprint)

    info = read_checkpoint(policy).tensors["model.state_proj.weight"]
    with (policy / "model.safetensors").open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\1")
    changed()
    edit(policy / "config.json", lambda c: c.__setitem__("chunk_size", 11))
    changed()
    with (policy / "policy_preprocessor_step_5_normalizer_processor.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1")
    # The last statistic's tail is past no tensor's first 256 bytes: statistics are short, so it is seen.
    changed()
    with (policy / "tokenizer" / "tokenizer.json").open("a") as text:
        text.write("\n")
    changed()


def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> Path:
    """`source` as LeRobot's users have it after a download: snapshot files are links to blobs."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    root = tmp_path / "hf" / "hub" / "models--org--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0123abcd")
    blobs = Path(shutil.copytree(source, root / "blobs"))
    for file in (f for f in blobs.rglob("*") if f.is_file()):
        link = root / "snapshots" / "0123abcd" / file.relative_to(blobs)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return root


def test_hub_id_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = cached(tmp_path, monkeypatch, GOLDEN / "smolvla")
    ckpt = read_checkpoint("org/name")
    assert ckpt.path == root / "snapshots" / "0123abcd"
    assert ckpt.fingerprint == read_checkpoint(GOLDEN / "smolvla").fingerprint
    assert read_checkpoint("org/name", revision="0123abcd").path == ckpt.path
    with pytest.raises(CheckpointError, match="get it with: hf download org/other"):
        read_checkpoint("org/other")
    with pytest.raises(CheckpointError, match="hf download org/name --revision v2"):
        read_checkpoint("org/name", revision="v2")
    for ref in ("../../../..", "", "0123abcd/..", "\xff"):
        (root / "refs" / "main").write_text(ref)
        assert find_in_cache("org/name") is None
    for name in ("org/..", "../name", "org", "org/na me", "org/name/more", "/org/name"):
        assert find_in_cache(name) is None


def test_download_only_on_request(policy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        read_checkpoint("org/name", download=True)
    calls: list[tuple[str, str]] = []

    def snapshot_download(repo_id: str, *, revision: str, allow_patterns: list[str]) -> str:
        calls.append((repo_id, revision))
        if repo_id == "org/private":
            raise RuntimeError("401\nno access")
        assert not any("bin" in p or p == "*" for p in allow_patterns)  # no pickles
        return str(policy)

    client = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    with pytest.raises(CheckpointError, match="not in the Hugging Face cache"):
        read_checkpoint("org/name")
    assert not calls
    assert read_checkpoint("org/name", download=True, revision="v1").path == policy
    assert calls == [("org/name", "v1")]
    with pytest.raises(CheckpointError, match=r"download failed \(RuntimeError: 401 no access\)"):
        read_checkpoint("org/private", download=True)


def test_cache_location(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_directory() == Path.home() / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_directory() == Path("/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/h")
    assert cache_directory() == Path("/h/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/c")
    assert cache_directory() == Path("/c")


def test_tokenizer_from_the_cache(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path, monkeypatch, policy / "tokenizer")
    expected = build_processors(read_checkpoint(policy)).encode(np.zeros(6), "open the drawer").tokens
    shutil.rmtree(policy / "tokenizer")

    def named(name: str) -> Callable[[Any], object]:
        return lambda p: p["steps"][3].update(
            config={**p["steps"][3]["config"], "tokenizer_name": name}, artifacts={}
        )

    edit(policy / "policy_preprocessor.json", named("org/name"))
    tokens = build_processors(read_checkpoint(policy)).encode(np.zeros(6), "open the drawer").tokens
    assert np.array_equal(tokens, expected)
    edit(policy / "policy_preprocessor.json", named("org/absent"))
    refused(policy, CheckpointError, r"get it with: hf download org/absent tokenizer\.json")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_json_gives_typed_errors(policy: Path, data: st.DataObject) -> None:
    """Any span of any JSON file of a policy overwritten: it loads, or says what is wrong in a typed error."""
    files = ("config.json", "policy_preprocessor.json", "policy_postprocessor.json", "vla_infer.json")
    name = data.draw(st.sampled_from([*files, "tokenizer/tokenizer.json"]))
    good = (GOLDEN / "smolvla" / name).read_bytes()
    place = data.draw(st.integers(0, min(len(good), 4000)))
    junk = data.draw(
        st.one_of(
            st.binary(max_size=8), st.sampled_from([b"null", b"-1", b"1e999", b"[]", b"{}", b'"', b"true"])
        )
    )
    (policy / name).write_bytes(good[:place] + junk + good[place + data.draw(st.integers(0, 12)) :])
    try:
        ckpt = read_checkpoint(policy)
        build_processors(ckpt)
    except VlaInferError:
        pass
    else:
        assert isinstance(ckpt, Checkpoint)
    finally:
        (policy / name).write_bytes(good)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_checkpoint_has_the_golden_names_and_shapes(family: str, tmp_path: Path) -> None:
    golden = read_checkpoint(GOLDEN / family)
    ckpt = read_checkpoint(write_random_checkpoint(tmp_path, family, seed=3, small=True))
    assert {n: i.shape for n, i in ckpt.tensors.items()} == {n: i.shape for n, i in golden.tensors.items()}
    assert {i.dtype for i in ckpt.tensors.values()} == {"BF16"}
    assert [s.name for s in ckpt.preprocessor] == [s.name for s in golden.preprocessor]
    assert [s.name for s in ckpt.postprocessor] == [s.name for s in golden.postprocessor]
    assert golden.architecture is not None
    assert ckpt.architecture is not None
    for part, sizes in ckpt.architecture.items():
        given_sizes = golden.architecture[part]
        if isinstance(sizes, dict):
            given_sizes = {key: given_sizes[key] for key in sizes}
            given_sizes |= {"num_hidden_layers": 4} if part == "text" and family == "smolvla" else {}
        assert sizes == given_sizes
    encoded = build_processors(ckpt).encode(np.zeros(6), "pick up the red cube")
    assert 8 < len(encoded.tokens) < 60
    assert (encoded.tokens[0] == 1) == (family != "smolvla")  # PaliGemma's prompts start with <bos>


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_are_of_the_golden_scale(family: str) -> None:
    from vla_infer.safetensors_io import to_float32

    golden = read_checkpoint(GOLDEN / family)
    for name, shape in tensor_shapes(family, small_sizes(family)).items():
        ours, theirs = (
            to_float32(bits, "BF16").astype(np.float64)
            for bits in (random_tensor(name, shape, 1), golden.read(name))
        )
        count = ours.size
        assert abs(ours.mean() - theirs.mean()) < 8 * theirs.std() / count**0.5, name
        assert abs(ours.std() / theirs.std() - 1) < 6 / count**0.5, name


def test_random_tensors_depend_on_name_and_seed() -> None:
    first = random_tensor("a.weight", (4, 8), 0)
    assert np.array_equal(first, random_tensor("a.weight", (4, 8), 0))
    assert not np.array_equal(first, random_tensor("b.weight", (4, 8), 0))
    assert not np.array_equal(first, random_tensor("a.weight", (4, 8), 1))


def test_full_size_is_the_published_one() -> None:
    def millions(family: str) -> float:
        return sum(int(np.prod(s)) for s in tensor_shapes(family, full_sizes(family)).values()) / 1e6

    assert 449 < millions("smolvla") < 451
    assert 3200 < millions("pi0") < millions("pi05") < 3400


def test_random_policy_on_the_fly_equals_the_written_one(tmp_path: Path) -> None:
    fly = random_policy(tmp_path / "fly", "pi05", seed=5, small=True)
    assert not (tmp_path / "fly" / "model.safetensors").exists()
    written = read_checkpoint(write_random_checkpoint(tmp_path / "w", "pi05", seed=5, small=True))
    assert list(fly.tensors) == list(written.tensors)
    assert all(np.array_equal(fly.read(n), written.read(n)) for n in written.tensors)
    assert fly.fingerprint != random_policy(tmp_path / "fly2", "pi05", seed=6, small=True).fingerprint
    assert build_processors(fly).encode(np.ones(6), "x").prompt == (
        build_processors(written).encode(np.ones(6), "x").prompt
    )


def test_random_checkpoint_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert random_checkpoint_main(["smolvla", str(tmp_path / "p"), "--small", "--cameras", "3"]) == 0
    assert "140 tensors" in capsys.readouterr().out
    assert len(read_checkpoint(tmp_path / "p").cameras) == 3
    (tmp_path / "file").write_text("")
    assert random_checkpoint_main(["smolvla", str(tmp_path / "file"), "--small"]) == 1
    assert "random_checkpoint: " in capsys.readouterr().err
