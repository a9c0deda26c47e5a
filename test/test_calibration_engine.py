"""Calibration on the engine, without PyTorch in it: what it sees is what the reference executor sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from golden import ROOT

torch = pytest.importorskip("torch", reason="needs torch for the reference executor")
torch.set_num_threads(1)

from vla_infer.calibration import Runner  # noqa: E402
from vla_infer.calibration_engine import EngineRunner, make_runner, probed, require_fp8  # noqa: E402
from vla_infer.checkpoint import read_checkpoint  # noqa: E402
from vla_infer.errors import EngineError  # noqa: E402
from vla_infer.fp8 import in_fp8  # noqa: E402
from vla_infer.models import FAMILIES  # noqa: E402
from vla_infer.observations import Observation, random_observations  # noqa: E402
from vla_infer.processors import build_processors  # noqa: E402
from vla_infer.tape import Tape, Weight  # noqa: E402


def some(family: str, count: int) -> list[Observation]:
    ckpt = read_checkpoint(ROOT / family)
    return random_observations(ckpt, build_processors(ckpt), count)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_magnitudes_on_the_cpu_are_the_references(family: str) -> None:
    """Of an observation whose second camera is missing too: what the places of its pixels hold must not count."""
    one = some(family, 1)[0]
    first = next(iter(one.images))
    observations = [one, replace(one, images={first: one.images[first]}), some(family, 3)[2]]
    ckpt = read_checkpoint(ROOT / family)
    want = Runner(ckpt, observations, device="reference").magnitudes([0, 1]).largest
    found = EngineRunner(ckpt, observations, device="cpu").magnitudes([0, 1]).largest
    assert list(found) == list(want)
    np.testing.assert_allclose(list(found.values()), list(want.values()), rtol=0.05)
    alone = EngineRunner(ckpt, observations, device="cpu").magnitudes([1]).largest
    assert any(alone[name] < 0.999 * found[name] for name in found)


def test_scales_and_errors_are_the_references() -> None:
    """The engine's way through, with the reference executor in the engine's place."""
    ckpt, observations = read_checkpoint(ROOT / "smolvla"), some("smolvla", 4)
    want = Runner(ckpt, observations, device="reference").calibrate()
    got = EngineRunner(ckpt, observations, device="reference").calibrate()
    assert (got.weights, got.tape, got.samples, got.held_out) == (want.weights, want.tape, 3, 1)
    np.testing.assert_allclose(list(got.activations.values()), list(want.activations.values()), rtol=0.02)
    for mine, its in ((got.seen, want.seen), (got.unseen, want.unseen)):
        assert mine is not None
        assert its is not None
        assert mine.relative_l2 == pytest.approx(its.relative_l2, rel=0.5)
        assert mine.cosine > 0.995


def test_what_is_written_again_cannot_be_probed() -> None:
    def tape(*, again: bool) -> Tape:
        t = Tape(stage="vision")
        x = t.linear(t.input("x", (4, 8), "act"), Weight("first", 8, 8))
        t.linear(x, Weight("second", 8, 8))
        if again:
            t.linear(x, Weight("third", 8, 8), residual=x, out=x)
        return t

    outputs, found = probed(tape(again=False))
    assert [op.weights[0].name for op in found.values()] == ["second", "first"]
    assert set(found) == set(outputs.outputs)
    assert all(in_fp8(op) for op in found.values())
    with pytest.raises(EngineError, match="is written again after third reads it"):
        probed(tape(again=True))


def test_a_device_without_fp8_is_refused_before_anything_runs() -> None:
    with pytest.raises(EngineError, match="precision 'fp8': device 'cpu' does not have it"):
        make_runner(read_checkpoint(ROOT / "smolvla"), some("smolvla", 1), device="cpu")
    require_fp8("reference")
