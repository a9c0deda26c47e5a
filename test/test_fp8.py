"""Precision "fp8": E4M3 itself, which products are in it, the calibration file, and the reference executor."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import ROOT, relative
from op_cases import Case

from vla_infer import fp8
from vla_infer.checkpoint import read_checkpoint
from vla_infer.errors import CheckpointError, EngineError
from vla_infer.fp8 import Errors, Scales, in_fp8, key, read_scales, round_e4m3
from vla_infer.inputs import empty_inputs
from vla_infer.models import FAMILIES
from vla_infer.models.layers import rope_table
from vla_infer.tape import Norm, Rope, Tape, Weight

torch = pytest.importorskip("torch", reason="needs torch for its float8_e4m3fn and the reference executor")
from vla_infer.reference import ReferenceExecutor  # noqa: E402

torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------------------- numbers
def e4m3() -> np.ndarray:
    """Every finite value, ascending: 127 magnitudes and both signs."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    return np.sort(values[np.isfinite(values)])


def test_rounding_is_torchs_on_every_value_and_tie() -> None:
    values = e4m3()
    assert len(values) == 254
    assert values[-1] == fp8.E4M3_MAX
    ties = (values[1:] + values[:-1]) / 2
    near = [np.nextafter(ties, np.float32(to), dtype=np.float32) for to in (-1e9, 1e9)]
    some = np.random.default_rng(0).standard_normal(10_000) * 2.0 ** np.random.default_rng(1).integers(
        -12, 9, 10_000
    )
    x = np.concatenate([values, ties, *near, some]).astype(np.float32)
    x = x[np.abs(x) <= 448]
    want = torch.from_numpy(x).to(torch.float8_e4m3fn).to(torch.float32).numpy()
    np.testing.assert_array_equal(round_e4m3(x), want)
    np.testing.assert_array_equal(np.signbit(round_e4m3(x)), np.signbit(want))


def test_rounding_is_clipped_and_keeps_nan() -> None:
    x = np.array([448.1, 464, 1e30, np.inf, -460, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(round_e4m3(x), np.array([448] * 4 + [-448] * 2 + [np.nan], np.float32))


def test_scales_of_rows() -> None:
    w = np.array([[1, -896], [0, 0], [1e-38, 0], [np.nan, 1]], np.float32)
    np.testing.assert_array_equal(fp8.row_scales(w), np.array([2, 1, 1, np.nan], np.float32))
    assert fp8.row_scales(w).dtype == np.float32


# ------------------------------------------------------------------------------------------------------- operations
def tape(family: str, *, prompt: int = 16, steps: int | None = None, **options: Any) -> Tape:
    model = FAMILIES[family]
    sizes = model.sizes(read_checkpoint(ROOT / family), steps=steps)
    recorded: Tape = model.record(
        sizes, prompt=prompt, frame_bytes=options.pop("frame_bytes", 3000), **options
    )
    return recorded


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_vision_and_prefix_are_in_fp8(family: str) -> None:
    t = tape(family)
    names = fp8.products(t)
    depth = 3  # of the golden policies' encoders; their decoders have one more, whose last makes only keys and values
    assert len(names) == 1 + 4 * depth + 1 + 4 * depth + 1
    assert not [name for name in names if "expert" in name.split(".")[-5:][0] or "state_proj" in name]
    assert all(op.stage in ("vision", "prefix") and not op.loop for op in t.ops if in_fp8(op))
    assert len([op for op in t.ops if in_fp8(op, names[:5])]) == len(names) - 5
    assert len(names) == len({name for name in names if name in read_checkpoint(ROOT / family).tensors})


def test_what_is_kept() -> None:
    t = Tape()
    x = t.linear(t.input("x", (4, 16), "f32"), Weight("raw", 16, 16))
    for stage in ("", "vision", "prefix", "head"):
        t.stage = stage
        t.linear(x, Weight(f"{stage}.plain", 16, 16))
        t.linear(x, Weight(f"{stage}.keep", 16, 16, keep=True))
        t.linear(t.constant("c", np.ones((4, 16), np.float32), "act"), Weight(f"{stage}.load", 16, 16))
    t.stage = "prefix"
    t.linear(x.columns(0, 8), Weight("wide", 16, 8, (8, 16)))
    t.attention(x, x, x, head_dim=16)
    assert fp8.products(t) == ("vision.plain", "prefix.plain", "wide[:, 8:16]")
    with t.loop(2):
        t.linear(x, Weight("looped", 16, 16))
    assert fp8.products(t) == ("vision.plain", "prefix.plain", "wide[:, 8:16]")


def test_hash_of_a_tape() -> None:
    """Prompt, pictures, probes and steps leave it; a weight's shape, a norm, or another operand change it."""
    one = fp8.hash_tape(tape("smolvla"))
    same = tape("smolvla", prompt=48, steps=3, frame_bytes=9000, probes=True)
    assert fp8.hash_tape(same) == one != fp8.hash_tape(tape("pi0"))

    def toy(*, n: int = 32, eps: float = 1e-6, other: bool = False) -> str:
        t = Tape(stage="vision")
        x = t.linear(t.input("x", (4, 16), "f32"), Weight("a", 16, 16))
        y = t.linear(x, Weight("b", 16, 16), norm=Norm("rms", eps))
        t.linear(x if other else y, Weight("c", n, 16))
        return fp8.hash_tape(t)

    assert len({toy(), toy(n=48), toy(eps=1e-5), toy(other=True)}) == 4


def scales_of(t: Tape, **changed: Any) -> Scales:
    errors = Errors(0.999, 0.9995, 0.998, 0.04, 0.03, 1.5)
    activations = {name: float(np.float32(0.1 * i + 0.3)) for i, name in enumerate(fp8.products(t))}
    scales = Scales(activations, (), "0" * 64, fp8.hash_tape(t), 48, 16, errors, errors)
    return replace(scales, **changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_stored_in_fp8(family: str) -> None:
    """Patches, what attention and the first products of an MLP give, what the connector reads: each with its
    reader's scale, until the reader is kept."""
    t = tape(family)
    scales = scales_of(t)
    stored = fp8.stored_in_fp8(t, scales)
    read_by = {op.operands["x"].buffer.id: key(op) for op in t.ops if op.kind == "linear" and in_fp8(op)}
    names = {read_by[id_] for id_ in stored}
    ends = {"patch_embedding", "out_proj", "fc2", "o_proj", "down_proj"} | (
        {"proj"} if family == "smolvla" else set()
    )
    assert {name.split(".")[-2] for name in names} == ends
    count = 4 * 3 + len(ends) - 4
    assert len(stored) == count
    assert all(stored[id_] == scales.activations[read_by[id_]] for id_ in stored)
    kept = sorted(names)[0]
    assert len(fp8.stored_in_fp8(t, replace(scales, bf16=(kept,)))) == count - 1


@pytest.mark.parametrize("case", ["norm", "residual", "scale", "output", "writer", "head", "good"])
def test_what_is_not_stored_in_fp8(case: str) -> None:
    t = Tape(stage="vision")
    first = t.linear(t.input("x", (4, 16), "f32"), Weight("a", 16, 16))
    x = (
        t.linear(first, Weight("x", 16, 16))
        if case != "writer"
        else t.embed(
            t.input("i", (4, 1), "i32"), t.param("e", (9, 16), "act"), scale=1, out=t.temp("x", (4, 16))
        )
    )
    t.linear(x, Weight("b", 16, 16), norm=Norm("rms", 1e-6) if case == "norm" else None)
    t.linear(x, Weight("c", 16, 16))
    if case == "residual":
        t.linear(first, Weight("d", 16, 16), residual=x)
    if case == "output":
        t.output("x", x)
    if case == "head":
        t.stage = "head"
        t.linear(x, Weight("e", 16, 16))
    activations = dict.fromkeys(fp8.products(t), 0.5) | ({"c": 0.25} if case == "scale" else {})
    stored = fp8.stored_in_fp8(t, scales_of(t, activations=activations))
    assert (x.buffer.id in stored) == (case == "good")


# -------------------------------------------------------------------------------------------------- calibration file
def test_file_comes_back(tmp_path: Path) -> None:
    t = tape("smolvla")
    for scales in (scales_of(t), scales_of(t, bf16=(fp8.products(t)[3],), held_out=0, unseen=None)):
        scales.write(tmp_path / fp8.FILE)
        assert read_scales(tmp_path / fp8.FILE) == scales
    assert [p.name for p in tmp_path.iterdir()] == [fp8.FILE]


def test_hash_of_weights_is_of_all_bytes_by_name(tmp_path: Path) -> None:
    files = [tmp_path / f"model-{i}" for i in range(8)]
    for path in files:
        path.write_bytes(path.name.encode())
    want = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    assert fp8.hash_weights(files[::-1] + files) == want


def test_stale_file_is_refused_by_name(tmp_path: Path) -> None:
    t, weights = tape("smolvla"), [tmp_path / "b", tmp_path / "a"]
    weights[0].write_bytes(b"two")
    weights[1].write_bytes(b"one")
    digest = hashlib.sha256(b"onetwo").hexdigest()
    path = tmp_path / "fp8.json"
    good = scales_of(t, weights=digest)
    good.check(path, [t, tape("smolvla", prompt=48)], weights)
    weights[0].write_bytes(b"tw0")
    now = hashlib.sha256(b"onetw0").hexdigest()
    for files, tapes, message in (
        (weights, [t], f"stale, weights changed: expected {now[:12]}… .the policy., got {digest[:12]}…"),
        (weights, [tape("pi0")], "stale, tape changed: expected"),
        ([tmp_path / "none"], [t], "none: cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=message) as info:
            good.check(path, tapes, files)
        assert "\n" not in str(info.value)
    with pytest.raises(CheckpointError, match=f"fp8.json: .*run: vla-infer calibrate {tmp_path}"):
        good.check(path, [t], weights)
    less = dict(list(good.activations.items())[1:])
    with pytest.raises(CheckpointError, match=r"no scale of .*patch_embedding"):
        replace(good, activations=less).check(path, [t], weights)


def put(*path: str, value: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("version", value=2), "version: expected 1, got 2"),
        (put("more", value=1), "'more' is not known"),
        (put("seen", "more", value=1), "seen: 'more' is not known"),
        (lambda d: d.pop("tape"), "tape is missing"),
        (lambda d: d.pop("bf16"), "bf16 is missing"),
        (lambda d: d["unseen"].pop("cosine"), "unseen: cosine is missing"),
        (put("weights", value="A" * 64), "weights: expected 64 hexadecimal digits"),
        (put("activations", value=[1]), "activations: expected an object"),
        (put("activations", "w", value=0), "activations: w: expected a number above 1e-37, got 0"),
        (put("activations", "w", value=True), "activations: w: expected a number above 1e-37, got True"),
        (put("activations", "a\nb", value=1), r"activations: expected names of weights, got 'a\\nb'"),
        (lambda d: d.pop("unseen"), "unseen is missing"),
        (put("bf16", value=["w"]), "bf16: 'w' is no product in activations"),
        (put("samples", value=0), "samples: expected an integer from 1"),
    ],
)
def test_file_that_is_not_valid(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "fp8.json"
    scales_of(tape("smolvla")).write(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message) as info:
        read_scales(path)
    assert str(info.value).startswith(str(path))
    assert str(info.value).endswith(f"; run: vla-infer calibrate {tmp_path}")
    assert "\n" not in str(info.value)


def test_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fp8.json: missing; .* run: vla-infer calibrate"):
        read_scales(tmp_path / "fp8.json")
    (tmp_path / "fp8.json").write_text('{"version": 1, "version": 1}')
    with pytest.raises(CheckpointError, match=r"duplicate key 'version'\); run"):
        read_scales(tmp_path / "fp8.json")


# ------------------------------------------------------------------------------------------------ reference executor
def product(kind: str, norm: Norm | None = None) -> Case:
    """A product of the prefix with all that can come after it, on operands that bfloat16 holds."""
    c = Case(7)
    c.tape.stage = "prefix"
    x = c.x(24, 64)
    if kind == "linear":
        after = {"bias": c.row("b", 64), "residual": c.x(12, 64, name="r"), "gate": c.row("g", 64)}
        y = c.tape.linear(x, c.weight("w", 64, 64), norm=norm, act="gelu_tanh", scale=1.5, **after)
    elif kind == "gated_linear":
        y = c.tape.gated_linear(x, c.weight("w", 48, 64), c.weight("up", 48, 64), norm=norm, act="silu")
    else:
        weights = {"q": c.weight("w", 128, 64), "k": c.weight("k", 64, 64), "v": c.weight("v", 64, 64)}
        y = c.tape.temp("all", (24, 256))
        into = {"q": y.columns(0, 128), "k": y.columns(128, 192), "v": y.columns(192, 256)}
        rope = Rope(c.tape.constant("rope", rope_table(32, 64, 100.0)), c.ints("positions", np.arange(24)))
        bias = {"v": c.row("vb", 64)}
        c.tape.qkv(x, weights, head_dim=64, norm=norm, rope=rope, biases=bias, into=into)
    c.tape.output("result", y)
    return c


def run(c: Case, precision: str, scales: Scales | None = None, inputs: Any = None) -> np.ndarray:
    executor = ReferenceExecutor(c.tape, c.weights.__getitem__, precision, scales=scales)
    return executor.run(inputs or c.inputs)["result"]


@pytest.mark.parametrize("kind", ["linear", "gated_linear", "qkv"])
def test_a_product_is_its_rounded_operands(kind: str) -> None:
    """In float64 to the last digits what the same tape gives on operands rounded here; in fp8 but for bfloat16."""
    c = product(kind)
    scale = np.float32(np.abs(c.inputs["x"]).max() / 448 * 0.8)  # so that something is clipped
    scales = scales_of(c.tape, activations={"w": float(scale)})
    plain = run(c, "fp64")
    got, exact = run(c, "fp8", scales), run(c, "fp64", scales)
    rounded = round_e4m3(c.inputs["x"] / scale).astype(float) * float(scale)
    for name in {"w", "up", "k", "v"} & set(c.weights):
        rows = fp8.row_scales(c.weights[name])[:, None]
        c.weights[name] = round_e4m3(c.weights[name] / rows).astype(float) * rows
    want = run(c, "fp64", inputs=c.inputs | {"x": rounded})
    assert relative(exact, want) < 1e-9
    assert relative(got, want) < 5e-3
    assert relative(want, plain) > 2e-2


def test_what_is_kept_is_as_in_bfloat16() -> None:
    c = product("linear")
    scales = scales_of(c.tape, activations={"w": 0.01})
    np.testing.assert_array_equal(run(c, "fp8", replace(scales, bf16=("w",))), run(c, "bf16"))
    assert relative(run(c, "fp8", scales), run(c, "bf16")) > 1e-2
    with pytest.raises(EngineError, match="precision 'fp8' needs scales"):
        run(c, "fp8")


def test_other_weights_are_rounded_anew() -> None:
    c = product("gated_linear")
    scales = scales_of(c.tape, activations={"w": 0.01})
    executor = ReferenceExecutor(c.tape, c.weights.__getitem__, "fp8", scales=scales)
    executor.run(c.inputs)
    c.weights["up"] = -c.weights["up"]
    executor.bind(lambda name: torch.from_numpy(c.weights[name]))
    np.testing.assert_array_equal(executor.run(c.inputs)["result"], run(c, "fp8", scales))


@pytest.mark.parametrize("where", ["input", "weight"])
def test_nan_passes_through(where: str) -> None:
    c = product("gated_linear")
    (c.inputs["x"] if where == "input" else c.weights["up"])[3, 5] = np.nan
    nan = np.isnan(run(c, "fp8", scales_of(c.tape, activations={"w": 0.01})))
    want = np.zeros_like(nan)
    want[3 if where == "input" else (slice(None), 3)] = True
    np.testing.assert_array_equal(nan, want)


@pytest.mark.parametrize("kind", ["linear", "gated_linear", "qkv"])
def test_left_operands_are_seen_after_their_norm(kind: str) -> None:
    c = product(kind, Norm("rms", 1e-9))
    seen = {}
    executor = ReferenceExecutor(c.tape, c.weights.__getitem__, "bf16")
    executor.observe = lambda op, x: seen.setdefault(key(op), x.float().numpy())
    executor.run(c.inputs)
    x = c.inputs["x"]
    assert relative(seen["w"], x / np.sqrt((x**2).mean(1, keepdims=True))) < 4e-3


def test_every_step_of_the_loop_is_seen() -> None:
    m = read_checkpoint(ROOT / "smolvla")
    t = tape("smolvla", steps=3)
    executor = ReferenceExecutor(t, m.read, "bf16")
    counts: dict[str, int] = {}
    executor.observe = lambda op, x: counts.update({key(op): counts.get(key(op), 0) + 1})
    executor.run(empty_inputs(t))
    steps = {
        key(op): 3 if op.loop else 1 for op in t.ops if op.weights and op.kind != "euler" and not op.at_load
    }
    assert counts == steps


def test_executors_share_weights() -> None:
    ckpt, reads = read_checkpoint(ROOT / "smolvla"), []
    scales = scales_of(tape("smolvla"))

    def read(name: str) -> np.ndarray:
        reads.append(name)
        return ckpt.read(name)

    first = ReferenceExecutor(tape("smolvla"), read, "fp8", scales=scales)
    count = len(reads)
    second = ReferenceExecutor(tape("smolvla", prompt=48), read, "fp8", scales=scales, like=first)
    assert count > 100
    assert len(reads) == count
    name = "model.state_proj.weight"
    assert second.weights[name].data_ptr() == first.weights[name].data_ptr()
    own = ReferenceExecutor(tape("smolvla", prompt=48), read, "fp8", scales=scales)
    inputs = empty_inputs(second.tape)
    first.run(empty_inputs(first.tape))
    np.testing.assert_array_equal(second.run(inputs)["actions"], own.run(inputs)["actions"])
    assert all(a is b for a, b in zip(second.eights.values(), first.eights.values(), strict=True))
