"""Precision "fp8" that calibrates on the first observations: what runs when, what is said, what becomes of the file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import ROOT

torch = pytest.importorskip("torch", reason="needs torch for the reference executor")
torch.set_num_threads(1)

from vla_infer import first_observations  # noqa: E402
from vla_infer.checkpoint import read_checkpoint  # noqa: E402
from vla_infer.errors import EngineError  # noqa: E402
from vla_infer.first_observations import CalibratingPolicy, calibrating  # noqa: E402
from vla_infer.fp8 import FILE, read_scales  # noqa: E402
from vla_infer.observations import Observation, random_observations  # noqa: E402
from vla_infer.policy import Policy, load_policy  # noqa: E402
from vla_infer.processors import build_processors  # noqa: E402

CKPT = read_checkpoint(ROOT / "smolvla")
OBSERVATIONS = random_observations(CKPT, build_processors(CKPT), 3)
NOISE = np.random.default_rng(0).standard_normal((10, 32), np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "smolvla", tmp_path / "policy"))


def loaded(path: Path, said: list[str], count: int = 2) -> Any:
    return calibrating(load_policy, count, said.append)(
        path, device="reference", precision="fp8", max_image=(480, 640), num_steps=2
    )


def actions(policy: Any, observation: Observation) -> np.ndarray:
    return policy.predict(observation.images, observation.state, observation.task, noise=NOISE)


def plain(path: Path, precision: str) -> Policy:
    return load_policy(path, device="reference", precision=precision, num_steps=2)


def test_bfloat16_until_its_first_observations_have_made_scales(path: Path) -> None:
    said: list[str] = []
    policy = loaded(path, said)
    bf16 = plain(path, "bf16")
    assert said == [
        f"fp8: no fp8.json beside {path}: bfloat16 until 2 observations are there to calibrate on"
    ]
    for o in OBSERVATIONS[:2]:
        assert policy.info.precision == "bf16"
        assert policy.thread is None
        np.testing.assert_array_equal(actions(policy, o), actions(bf16, o))
    policy.thread.join()
    assert len(said) == 2
    assert said[1].startswith(
        "fp8 from here on, by the first 2 observations: against bfloat16 worst cosine 0.99"
    )
    assert said[1].endswith(f"; wrote {path / FILE}")
    scales = read_scales(path / FILE)
    assert (scales.samples, scales.held_out) == (1, 1)
    got = actions(policy, OBSERVATIONS[2])
    assert policy.info.precision == "fp8"
    np.testing.assert_array_equal(got, actions(plain(path, "fp8"), OBSERVATIONS[2]))
    assert not np.array_equal(got, actions(bf16, OBSERVATIONS[2]))
    assert isinstance(loaded(path, said), Policy), "the next start has the file"
    assert len(said) == 2
    policy.close()
    with pytest.raises(EngineError, match="after close"):
        actions(policy, OBSERVATIONS[0])


def stays(path: Path, said: list[str]) -> str:
    """Runs past calibration; what was said then, in bfloat16."""
    policy = loaded(path, said, 1)
    actions(policy, OBSERVATIONS[0])
    policy.thread.join()
    actions(policy, OBSERVATIONS[1])
    assert policy.info.precision == "bf16"
    assert len(said) == 2
    assert "\n" not in said[1]
    return said[1]


def test_beyond_the_bound_it_stays_in_bfloat16(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_observations, "MAX_ERROR", 1e-4)
    text = stays(path, [])
    assert text.startswith("fp8: not taken up, bfloat16 goes on: relative L2 error 0.0")
    assert f"expected 0.0001 or less; run: vla-infer calibrate {path} --layers --keep" in text
    assert not (path / FILE).exists()


@pytest.mark.parametrize("error", [EngineError("out of memory"), MemoryError("none\nleft")])
def test_what_fails_leaves_it_in_bfloat16(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(first_observations, "make_runner", fail)
    kind = "" if isinstance(error, EngineError) else "MemoryError: "
    want = " ".join(str(error).split())
    assert stays(path, []) == f"fp8: not taken up, bfloat16 goes on: {kind}{want}"


def test_refused_observations_do_not_count(path: Path) -> None:
    policy = loaded(path, [], 1)
    with pytest.raises(Exception, match="images: no camera 'x'"):
        policy.predict({"x": np.zeros((4, 4, 3), np.uint8)}, OBSERVATIONS[0].state, "go")
    assert policy.thread is None
    policy.close()


def test_closed_while_it_calibrates(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = first_observations.make_runner
    said: list[str] = []
    policy = loaded(path, said, 1)

    def closing(*args: Any, **options: Any) -> Any:
        policy.close()
        return make(*args, **options)

    monkeypatch.setattr(first_observations, "make_runner", closing)
    actions(policy, OBSERVATIONS[0])
    policy.thread.join()
    assert said[1:] == ["fp8: not taken up, bfloat16 goes on: the policy was closed"]
    assert not (path / FILE).exists()


def test_what_it_is_not_for(path: Path) -> None:
    assert calibrating(load_policy, 0) is load_policy
    load = calibrating(load_policy, 4)
    with pytest.raises(EngineError, match="calibrate_first: expected precision 'fp8', got 'bf16'"):
        load(path, device="cuda", precision="bf16")
    with pytest.raises(EngineError, match="precision 'fp8': device 'cpu' does not have it"):
        load(path, device="cpu", precision="fp8")
    (path / FILE).write_text("{}")
    with pytest.raises(Exception, match=r"fp8.json: .*run: vla-infer calibrate"):
        loaded(path, [])


def test_it_takes_the_calls_of_a_policy() -> None:
    missing = {name for name in vars(Policy) if not name.startswith("_")} - set(vars(CalibratingPolicy))
    assert missing == set()
