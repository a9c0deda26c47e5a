"""The CUDA executor as a whole: golden parity, the same bits each time, and errors before anything is launched."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from fp8_support import CHAINS, calibrated, in_vision
from golden import ROOT, relative
from golden_runs import RUNS, Array, GoldenModel, Run, golden_model
from op_cases import CASES, make

from vla_infer import _engine
from vla_infer.calibration import Runner
from vla_infer.checkpoint import read_checkpoint
from vla_infer.cli import main
from vla_infer.engine import Engine, Program
from vla_infer.errors import EngineError, ObservationError
from vla_infer.first_observations import load_calibrating
from vla_infer.fp8 import FILE, in_fp8, products, read_scales
from vla_infer.inputs import TapeObservation, fill_inputs
from vla_infer.models import FAMILIES
from vla_infer.models import layers as L
from vla_infer.observations import random_observations
from vla_infer.policy import load_policy
from vla_infer.processors import build_processors
from vla_infer.tape import Tape, Weight

torch = pytest.importorskip("torch", reason="needs torch for the reference executor")
from vla_infer.reference import ReferenceExecutor  # noqa: E402

if not _engine.built_with_cuda():
    pytest.skip("needs an engine built with CUDA", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def program(m: GoldenModel, run: Run) -> Program:
    tape = m.tape(prompt=m.prompt(run) + 5)
    made = Engine([tape], m.ckpt.read, device="cuda", precision="bf16").programs[0]
    fill(made, m, run)
    return made


def fill(made: Program, m: GoldenModel, run: Run) -> None:
    tape = m.tape(prompt=m.prompt(run) + 5)
    for name, values in m.inputs(tape, run, m.noise(run)).items():
        made.inputs[name][...] = values


def reference(m: GoldenModel, run: Run, precision: str) -> Array:
    tape = m.tape(prompt=m.prompt(run) + 5)
    return ReferenceExecutor(tape, m.ckpt.read, precision).run(m.inputs(tape, run, m.noise(run)))["actions"]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("name", list(RUNS))
def test_golden(family: str, name: str) -> None:
    """At most 1.5 times as far off as PyTorch is in bfloat16 on the same tape. What the golden policy does not hold
    is compared with the reference executor in float32, which the golden results agree with."""
    m = golden_model(family)
    run = RUNS[name]
    want = reference(m, run, "fp32")
    limit = 1.5 * relative(reference(m, run, "bf16"), want)
    made = program(m, run)
    made.run()
    got = relative(made.result("actions"), want)
    print(f"{family} {name}: {got:.2e}, limit {limit:.2e}")
    assert got <= limit


@pytest.mark.parametrize("family", list(FAMILIES))
def test_same_bits_each_time(family: str) -> None:
    """Also after other inputs in between."""
    m = golden_model(family)
    plain, other = RUNS["plain"], RUNS["rtc_exp"]
    made = program(m, plain)
    made.run()
    first = made.result("actions")
    for turn in range(50):
        if turn % 10 == 9:
            made.inputs["frames"][...] = np.random.default_rng(turn).integers(
                0, 256, made.inputs["frames"].shape
            )
            made.inputs["rtc_weight"][...] = 1.0
            made.run()
            assert relative(made.result("actions"), first) > 1e-3
            fill(made, m, plain)
        made.run()
        np.testing.assert_array_equal(made.result("actions"), first)
    assert other.schedule


def test_policies_side_by_side() -> None:
    """Engines on one GPU do not touch each other's memory."""
    models = [golden_model(family) for family in FAMILIES]
    programs = [program(m, RUNS["plain"]) for m in models]
    alone = []
    for made in programs:
        made.run()
        alone.append(made.result("actions"))
    for _ in range(3):
        for made, want in zip(programs, alone, strict=True):
            made.run()
            np.testing.assert_array_equal(made.result("actions"), want)


@pytest.mark.parametrize("rows", [64, 70, 113, 177, 250, 260])
def test_prefix_layers(rows: int) -> None:
    """A stack of layers that may run as one kernel (65 to 256 rows on Hopper), with products of every other layer's
    keys and values behind it: at most 1.5 times as far off as PyTorch in bfloat16, the same bits each time."""
    t = Tape()
    d = L.Decoder(128, 4, 320, 4, 2, 64, 1e-5, "silu", 0.0)
    x = t.linear(t.input("x", (rows, 128), "f32"), Weight("in.weight", 128, 128))
    seq = L.sequence(t, rows + 5, d, 10_000.0)
    L.Stack(t, d, "stack").fill(x, seq)
    for i, cache in enumerate(seq.caches):
        t.output(f"k{i}", cache.k[:rows])
        t.output(f"v{i}", cache.v[:rows])
        if i % 2:
            t.output(f"p{i}", t.linear(cache.k[:rows], Weight(f"p{i}.weight", 128, 128)))
    random = np.random.default_rng(rows)
    weights = {
        w.name: random.standard_normal((w.n, w.k), np.float32) * np.float32(w.k**-0.5)
        for op in t.ops
        for w in op.weights
    }
    norms = {b.name: 1 + random.standard_normal(128, np.float32) / 4 for b in t.buffers if b.kind == "param"}
    read = (weights | norms).__getitem__
    seen = random.random(rows) < 0.9
    inputs = L.index_inputs(seen, 1 + np.arange(5)) | {"x": random.standard_normal((rows, 128), np.float32)}

    made = Engine([t], read, device="cuda", precision="bf16").programs[0]
    for name, values in inputs.items():
        made.inputs[name][...] = values
    made.run()
    got = {name: made.result(name) for name in t.outputs}
    exact, torch_bf16 = (ReferenceExecutor(t, read, precision).run(inputs) for precision in ("fp32", "bf16"))
    for name in got:
        assert relative(got[name], exact[name]) <= 1.5 * relative(torch_bf16[name], exact[name]), name
    for _ in range(10):
        made.run()
        assert all(np.array_equal(made.result(name), got[name]) for name in got)


@pytest.mark.parametrize(
    ("heads", "head_dim", "mlp", "image", "cameras"),
    [
        (2, 72, 200, 224, 1),
        (2, 72, 200, 224, 3),
        (4, 72, 1160, 224, 2),
        (16, 72, 4304, 224, 3),
        (4, 64, 400, 448, 2),
        (12, 64, 3072, 448, 2),
        (2, 64, 200, 224, 2),
    ],
)
def test_vision_layers(heads: int, head_dim: int, mlp: int, image: int, cameras: int) -> None:
    """An encoder that may run as one kernel (heads of 72 and 256 patches, on Hopper), and others that may not (heads of
    64, more patches): at most 1.5 times as far off as PyTorch in bfloat16, the same bits each time."""
    width = heads * head_dim
    t = Tape()
    v = L.Vision(width, 3, heads, mlp, 14, (image, image), 1e-6, centred=False)
    size = 60 * 3 * 50
    x = L.siglip(
        t, t.input("frames", (cameras, size), "u8"), t.input("geometry", (cameras, 8), "i32"), "v", v
    )
    norm = L.layer_norm(t, "v.norm", width, 1e-6)
    t.output("out", t.linear(x, Weight("out.weight", 64, width), norm=norm))
    random = np.random.default_rng(heads + cameras)
    weights = {
        w.name: random.standard_normal((w.n, w.k), np.float32) * np.float32(w.k**-0.5)
        for op in t.ops
        for w in op.weights
    }
    params = {
        b.name: random.standard_normal((b.rows, b.cols), np.float32).squeeze() / 4
        + ("norm" in b.name and b.name.endswith("weight"))
        for b in t.buffers
        if b.kind == "param"
    }
    read = (weights | params).__getitem__
    inputs = {
        "frames": random.integers(0, 256, (cameras, size), np.uint8),
        "geometry": np.array([v.geometry(50, 60 - 7 * i, 60 * 3) for i in range(cameras)], np.int32),
    }

    made = Engine([t], read, device="cuda", precision="bf16").programs[0]
    for name, values in inputs.items():
        made.inputs[name][...] = values
    made.run()
    got = made.result("out")
    exact, torch_bf16 = (
        ReferenceExecutor(t, read, precision).run(inputs)["out"] for precision in ("fp32", "bf16")
    )
    assert relative(got, exact) <= 1.5 * relative(torch_bf16, exact)
    for _ in range(10):
        made.run()
        assert np.array_equal(made.result("out"), got)


@pytest.mark.parametrize("threads", [1, 3])
def test_staged_pictures_are_those_filled_by_hand(threads: int) -> None:
    """Of other sizes from call to call, up to the largest, one left out, cut out of a larger one; on two programs that
    share an arena, after a call that ended while they were on their way, and where the other program runs between."""
    m = golden_model("smolvla")
    policy = load_policy(m.ckpt.path, device="cuda", precision="bf16", threads=threads)
    random = np.random.default_rng(0)
    state = random.standard_normal(policy.info.state_dim).astype(np.float32)
    cameras = policy.info.cameras
    sizes = ((480, 640), (37, 51), (1080, 1920), (1, 1), (241, 333))
    tasks = ("pick up the cube", "a much longer instruction that needs a bucket of its own, surely")
    seen_already = []
    for turn in range(20):
        noise = random.standard_normal((policy.info.horizon, 32), np.float32)
        height, width = sizes[turn % len(sizes)]
        images = {camera: random.integers(0, 256, (height, width + 9, 3), np.uint8) for camera in cameras}
        images = {camera: image[:, 9 * (turn % 2) :][:, :width] for camera, image in images.items()}
        if turn % 3 == 2:
            images.pop(cameras[turn % 2])
        if turn % 4 == 3:
            with pytest.raises(ObservationError):
                policy.predict(images, state, tasks[turn % 2], noise=noise[:1])
        staged = policy.predict(images, state, tasks[turn % 2], noise=noise)

        encoded = policy._processors.encode(state, tasks[turn % 2])
        made = policy._program(len(encoded.tokens))
        pictures = [images.get(camera) for camera in cameras]
        observation = TapeObservation(pictures, encoded.state, encoded.tokens, noise)
        made.inputs["frames"][...] = 0
        fill_inputs(made.inputs, policy._model, policy._sizes, observation)
        made.run()
        np.testing.assert_array_equal(staged, policy._processors.decode(made.result("actions"), state))
        made.inputs["frames"][...] = 0
        made.stage("frames", pictures)
        other = policy._program(len(policy._processors.encode(state, tasks[1 - turn % 2]).tokens))
        assert other is not made
        other.run()
        made.run()
        np.testing.assert_array_equal(staged, policy._processors.decode(made.result("actions"), state))
        assert all(relative(staged, other) > 1e-3 for other in seen_already)
        seen_already.append(staged)


def test_pictures_that_the_gpu_reads_by_itself() -> None:
    """Some of them or all, of several sizes, cut out of a larger one (copied then), run twice, and where the other
    program of the policy runs between: the bits of pictures that are copied."""
    m = golden_model("smolvla")
    policy = load_policy(m.ckpt.path, device="cuda", precision="bf16")
    random = np.random.default_rng(0)
    state = random.standard_normal(policy.info.state_dim).astype(np.float32)
    tasks = ("pick up the cube", "a much longer instruction that needs a bucket of its own, surely")
    for turn, (height, width) in enumerate(
        ((480, 640), (37, 51), (1080, 1920), (1, 1), (241, 333), (480, 640))
    ):
        noise = random.standard_normal((policy.info.horizon, 32), np.float32)
        usual, read = {}, {}
        for i, camera in enumerate(policy.info.cameras):
            usual[camera] = random.integers(0, 256, (height, width, 3), np.uint8)
            place = policy.picture_memory(height, width + (9 if turn == 4 else 0))[:, :width]
            place[...] = usual[camera]
            read[camera] = usual[camera] if turn % 3 == i + 1 else place
        want = policy.predict(usual, state, tasks[0], noise=noise)
        made = policy._program(len(policy._processors.encode(state, tasks[0]).tokens))
        made.inputs["frames"][...] = 77
        np.testing.assert_array_equal(policy.predict(read, state, tasks[0], noise=noise), want)
        made.run()
        np.testing.assert_array_equal(policy._processors.decode(made.result("actions"), state), want)
        other = policy._program(len(policy._processors.encode(state, tasks[1]).tokens))
        assert other is not made
        other.run()
        made.run()
        np.testing.assert_array_equal(policy._processors.decode(made.result("actions"), state), want)


def test_float32_is_refused() -> None:
    m = golden_model("smolvla")
    with pytest.raises(EngineError, match=r"precision 'fp32': expected 'bf16'"):
        Engine([m.tape(prompt=8)], m.ckpt.read, device="cuda", precision="fp32")


# ---------------------------------------------------------------------------------------------------------- fp8
needs_fp8 = pytest.mark.skipif(
    torch.cuda.get_device_capability() != (9, 0), reason="fp8 needs a GPU of compute capability 9.0"
)


def in_fp8_anywhere(case) -> bool:
    tape = make(case, seed=0).tape
    in_vision(tape)
    return any(in_fp8(op) for op in tape.ops)


@needs_fp8
@pytest.mark.parametrize(
    "case", [*(case for case in CASES if in_fp8_anywhere(case)), *CHAINS], ids=lambda case: case.__name__
)
def test_fp8_matches_the_same_quantised_operands(case) -> None:
    """Half as far from the products of the same operands as these are from the exact ones, which leaves room for a
    value now and then that lay between two numbers of E4M3, and for the result in bfloat16."""
    c = make(case, seed=len(case.__name__))
    in_vision(c.tape)
    read = c.weights.__getitem__
    scales = calibrated(c.tape, read, c.inputs)
    made = Engine([c.tape], read, device="cuda", precision="fp8", scales=scales).programs[0]
    for values in made.inputs.values():
        if values.dtype == np.float32:
            values[...] = np.nan
    made.run()
    for name, values in c.inputs.items():
        made.inputs[name][...] = values
    made.run()
    got = made.result("result")
    want = ReferenceExecutor(c.tape, read, "fp64", scales=scales).run(c.inputs)["result"]
    exact = ReferenceExecutor(c.tape, read, "fp64").run(c.inputs)["result"]
    error, format_error = relative(got, want), relative(want, exact)
    print(f"{case.__name__}: {error:.2e}, the format {format_error:.2e}")
    assert error <= 0.5 * format_error + 3e-3


@needs_fp8
@pytest.mark.parametrize("kept", ["nothing kept", "kept"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_fp8_golden(family: str, kept: str) -> None:
    """Also with every third product kept in bfloat16; the same bits each time, in less memory than bfloat16."""
    m = golden_model(family)
    for run in (RUNS["plain"], RUNS["b"]):
        tape = m.tape(prompt=m.prompt(run) + 5)
        inputs = m.inputs(tape, run, m.noise(run))
        bf16 = products(tape)[::3] if kept == "kept" else ()
        scales = calibrated(tape, m.ckpt.read, inputs, bf16=bf16)
        engine = Engine([tape], m.ckpt.read, device="cuda", precision="fp8", scales=scales)
        made = engine.programs[0]
        fill(made, m, run)
        made.run()
        got = made.result("actions")
        want = reference(m, run, "fp32")
        same = ReferenceExecutor(tape, m.ckpt.read, "fp64", scales=scales).run(inputs)["actions"]
        cosine = float(np.sum(got * want) / np.linalg.norm(got) / np.linalg.norm(want))
        print(
            f"{family} {run.name}: cosine {cosine:.5f}, {relative(got, want):.2e} from float32, the format "
            f"{relative(same, want):.2e}"
        )
        assert cosine >= 0.995
        assert relative(got, want) <= 1.5 * relative(same, want) + 1e-2
        for _ in range(20):
            made.run()
            np.testing.assert_array_equal(made.result("actions"), got)
        whole = Engine([tape], m.ckpt.read, device="cuda", precision="bf16")
        assert engine.weight_bytes < whole.weight_bytes


@needs_fp8
def test_fp8_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From observations to actions: calibrated on the reference executor, loaded on the GPU, verified there."""
    ckpt = read_checkpoint(ROOT / "smolvla")
    observations = random_observations(ckpt, build_processors(ckpt), 4)
    runner = Runner(ckpt, observations, device="reference")
    path = Path(shutil.copytree(ckpt.path, tmp_path / "policy"))
    scales = runner.calibrate()
    scales.write(path / FILE)
    policy = load_policy(path, device="cuda", precision="fp8")
    assert policy.info.precision == "fp8"
    for i, o in enumerate(observations):
        noise = np.random.default_rng([0, i]).standard_normal((policy.info.horizon, 32), np.float32)
        got = policy.predict(o.images, o.state, o.task, noise=noise)
        assert relative(got, runner.run(i, scales).robot) < 0.05
    assert main(["verify", str(path), "--device", "cuda", "--precision", "fp8"]) == 0
    assert "fp8 against bfloat16" in capsys.readouterr().out


@needs_fp8
def test_fp8_from_first_observations(tmp_path: Path) -> None:
    """Calibrated on the engine while it goes on in bfloat16: the scales are the reference executor's."""
    ckpt = read_checkpoint(ROOT / "smolvla")
    observations = random_observations(ckpt, build_processors(ckpt), 4)
    path = Path(shutil.copytree(ckpt.path, tmp_path / "policy"))
    said: list[str] = []
    policy = load_calibrating(path, 4, say=said.append)
    before = [policy.predict(o.images, o.state, o.task) for o in observations]
    assert policy.info.precision == "bf16"
    while policy.thread.is_alive():
        policy.seed(0)
        again = [policy.predict(o.images, o.state, o.task) for o in observations]
        if policy.info.precision == "bf16":
            np.testing.assert_array_equal(again, before)
    policy.predict(observations[0].images, observations[0].state, observations[0].task)
    assert policy.info.precision == "fp8", said
    want = Runner(ckpt, observations, device="reference").calibrate()
    got = read_scales(path / FILE)
    np.testing.assert_allclose(list(got.activations.values()), list(want.activations.values()), rtol=0.05)
    assert (got.weights, got.tape, got.samples, got.held_out) == (want.weights, want.tape, 3, 1)
    print(f"{said[1]}; the reference executor: {want.unseen}")


@pytest.mark.skipif(
    torch.cuda.get_device_capability() == (9, 0), reason="needs a GPU that does not compute fp8"
)
def test_fp8_is_refused_by_other_gpus() -> None:
    c = make(CHAINS[0], seed=1)
    in_vision(c.tape)
    scales = calibrated(c.tape, c.weights.__getitem__, c.inputs)
    with pytest.raises(EngineError, match=r"precision 'fp8': expected compute capability 9\.0") as info:
        Engine([c.tape], c.weights.__getitem__, device="cuda", precision="fp8", scales=scales)
    assert "\n" not in str(info.value)
