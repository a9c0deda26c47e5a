"""Processors: LeRobot's numbers and tokens, and what must never pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import FAMILIES, GOLDEN, PROCESSORS, STATE, build, copy_of, edit, edit_step, refused
from tokenizers import Tokenizer

from vla_infer.errors import CheckpointError, EngineError, ObservationError, UnsupportedError, VlaInferError
from vla_infer.normalize import Normalizer, make_normalizer
from vla_infer.processor_steps import Tokenize
from vla_infer.safetensors_io import open_safetensors, read_tensor, save_tensors
from vla_infer.tokenizer import PromptTokenizer


@pytest.fixture(params=FAMILIES)
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return copy_of(request.param, tmp_path)


@pytest.fixture
def pi0(tmp_path: Path) -> Path:
    return copy_of("pi0", tmp_path)


def golden(family: str) -> dict[str, Any]:
    file = open_safetensors(GOLDEN / family / "golden.safetensors")
    values: dict[str, Any] = {name: read_tensor(info) for name, info in file.tensors.items()}
    values["task"] = json.loads((GOLDEN / family / "golden.json").read_text())["task"]
    return values


# Parity with LeRobot


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_state_tokens_and_robot_actions_are_exact(family: str) -> None:
    expected = golden(family)
    processors = PROCESSORS[family]
    encoded = processors.encode(expected["raw_state"], expected["task"])
    padded = np.zeros_like(expected["state"][0])
    padded[: len(encoded.state)] = encoded.state
    assert np.array_equal(padded, expected["state"][0])
    assert encoded.tokens.dtype == np.int32
    assert np.array_equal(encoded.tokens, expected["lang_tokens"][expected["lang_mask"]])
    robot = processors.decode(expected["actions"][0], expected["raw_state"])
    assert robot.dtype == np.float32
    assert np.array_equal(robot, expected["robot_actions"][0])
    back = processors.normalize_actions(robot, expected["raw_state"])
    assert np.allclose(back, expected["actions"][0, :, :6], atol=1e-6)


WORDS = st.sampled_from(
    ["pick", "up", "the", "red", "cube", "and", "place", "it", "in", "box", "drawer", "2"]
)
ORDINARY = st.lists(WORDS, min_size=1, max_size=40).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(task=ORDINARY, family=st.sampled_from(["smolvla", "pi0"]))
def test_ordinary_instructions_have_the_tokenizers_own_tokens(task: str, family: str) -> None:
    """With truncation by the tokenizers library itself, as transformers asks for it."""
    direct = Tokenizer.from_file(str(GOLDEN / family / "tokenizer" / "tokenizer.json"))
    direct.no_padding()
    direct.enable_truncation(48)
    encoded = PROCESSORS[family].encode(STATE, task)
    assert encoded.prompt == task + "\n"
    assert encoded.tokens.tolist() == direct.encode(task + "\n").ids
    assert len(encoded.tokens) <= 48


@settings(max_examples=60, deadline=None)
@given(
    task=ORDINARY,
    state=st.lists(st.floats(-150, 150, width=32), min_size=6, max_size=6).map(
        lambda v: np.array(v, np.float32)
    ),
)
def test_pi05_prompt_is_lerobots_for_ordinary_instructions(task: str, state: Any) -> None:
    encoded = PROCESSORS["pi05"].encode(state, f" {task.replace(' ', '_', 1)} ")
    bins = [int(np.floor((float(x) + 1) * 128)) for x in encoded.state]  # 256 bins over [-1, 1]
    numbers = " ".join(str(min(max(b, -1), 255)) for b in bins)
    assert encoded.prompt == f"Task: {task}, State: {numbers};\nAction: "


def test_a_task_that_ends_in_a_line_break_gets_no_second_one() -> None:
    for family in ("smolvla", "pi0"):
        assert PROCESSORS[family].encode(STATE, "open\n").prompt == "open\n"
    assert PROCESSORS["pi05"].encode(STATE, "open\n").prompt.startswith("Task: open, State: ")


def test_pi05_prompt_is_tokenized_once_for_each_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has to be counted and encoded; the answer belongs to its own text."""
    processors = build(GOLDEN / "pi05")
    (step,) = (step for step in processors._before if isinstance(step, Tokenize))
    texts: list[str] = []
    library = step.tokenizer._tokenizer

    class Counting:
        def encode(self, text: str, **options: bool) -> Any:
            texts.append(text)
            return library.encode(text, **options)

    monkeypatch.setattr(step.tokenizer, "_tokenizer", Counting())
    for state in (STATE, -STATE, STATE):
        want = PROCESSORS["pi05"].encode(state, "open")
        got = processors.encode(state, "open")
        assert (got.prompt, list(got.tokens)) == (want.prompt, list(want.tokens))
    assert len(texts) == 3


def test_padding_of_the_tokenizer_file_is_not_applied() -> None:
    """The golden tokenizer.json files say to pad to 48 or 200."""
    for family in FAMILIES:
        assert 0 not in PROCESSORS[family].encode(STATE, "open").tokens


def test_truncation_side_and_template_come_from_the_tokenizers_configuration(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(GOLDEN / "pi0" / "tokenizer", tmp_path / "t"))

    def encode(**config: Any) -> list[int]:
        base = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
        (directory / "tokenizer_config.json").write_text(json.dumps(base | config))
        return PromptTokenizer(directory, max_length=4, vocabulary=None).encode("abcdef").tolist()

    plain = PromptTokenizer(directory, max_length=99, vocabulary=None).encode("abcdef").tolist()
    assert len(plain) == 6
    assert encode() == plain[:4]
    assert encode(truncation_side="left") == plain[2:]
    assert encode(add_bos_token=True) == [1, *plain[:3]]
    assert encode(add_bos_token=True, add_eos_token=True) == [1, *plain[:2], 2]
    assert encode(add_bos_token=True, add_eos_token=True, truncation_side="left") == [1, *plain[4:], 2]
    assert encode(add_bos_token=False) == plain[:4]
    with pytest.raises(CheckpointError, match="bos_token: 'nothing' is not a token"):
        encode(add_bos_token=True, bos_token="nothing")


# Normalisation


MODES = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
PAIRS = st.lists(
    st.tuples(
        st.floats(-100, 100, width=32),
        st.sampled_from([0.0, 2.0**-10, 1.0, 37.5]),
        st.floats(-200, 200, width=32),
    ),
    min_size=1,
    max_size=8,
)


def normalizer_of(mode: str, low: Any, spread: Any) -> Normalizer:
    first, second = MODES[mode]
    high = spread if mode == "MEAN_STD" else low + spread
    stats = {f"action.{first}": low, f"action.{second}": high}
    return make_normalizer(mode, "action", len(low), stats, eps=1e-8, where="test")


@settings(max_examples=60, deadline=None)
@given(mode=st.sampled_from(sorted(MODES)), pairs=PAIRS)
def test_normalisation_equals_lerobots_formulas_in_torch(
    mode: str, pairs: list[tuple[float, float, float]]
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with bit for bit")
    low, spread, x = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
    ours = normalizer_of(mode, low, spread)
    a, t = torch.from_numpy(low), torch.from_numpy(x)
    b = torch.from_numpy(spread if mode == "MEAN_STD" else low + spread)
    if mode == "MEAN_STD":
        forward, backward = (t - a) / (b + 1e-8), t * b + a
    else:
        d = torch.where(b - a == 0, torch.tensor(1e-8), b - a)
        forward = 2 * (t - a) / d - 1
        backward = (t + 1) / 2 * d + a if mode == "MIN_MAX" else (t + 1.0) * d / 2.0 + a
    assert np.array_equal(ours.normalize(x), forward.numpy())
    assert np.array_equal(ours.unnormalize(x), backward.numpy())


@pytest.mark.parametrize("mode", sorted(MODES))
def test_normalisation_maps_bounds_and_returns(mode: str) -> None:
    low, spread = np.array([-10.0, 5], np.float32), np.array([4.0, 2], np.float32)
    normalizer = normalizer_of(mode, low, spread)
    ends = np.stack([low, low + spread])
    expected = [[0, 0], [1, 1]] if mode == "MEAN_STD" else [[-1, -1], [1, 1]]
    assert np.allclose(normalizer.normalize(ends), expected, atol=1e-6)
    assert np.allclose(normalizer.unnormalize(normalizer.normalize(ends)), ends, atol=1e-5)


def test_identity_and_a_mode_that_is_not_stated(pi0: Path) -> None:
    for norm_map in ({}, {"STATE": "IDENTITY", "ACTION": "IDENTITY"}):
        for step in ("normalizer_processor", "unnormalizer_processor"):
            edit_step(pi0, step, norm_map=norm_map)
        processors = build(pi0)
        assert np.array_equal(processors.encode(STATE, "x").state, STATE)
        chunk = np.arange(64, dtype=np.float32).reshape(2, 32)
        robot = processors.decode(chunk, STATE)
        assert np.array_equal(robot, chunk[:, :6])
        assert not np.shares_memory(robot, chunk)


def test_a_state_that_is_not_listed_stays(pi0: Path) -> None:
    edit_step(pi0, "normalizer_processor", normalize_observation_keys=["observation.other"])
    assert np.array_equal(build(pi0).encode(STATE, "x").state, STATE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation.state.mean": None}, r"needs observation\.state\.mean.*fine-tune it"),
        ({"action.std": None}, r"needs action\.std"),
        ({"action.std": np.ones(5)}, r"action\.std: expected shape \(6,\), got \(5,\)"),
        ({"action.std": np.ones((1, 6))}, "expected shape"),
        ({"action.std": np.array([1, 1, np.nan, 1, 1, 1])}, "not finite"),
        ({"action.mean": np.array([1, 1, np.inf, 1, 1, 1])}, "not finite"),
        ({"action.std": np.array([1, 1, -1, 1, 1, 1])}, r"action\.std has a negative value"),
    ],
)
def test_statistics_that_make_no_sense(pi0: Path, change: dict[str, Any], message: str) -> None:
    for path in pi0.glob("policy_*.safetensors"):
        stats = {n: read_tensor(i) for n, i in open_safetensors(path).tensors.items()}
        for key, value in change.items():
            stats.pop(key)
            if value is not None:
                stats[key] = value.astype(np.float32)
        save_tensors(path, stats)
    refused(pi0, CheckpointError, message)


def test_bounds_in_the_wrong_order() -> None:
    with pytest.raises(CheckpointError, match="q01 is above q99"):
        normalizer_of("QUANTILES", np.zeros(2, np.float32), np.array([1, -1], np.float32))


def test_statistics_of_other_dtypes(pi0: Path) -> None:
    before = build(pi0).encode(STATE, "x").state
    for path in pi0.glob("policy_*.safetensors"):
        stats = {n: read_tensor(i).astype(np.float64) for n, i in open_safetensors(path).tensors.items()}
        save_tensors(path, stats)
    assert np.array_equal(build(pi0).encode(STATE, "x").state, before)


# Pipelines


@pytest.mark.parametrize("file", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_an_unknown_step_is_named(policy: Path, file: str) -> None:
    edit(policy / file, lambda p: p["steps"].insert(1, {"registry_name": "blur_processor", "config": {}}))
    refused(policy, UnsupportedError, "step 'blur_processor' is not supported")
    edit(policy / file, lambda p: p["steps"].__setitem__(1, {"class": "my.module.Blur"}))
    refused(policy, UnsupportedError, r"step 'my\.module\.Blur' is not supported")


@pytest.mark.parametrize(
    ("step", "config", "error", "message"),
    [
        ("tokenizer_processor", {"truncation": False}, UnsupportedError, "truncation"),
        ("tokenizer_processor", {"padding_side": "left"}, UnsupportedError, "padding_side"),
        ("tokenizer_processor", {"task_key": "goal"}, UnsupportedError, "task_key"),
        ("tokenizer_processor", {"max_length": 0}, CheckpointError, "max_length"),
        ("device_processor", {"float_dtype": "float16"}, UnsupportedError, "float_dtype"),
        (
            "normalizer_processor",
            {"norm_map": {"VISUAL": "MEAN_STD"}},
            UnsupportedError,
            "MEAN_STD of images",
        ),
        ("normalizer_processor", {"norm_map": {"STATE": "x"}}, CheckpointError, "STATE: expected one of"),
        ("normalizer_processor", {"norm_map": {"X": "IDENTITY"}}, CheckpointError, "unknown feature type"),
        ("normalizer_processor", {"eps": 0}, CheckpointError, "eps"),
        ("normalizer_processor", {"eps": 2}, CheckpointError, "eps"),
        (
            "normalizer_processor",
            {"features": {"observation.state": {"type": "STATE", "shape": [7]}}},
            CheckpointError,
            r"7 values, config\.json states 6",
        ),
        ("rename_observations_processor", {"rename_map": {"a": 1}}, CheckpointError, "object of strings"),
        ("relative_actions_processor", {"enabled": 1}, CheckpointError, "enabled: expected true or false"),
        ("relative_actions_processor", {"enabled": True}, UnsupportedError, "does not undo"),
        ("absolute_actions_processor", {"enabled": True}, UnsupportedError, "does not undo"),
    ],
)
def test_options_that_are_refused(
    pi0: Path, step: str, config: dict[str, Any], error: type[VlaInferError], message: str
) -> None:
    edit_step(pi0, step, **config)
    refused(pi0, error, message)


def test_steps_in_a_wrong_order(policy: Path) -> None:
    pre = policy / "policy_preprocessor.json"
    good = pre.read_text()

    def names(pipeline: Any) -> list[str]:
        return [step["registry_name"] for step in pipeline["steps"]]

    def drop(pipeline: Any, name: str) -> Any:
        return pipeline["steps"].pop(names(pipeline).index(name))

    edit(pre, lambda p: drop(p, "tokenizer_processor"))
    refused(policy, CheckpointError, "exactly one tokenizer_processor")
    pre.write_text(good)
    edit(pre, lambda p: drop(p, "normalizer_processor"))
    refused(policy, UnsupportedError, "does not undo")
    pre.write_text(good)
    edit(pre, lambda p: p["steps"].insert(0, drop(p, "tokenizer_processor")))
    refused(policy, UnsupportedError, "prompt step before tokenizer_processor")


def test_pi05_needs_the_normalised_state_in_its_prompt(tmp_path: Path) -> None:
    policy = Path(shutil.copytree(GOLDEN / "pi05", tmp_path / "p"))
    pre = policy / "policy_preprocessor.json"
    edit(pre, lambda p: p["steps"].insert(3, p["steps"].pop(4)))
    refused(policy, UnsupportedError, "before it is normalised")
    edit(pre, lambda p: p["steps"].pop(3))
    refused(policy, UnsupportedError, "pi05 needs the state in its prompt")


def test_rename_map(pi0: Path) -> None:
    names = {"observation.images.front": "observation.images.top"}
    edit_step(pi0, "rename_observations_processor", rename_map=names)
    assert build(pi0).rename_map == names


NAMES = ["shoulder", "elbow", "wrist_roll", "Left_Gripper", "base", "neck"]


@pytest.mark.parametrize(
    ("exclude", "names", "absolute"),
    [
        (["gripper"], NAMES, [3]),
        (["GRIPPER", "wrist"], NAMES, [2, 3]),
        (["gripper"], None, []),
        ([], NAMES, []),
        ([""], NAMES, []),
        (["neck"], NAMES[:3], []),
    ],
)
def test_relative_actions(
    pi0: Path, exclude: list[str], names: list[str] | None, absolute: list[int]
) -> None:
    plain = build(pi0)
    edit_step(pi0, "relative_actions_processor", enabled=True, exclude_joints=exclude, action_names=names)
    edit_step(pi0, "absolute_actions_processor", enabled=True)
    relative = build(pi0)
    chunk = np.random.default_rng(0).standard_normal((10, 32)).astype(np.float32)
    offset = STATE.copy()
    offset[absolute] = 0
    assert np.array_equal(relative.decode(chunk, STATE), plain.decode(chunk, STATE) + offset)
    robot = relative.decode(chunk, STATE)
    assert np.allclose(relative.normalize_actions(robot, STATE), chunk[:, :6], atol=1e-5)
    # The rest of a chunk, seen from the next observation: the same joint targets.
    later = STATE + 7
    rest = np.zeros((10, 32), np.float32)
    rest[:, :6] = relative.normalize_actions(robot, later)
    assert np.allclose(relative.decode(rest, later), robot, atol=1e-3)
    assert np.array_equal(relative.encode(STATE, "x").state, plain.encode(STATE, "x").state)


def test_relative_actions_need_a_state_for_each(pi0: Path) -> None:
    edit_step(pi0, "relative_actions_processor", enabled=True)
    edit_step(pi0, "absolute_actions_processor", enabled=True)
    edit(pi0 / "config.json", lambda c: c["input_features"]["observation.state"].update(shape=[5]))
    refused(pi0, CheckpointError, "as many state values as actions, got 5 and 6")


# Observations


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (np.zeros(5), r"expected shape \(6,\), got \(5,\)"),
        (np.zeros((1, 6)), "expected shape"),
        (np.array([0, 0, np.nan, 0, 0, 0]), r"state\[2\]: not a finite"),
        (np.array([0, 0, 0, np.inf, 0, 0]), r"state\[3\]: not a finite"),
        (np.array([0, 0, 0, 0, 1e39, 0]), r"state\[4\]: not a finite"),
        (np.zeros(6, bool), "got bool"),
        (np.zeros(6, complex), "got complex128"),
        (np.array(["0"] * 6), "got <U1"),
        ([0.0] * 6, "got list"),
        (None, "got NoneType"),
    ],
)
def test_states_that_are_refused(state: Any, message: str) -> None:
    processors = PROCESSORS["pi0"]
    with pytest.raises(ObservationError, match=message):
        processors.encode(state, "x")
    with pytest.raises(ObservationError, match=message):
        processors.decode(np.zeros((1, 32), np.float32), state)
    with pytest.raises(ObservationError, match=message):
        processors.normalize_actions(np.zeros((1, 6), np.float32), state)


def test_a_state_whose_normalised_value_overflows(pi0: Path) -> None:
    for path in pi0.glob("policy_*.safetensors"):
        stats = {n: read_tensor(i) for n, i in open_safetensors(path).tensors.items()}
        stats["observation.state.std"][3] = 0
        save_tensors(path, stats)
    with pytest.raises(ObservationError, match=r"state\[3\]: 1e\+35 is too far"):
        build(pi0).encode(np.array([0, 0, 0, 1e35, 0, 0]), "x")


def test_states_of_other_number_types_and_ownership() -> None:
    state = np.array([1, 2, 3, 4, 5, 6])
    expected = PROCESSORS["pi0"].encode(state.astype(np.float32), "x").state
    assert np.array_equal(PROCESSORS["pi0"].encode(state, "x").state, expected)
    edited = state.astype(np.float32)
    encoded = PROCESSORS["pi0"].encode(edited, "x")
    edited[:] = 0
    assert np.array_equal(encoded.state, expected)
    chunk = np.zeros((10, 32), np.float32)
    robot = PROCESSORS["pi0"].decode(chunk, state)
    robot[:] = 9
    assert not chunk.any()


def test_actions_of_a_wrong_shape() -> None:
    for shape in ((10,), (10, 5), (1, 10, 32)):
        with pytest.raises(EngineError, match=r"expected \(H, at least 6\)"):
            PROCESSORS["pi0"].decode(np.zeros(shape, np.float32), STATE)
    for bad in (np.zeros((10, 7)), np.zeros(6), np.full((1, 6), np.nan), np.full((1, 6), 1e39)):
        with pytest.raises(ObservationError):
            PROCESSORS["pi0"].normalize_actions(bad, STATE)


def test_values_that_are_not_finite_reach_the_guard() -> None:
    chunk = np.zeros((3, 32), np.float32)
    chunk[1, 2] = np.nan
    assert np.isnan(PROCESSORS["pi05"].decode(chunk, STATE)[1, 2])
