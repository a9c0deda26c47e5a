"""`vla-infer calibrate`: scales from observations, what fp8 costs, and who may use the file."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden import ROOT

torch = pytest.importorskip("torch", reason="needs torch for the reference executor")
torch.set_num_threads(1)

from vla_infer import calibration  # noqa: E402
from vla_infer.calibration import Actions, Runner, errors_of, split  # noqa: E402
from vla_infer.checkpoint import read_checkpoint  # noqa: E402
from vla_infer.cli import main  # noqa: E402
from vla_infer.errors import CheckpointError, EngineError, ReplayError  # noqa: E402
from vla_infer.fp8 import FILE, Scales, policy_scales, products, read_scales  # noqa: E402
from vla_infer.observations import (  # noqa: E402
    Observation,
    Spread,
    of_bag,
    of_dataset,
    random_observations,
    random_picture,
)
from vla_infer.policy import load_policy  # noqa: E402
from vla_infer.processors import build_processors  # noqa: E402

COUNT = 5
CKPT = read_checkpoint(ROOT / "smolvla")


def some(count: int = COUNT, **options: str) -> list[Observation]:
    return random_observations(CKPT, build_processors(CKPT), count, **options)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(CKPT, some(), device="reference")


@pytest.fixture(scope="module")
def scales(runner: Runner) -> Scales:
    return runner.calibrate()


@pytest.fixture
def policy(tmp_path: Path, scales: Scales) -> Path:
    """A copy of the golden policy with its calibration."""
    path = Path(shutil.copytree(ROOT / "smolvla", tmp_path / "policy"))
    scales.write(path / FILE)
    return path


# ------------------------------------------------------------------------------------------------------ observations
@pytest.mark.parametrize("given", [0, 1, 3, 7, 8, 100])
def test_spread_keeps_the_ends_and_little_in_memory(given: int) -> None:
    spread = Spread[int](4)
    for i in range(given):
        spread.add(i)
        assert len(spread._kept) < 8
    taken = spread.take()
    assert len(taken) == min(4, given)
    assert taken == sorted(set(taken))
    if given:
        assert taken[0] == 0
        assert taken[-1] >= given * 3 // 4


def test_random_pictures_have_light_edges_and_grain() -> None:
    """Neighbours are alike, as white noise's are not; there are edges, and no two pictures are the same."""
    random = np.random.default_rng(0)
    pictures = [random_picture(random, 48, 80).astype(float) for _ in range(8)]
    for picture in pictures:
        step = np.abs(np.diff(picture, axis=1))
        assert np.median(step) < picture.std() / 3
        assert step.max() > 30
    assert np.mean([(np.diff(picture, axis=1) == 0).mean() for picture in pictures]) < 0.2
    assert len({picture.tobytes() for picture in pictures}) == 8


def test_random_states_are_within_the_statistics() -> None:
    processors = build_processors(CKPT)
    states = np.array([processors.encode(o.state.astype(np.float32), o.task).state for o in some(64)])
    assert np.abs(states).max() < 1.01
    assert states.std(0).min() > 0.4


def test_observations_of_a_bag(tmp_path: Path) -> None:
    pytest.importorskip("rosbags", reason="needs rosbags")
    pytest.importorskip("cv2", reason="needs opencv-python-headless")
    from replay_support import CAMERAS, joints_at, write_bag

    from vla_infer.contract import load_contract

    found = of_bag(write_bag(tmp_path / "bag", seconds=1.0), load_contract("so101"), 4)
    assert len(found) == 4
    assert all(set(o.images) == set(CAMERAS) and o.task == "pick up the red cube" for o in found)
    assert len({o.images[CAMERAS[0]].tobytes() for o in found}) == 4
    pan = [float(o.state[0]) for o in found]  # degrees; the test's motion rises in its first second
    assert pan == sorted(pan)
    assert pan[-1] - pan[0] > np.rad2deg(joints_at(0.8)[0] - joints_at(0.1)[0]) * 0.9


def test_observations_of_a_dataset(tmp_path: Path) -> None:
    for module in ("cv2", "rosbags", "pyarrow", "av"):
        pytest.importorskip(module, reason=f"needs {module}")
    from test_import_lerobot import state, write_dataset

    write_dataset(tmp_path, "v3.0")
    cameras = {"observation.images.top": "observation.images.front"}
    found = of_dataset(tmp_path, cameras, 4)
    assert [o.task for o in found] == ["task 0"] * 2 + ["task 1"] * 2
    assert all(set(o.images) == {"observation.images.front"} for o in found)
    np.testing.assert_allclose(found[0].state, state(0, 0))
    np.testing.assert_allclose(found[2].state, state(1, 0))
    with pytest.raises(ReplayError, match=r"cameras: expected one of left, got observation.images.top"):
        of_dataset(tmp_path, {"left": "left"}, 4)


# ------------------------------------------------------------------------------------------------------- calibration
def test_the_last_quarter_is_held_out() -> None:
    assert [tuple(map(list, split(n))) for n in (1, 2, 5)] == [
        ([0], []),
        ([0], [1]),
        ([0, 1, 2, 3], [4]),
    ]
    assert [len(part) for part in split(64)] == [48, 16]


def test_errors() -> None:
    """By hand: the worst and the median of three, actions of two numbers."""
    noise = np.array([[1.0, 1.0]])

    def pair(x: list[float], robot: float) -> tuple[Actions, Actions]:
        a, b = np.array([[3.0, 4.0]]), np.array([x])
        return Actions(a, noise, 0 * a), Actions(b, noise, robot + 0 * b)

    e = errors_of([pair([3, 4], 0), pair([4, 3], -7), pair([3, 5], 1)])
    assert e.cosine == pytest.approx(24 / 25)
    assert e.cosine_median == pytest.approx(29 / 5 / 34**0.5)
    assert e.cosine_added == pytest.approx(12 / 13)
    assert e.relative_l2 == pytest.approx(2**0.5 / 5)
    assert e.relative_l2_median == pytest.approx(1 / 5)
    assert e.action_difference == 7


def test_scales_are_the_largest_magnitudes(runner: Runner, scales: Scales) -> None:
    """Of what calibration may see, of every product; the first one's operand is pixels from -1 to 1."""
    assert list(scales.activations) == list(products(runner.tape))
    first = next(iter(scales.activations.values()))
    assert 0.9 * 2 / 448 < first <= np.float32(2 / 448)
    seen, unseen = split(COUNT)
    largest = np.array(list(runner.magnitudes(seen).largest.values()))
    np.testing.assert_array_equal(
        np.float32(list(scales.activations.values())), np.float32(2 * largest) / np.float32(448)
    )
    assert (
        np.array(list(runner.magnitudes(unseen).largest.values())) > largest
    ).any()  # so that the split matters
    assert (scales.samples, scales.held_out, scales.bf16) == (4, 1, own(scales))


def own(scales: Scales) -> tuple[str, ...]:
    """What SmolVLA keeps in bfloat16 anyway."""
    found = tuple(name for name in scales.activations if "text_model" in name)
    assert found
    return found


def test_errors_are_those_of_fp8(runner: Runner, scales: Scales) -> None:
    assert scales.unseen is not None
    for e in (scales.seen, scales.unseen):
        assert 0.995 < e.cosine < 0.99999
        assert 5e-3 < e.relative_l2_median <= e.relative_l2 < 0.1
        assert e.action_difference > 0
    assert scales.seen == runner.errors(range(4), scales)
    clipped = replace(scales, activations={name: s / 50 for name, s in scales.activations.items()})
    assert runner.errors(range(4), clipped).relative_l2 > 2 * scales.seen.relative_l2
    nothing = runner.errors(range(4), replace(scales, bf16=tuple(scales.activations)))
    assert nothing.relative_l2 == nothing.action_difference == 0


def test_padding_does_not_widen_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same magnitudes in the bucket that fits and in the longest, whose rest is other tokens."""
    one = some(1, instruction="go")
    short = Runner(CKPT, one, device="reference").magnitudes([0]).largest
    monkeypatch.setattr("vla_infer.policy.BUCKETS", ())
    padded = Runner(CKPT, one, device="reference")
    np.testing.assert_allclose(list(padded.magnitudes([0]).largest.values()), list(short.values()), rtol=1e-2)
    monkeypatch.setattr(calibration, "_seen_rows", lambda blocks, observe, op, x: observe(op, x))
    wide = padded.magnitudes([0]).largest
    assert max(wide[name] / short[name] for name in wide) > 1.05  # what the test would see otherwise


def test_each_product_alone(runner: Runner, scales: Scales) -> None:
    few = replace(scales, bf16=())
    found = runner.layers(few, most=1)
    assert sorted(found) == sorted({*scales.activations} - {*own(scales)})
    errors = [e.relative_l2 for e in found.values()]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] <= errors[0] < scales.seen.relative_l2
    name = next(iter(found))
    others = tuple(other for other in products(runner.tape) if other != name)
    assert found[name] == runner.errors([0], replace(scales, bf16=others))


def test_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(CKPT, some(1), device="reference")
    executor = runner._executor(4)
    name = "model.vlm_with_expert.vlm.model.vision_model.encoder.layers.1.mlp.fc1.weight"
    monkeypatch.setitem(executor.weights, name, executor.weights[name] * float("inf"))
    runner._executors = dict.fromkeys((16, 32, 48), executor)
    with pytest.raises(
        EngineError, match=r"calibrate: .*layers\.1\.mlp\.fc2.weight: its left operand is not finite"
    ):
        runner.magnitudes([0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_devices_cannot_calibrate(device: str) -> None:
    with pytest.raises(EngineError, match=f"device: expected reference or reference:cuda, got '{device}'"):
        Runner(CKPT, some(1), device=device)


def test_without_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "vla_infer.reference", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["calibrate", str(ROOT / "smolvla"), "--samples", "1", "--out", str(tmp_path / "x")]) == 1
    assert (
        capsys.readouterr().err
        == "vla-infer calibrate: the reference executor needs torch; pip install torch\n"
    )


# ------------------------------------------------------------------------------------------------------- the file's use
def test_policy_runs_by_its_file(policy: Path, runner: Runner, scales: Scales) -> None:
    """The same actions as while calibrating, and others than in bfloat16."""
    loaded = load_policy(policy, device="reference", precision="fp8")
    assert (loaded.info.precision, loaded.info.device) == ("fp8", "reference (cpu)")
    o = runner.observations[0]
    noise = np.random.default_rng([0, 0]).standard_normal((10, 32), np.float32)
    actions = loaded.predict(o.images, o.state, o.task, noise=noise)
    np.testing.assert_array_equal(actions, runner.run(0, scales).robot)
    assert not np.array_equal(actions, runner.plain(0).robot)


def test_policy_without_scales_or_with_stale_ones_is_refused(policy: Path) -> None:
    def refused(message: str, device: str = "reference") -> None:
        error = CheckpointError if device == "reference" else EngineError
        with pytest.raises(error, match=message) as info:
            load_policy(policy, device=device, precision="fp8")
        assert "\n" not in str(info.value)

    refused("device 'cpu' does not have it: use 'cuda' or 'reference', or precision 'bf16'", "cpu")
    file = policy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # one bit, far from where the fingerprint looks
    file.write_bytes(data)
    refused(rf"policy/fp8.json: stale, weights changed: expected .*; run: vla-infer calibrate {policy}")
    (policy / FILE).unlink()
    refused(rf"policy/fp8.json: missing; .*run: vla-infer calibrate {policy}")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "reference:cuda"])
def test_a_gpu_takes_the_same_file(policy: Path, runner: Runner, scales: Scales, device: str) -> None:
    assert policy_scales(read_checkpoint(policy), [runner.tape], device=device) == scales


def test_verify(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(policy), "--precision", "fp8", "--device", "reference", "--layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    stages = {line[6:22].strip(): float(line[22:].split()[0]) for line in lines if line.startswith("PASS")}
    assert 5e-3 < stages["actions"] < 0.0998
    at = lines.index("fp8 against bfloat16")
    name, count, cosine, *_, relative, _, _ = lines[at + 2].split()
    assert (name, count) == ("golden", "5")
    assert 0.995 < float(cosine) < 1
    assert 5e-3 < float(relative) < 0.0998
    alone = {line.split()[-1]: float(line.split()[0]) for line in lines[at + 4 :]}
    scales = read_scales(policy / FILE)
    assert sorted(alone) == sorted({*scales.activations} - {*own(scales)})
    assert 0 < min(alone.values()) <= max(alone.values()) < stages["actions"]
    assert main(["verify", str(policy), "--layers"]) == 1
    assert "--layers: expected --precision fp8, got fp32" in capsys.readouterr().err
    assert main(["verify", str(policy), "--layers", "--precision", "fp8", "--device", "cuda"]) == 1
    assert "--layers: expected --device reference or reference:cuda" in capsys.readouterr().err
    assert main(["verify", str(policy), "--precision", "fp8"]) == 1
    assert "device 'cpu' does not have it" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- command line
def test_calibrate_writes_beside_the_policy(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (policy / FILE).unlink()
    assert main(["calibrate", str(policy), "--samples", str(COUNT)]) == 0
    out = capsys.readouterr().out
    assert f"wrote {policy / FILE}" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("calibrated on", "held out"))]
    assert [row[2] for row in rows] == ["4", "1"]
    assert read_scales(policy / FILE).samples == 4


def test_beyond_the_bound_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scales.json"
    line = ["calibrate", str(ROOT / "smolvla"), "--samples", "2", "--out", str(out), "--max-error", "0.001"]
    assert main(line) == 1
    assert "is beyond --max-error 0.001: nothing was written; try --layers --keep" in capsys.readouterr().err
    assert not out.exists()


def test_what_hurts_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str], scales: Scales) -> None:
    """With a limit that some products are above: they are marked, written, and the error falls."""
    out = tmp_path / "scales.json"
    line = ["calibrate", str(ROOT / "smolvla"), "--samples", "1", "--out", str(out), "--layers", "--keep"]
    assert main([*line, "--keep-limit", "0.004"]) == 0
    shown = capsys.readouterr().out.splitlines()
    marked = [row.split()[-1] for row in shown if row.startswith("* ")]
    written = read_scales(out)
    assert set(written.bf16) == {*marked, *own(written)}
    assert not {*marked} & {*own(written)}, "what the family keeps anyway is not proposed"
    assert 0 < len(marked) < len(written.activations)
    worst = [float(row.split()[7]) for row in shown if row.startswith("calibrated on")]
    assert len(worst) == 2
    assert worst[1] < worst[0]
    assert worst[1] == pytest.approx(written.seen.relative_l2, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "--samples: expected 1 or more, got 0"),
        (["--max-error", "0"], "--max-error: expected above 0, got 0.0"),
        (["--keep"], "need --layers"),
        (["--bag", "x"], "--bag and --contract: expected both"),
        (["--contract", "so101"], "--bag and --contract: expected both"),
        (["--dataset", "no/such"], "no/such/meta/info.json: cannot be read"),
    ],
)
def test_wrong_usage(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(ROOT / "smolvla"), *options]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
