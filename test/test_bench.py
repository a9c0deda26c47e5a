"""`vla-infer bench`: what a ratio is worth, what is counted, and that every peer computes what the reference does."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vla_infer import cli, load_policy
from vla_infer.bench import command, peers
from vla_infer.bench.cost import tape_cost
from vla_infer.bench.measure import in_turn, percentiles, ratio
from vla_infer.bench.rendering import Renderer, picture
from vla_infer.bench.report import markdown
from vla_infer.bench.setups import Plan, Setup, make_tape
from vla_infer.checkpoint import Checkpoint, read_checkpoint
from vla_infer.errors import EngineError, VlaInferError
from vla_infer.inputs import TapeObservation, empty_inputs, fill_inputs
from vla_infer.models import FAMILIES
from vla_infer.policy import weight_reader
from vla_infer.processors import build_processors
from vla_infer.tape import Tape, Weight
from vla_infer.verify import relative

GOLDEN = Path(__file__).parent / "golden"


def job_of(ckpt: Checkpoint, tmp_path: Path, *, limit: float = 300.0) -> peers.Job:
    tape, draw = make_tape(ckpt, Setup("cpu", "fp32", 48, steps=3))
    sets = [draw(np.random.default_rng(i)) for i in range(2)]
    return peers.Job(tape, weight_reader(ckpt), sets, "cpu", 1, tmp_path, limit)


def torch_or_skip() -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed: no reference executor")


# ------------------------------------------------------------------ statistics
def test_a_ratio_is_the_median_of_pairs_between_order_statistics() -> None:
    ours = np.ones(10)
    theirs = np.array([2.0, 1.0, 3.0, 9.0, 2.0, 2.2, 2.4, 2.6, 2.8, 1.5])
    r = ratio(theirs, ours)
    assert r.median == pytest.approx(2.3)
    assert (r.low, r.high) == (1.5, 3.0)  # the second lowest and second highest of ten
    assert r.confidence == pytest.approx(1 - 2 * 11 / 1024)


def test_five_pairs_say_that_they_cannot_reach_95_percent() -> None:
    r = ratio(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.ones(5))
    assert (r.low, r.median, r.high) == (1.0, 3.0, 5.0)
    assert r.confidence == pytest.approx(0.9375)


def test_pairs_are_compared_one_by_one() -> None:
    drifting = np.array([1.0, 2.0, 4.0, 8.0])
    assert str(ratio(2 * drifting, drifting)) == "2.00 [2.00, 2.00]"


def test_both_take_turns_on_the_same_inputs() -> None:
    calls: list[tuple[str, int]] = []
    mine, its = in_turn(
        lambda i: calls.append(("ours", i)), lambda i: calls.append(("its", i)), pairs=2, warmup=1
    )
    assert calls == [(who, i) for i in (-1, 0, 1) for who in ("ours", "its")]
    assert len(mine) == len(its) == 2


def test_percentiles_are_milliseconds() -> None:
    assert percentiles(np.array([0.001, 0.002, 0.003])) == {"p50": 2.0, "p95": 2.9, "p99": 2.98, "max": 3.0}


def test_cost_counts_products_each_time_they_run() -> None:
    t = Tape()
    x = t.input("x", (4, 8), "act")
    t.stage = "vision"
    y = t.linear(x, Weight("a", 16, 8))
    q = t.qkv(y, {n: Weight(n, 16, 16) for n in "qkv"}, head_dim=8)
    t.attention(q["q"], q["k"], q["v"], head_dim=8)
    t.stage = "head"
    with t.loop(3):
        t.linear(y, Weight("b", 2, 16))
    costs = tape_cost(t, "bf16")
    assert costs["vision"].flops == 2 * 4 * 8 * 16 + 3 * 2 * 4 * 16 * 16 + 4 * 4 * 4 * 16
    assert costs["vision"].moved == 2 * (8 * 16 + 3 * 16 * 16)
    assert (costs["head"].flops, costs["head"].moved) == (3 * 2 * 4 * 16 * 2, 3 * 2 * 16 * 2)


# ---------------------------------------------------------------------- inputs
def test_inputs_are_those_of_predict() -> None:
    """A picture smaller than its place, a missing camera, a short prompt: the same numbers as the policy's own."""
    policy = load_policy(GOLDEN / "smolvla", max_image=(48, 80))
    camera = policy.info.cameras[1]
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (40, 60, 3), np.uint8)
    state = random.standard_normal(policy.info.state_dim).astype(np.float32)
    noise = random.standard_normal((policy.info.horizon, 32), np.float32)
    policy.predict({camera: image}, state, "pick up the cube", noise=noise)
    encoded = policy._processors.encode(state, "pick up the cube")
    program = policy._program(len(encoded.tokens))
    bucket = len(program.inputs["tokens"])
    # actions are denoised in place, and a picture's place keeps what lay behind it
    tape = FAMILIES["smolvla"].record(policy._sizes, prompt=bucket, frame_bytes=48 * 80 * 3)
    inputs = empty_inputs(tape)
    seen = TapeObservation([None, image], encoded.state, encoded.tokens, noise)
    fill_inputs(inputs, FAMILIES["smolvla"], policy._sizes, seen)
    assert set(inputs) == set(program.inputs)
    for name, values in inputs.items():
        if name != "actions":
            np.testing.assert_array_equal(values, program.inputs[name], name)
    np.testing.assert_array_equal(inputs["actions"], noise)


def test_preprocessing_is_a_stage_of_its_own() -> None:
    tape, _ = make_tape(read_checkpoint(GOLDEN / "pi05"), Setup("cpu", "fp32", 16))
    assert {op.kind for op in tape.ops if op.stage == "preprocess"} == {"image_patches"}
    assert "vision" in {op.stage for op in tape.ops}


# ----------------------------------------------------------------------- peers
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torch_computes_what_the_reference_does(family: str, precision: str, tmp_path: Path) -> None:
    torch_or_skip()
    from vla_infer.bench.torch_peer import calling
    from vla_infer.bench.torch_rendering import TorchRenderer
    from vla_infer.reference import ReferenceExecutor

    job = job_of(read_checkpoint(GOLDEN / family), tmp_path)
    renderer = TorchRenderer(job.tape, job.read, precision, geometry=job.inputs(0)["geometry"])
    call = calling(job, renderer.run, "cpu")
    exact, peer = (ReferenceExecutor(job.tape, job.read, p) for p in ("fp32", precision))
    for i in (1, 0):
        want = exact.run(job.inputs(i))["actions"]
        limit = 1e-5 if precision == "fp32" else 2 * relative(peer.run(job.inputs(i))["actions"], want)
        assert relative(call(i), want) < limit


def test_torch_does_no_work_of_the_prefix_in_a_step(tmp_path: Path) -> None:
    """What a step computes comes from x or from the number of the step: no mask, no rotary row, no prefix key."""
    torch_or_skip()
    from vla_infer.bench.torch_rendering import TorchRenderer

    job = job_of(read_checkpoint(GOLDEN / "smolvla"), tmp_path)
    renderer = TorchRenderer(job.tape, job.read, "fp32", geometry=job.inputs(0)["geometry"])
    depends = set()
    for node in renderer.step.graph.nodes:
        fresh = node.op == "placeholder" and (node.name == "x" or node.name.startswith("row"))
        if fresh or any(n in depends for n in node.all_input_nodes):
            depends.add(node)
        else:
            assert node.op in ("placeholder", "get_attr"), node


@pytest.mark.parametrize(
    ("peer", "precision", "limit"),
    [
        ("onnxruntime", "fp32", 1e-5),
        ("onnxruntime", "int8", 0.05),
        ("openvino", "fp32", 1e-5),
        ("openvino", "bf16", 0.02),
        ("openvino", "int8", 0.05),
    ],
)
@pytest.mark.parametrize("family", ["smolvla", "pi05"])
def test_exported_tape_computes_what_the_reference_does(
    family: str, peer: str, precision: str, limit: float, tmp_path: Path
) -> None:
    torch_or_skip()
    lacking = peers.missing(peer)
    if lacking:
        pytest.skip(f"{peer}: {lacking}")
    job = job_of(read_checkpoint(GOLDEN / family), tmp_path)
    found = 0
    for made in peers.open_peers(peer, job, precision):
        assert isinstance(made, peers.Peer), made
        for i in (1, 0):
            want, _ = command.expected(job.tape, job.read, job.inputs(i))
            assert relative(made.call(i), want) < limit
        found += 1
    assert found == 1
    assert not list(tmp_path.iterdir()), "exported models are left behind"


def test_onnxruntime_says_that_it_has_no_bfloat16(tmp_path: Path) -> None:
    lacking = peers.missing("onnxruntime")
    if lacking:
        pytest.skip(f"onnxruntime: {lacking}")
    (refused,) = peers.open_peers("onnxruntime", job_of(read_checkpoint(GOLDEN / "pi05"), tmp_path), "bf16")
    assert isinstance(refused, peers.Refused)
    assert "no bfloat16" in refused.why


def test_a_missing_peer_is_one_line_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(peers.MODULES, "openvino", (("onnx_that_is_not", "openvino_that_is_not"), "none"))
    (refused,) = peers.open_peers("openvino", job_of(read_checkpoint(GOLDEN / "pi05"), tmp_path), "fp32")
    assert isinstance(refused, peers.Refused)
    assert "pip install onnx_that_is_not openvino_that_is_not (or vla_infer[peers])" in refused.why
    assert "\n" not in refused.why


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda a: a * 1.01, "not timed: relative error 0.01"),
        (lambda a: a * np.nan, "not timed: relative error inf"),
        (lambda a: a[:1], "not timed"),
        (lambda a: 1 // 0, "ZeroDivisionError: "),
    ],
)
def test_a_peer_that_is_wrong_is_not_timed(spoil: Callable[[np.ndarray], np.ndarray], why: str) -> None:
    want = np.ones((3, 4), np.float32)
    plan = command.Plan(1, 0, [], 2, 1.0)
    peer = peers.Peer("Other", "fp32", lambda i: spoil(want))
    refused = command._compare_one(lambda i: want, peer, plan, want)
    assert isinstance(refused, peers.Refused)
    assert why in refused.why


def test_compilation_stops_at_its_limit(tmp_path: Path) -> None:
    torch_or_skip()
    start = time.monotonic()
    made = list(
        peers.open_peers("torch", job_of(read_checkpoint(GOLDEN / "smolvla"), tmp_path, limit=0.2), "fp32")
    )
    assert [type(m) for m in made] == [peers.Peer, peers.Refused]
    assert "had not ended after 0.2 s" in made[1].why
    assert time.monotonic() - start < 60


def test_unknown_baseline_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--policy", str(GOLDEN / "smolvla"), "--baseline", "torch,tensorflow"]
    assert cli.main(words) == 1
    assert "expected torch, torch-compile, onnxruntime, openvino, got 'tensorflow'" in capsys.readouterr().err


def test_report_in_markdown_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole verb on a small policy: every peer is timed or says why not."""
    torch_or_skip()
    out, tables = tmp_path / "out.json", tmp_path / "out.md"
    words = ["bench", "--policy", str(GOLDEN / "smolvla"), "--precision", "fp32", "--steps", "2"]
    words += ["--runs", "2", "--warmup", "1", "--pairs", "2", "--compile-limit", "0.2", "--threads", "1"]
    words += ["--baseline", "torch,onnxruntime,openvino", "--json", str(out), "--markdown", str(tables)]
    assert cli.main(words) == 0
    document = json.loads(out.read_text())
    (report,) = document["reports"]
    named = {p["name"] for p in report["peers"]} | {r["name"] for r in report["refused"]}
    assert named >= {"PyTorch eager", "PyTorch compiled"}
    assert len(named) == 4
    assert report["error"] < 1e-4
    # Two bytes a weight in the file, four as float32 in the engine, where a few are kept twice or in another shape.
    assert 0 < report["read_mb"] <= report["weight_mb"]
    assert 0 < report["read_s"] <= report["load_s"] < report["first_action_s"]
    for p in report["peers"]:
        assert p["error"] < 1e-4
        assert p["ratio"]["low"] <= p["ratio"]["median"] <= p["ratio"]["high"]
    assert set(report["stages"]) == {"preprocess", "vision", "prefix", "head"}
    for stage in ("vision", "prefix", "head"):
        s = report["stages"][stage]
        assert s["floor"] == max(s["of_product"], s["of_copy"]) > 0
    text = tables.read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| PyTorch eager | fp32 |" in text
    assert "PyTorch compiled: torch.compile had not ended after 0.2 s" in text
    assert "Ceilings measured in this run: product" in text
    assert f"({report['read_mb']} MB read in {report['read_s']} s), first action after" in text


# ------------------------------------------------------------------------- fp8
def test_fp8_beside_bfloat16(tmp_path: Path) -> None:
    """Scales from random inputs; the same program as the reference executor's, so nothing from it; two bytes a
    weight become one in vision and prefix alone."""
    torch_or_skip()
    ckpt = read_checkpoint(GOLDEN / "pi0")
    setup = Setup("reference", "fp8", 16, cameras=1, horizon=4, steps=2)
    plan = Plan(runs=2, warmup=0, baselines=[], pairs=2, compile_limit=1.0, samples=3, calibrate=True)
    report = command.bench(weight_reader(ckpt), ckpt, setup, plan, tmp_path)
    found = report["against_bf16"]
    assert found["samples"] == 3
    assert found["to_reference_fp8"] == 0 < 1e-3 < found["bf16_to_reference_fp8"]
    assert 0.99 < found["cosine"] <= found["cosine_median"] < 1
    assert found["cosine_added"] < found["cosine_median"]
    assert 1e-3 < found["relative_l2_median"] <= found["relative_l2"] < 0.1
    assert found["times_longer"]["low"] <= found["times_longer"]["median"]
    for stage, s in found["bf16"]["stages"].items():
        eight = report["stages"][stage]["moved_mb"]
        assert eight < 0.7 * s["moved_mb"] if stage in ("vision", "prefix") else eight == s["moved_mb"]
    text = markdown(report)
    assert f"Actions of 3 observations against bf16: worst cosine {found['cosine']:.5f}, median" in text
    assert found["kept"] == []
    assert "Products kept in bf16: 0." in text


def test_what_is_kept_out_of_fp8_is_as_in_bfloat16(tmp_path: Path) -> None:
    torch_or_skip()
    ckpt = read_checkpoint(GOLDEN / "smolvla")
    setup = Setup("reference", "fp8", 16, cameras=1, horizon=4, steps=1)
    found = {}
    for keep in ((), ("vision_model",), ("vision_model", "connector")):
        plan = Plan(1, 0, [], 1, 1.0, samples=2, calibrate=True, keep=keep)
        found[keep] = command.bench(weight_reader(ckpt), ckpt, setup, plan, tmp_path)["against_bf16"]
    errors = [report["relative_l2"] for report in found.values()]
    assert errors[0] > errors[1] > errors[2] == 0
    kept = [set(report["kept"]) for report in found.values()]
    assert kept[0] < kept[1] < kept[2]
    assert all("text_model" in name for name in kept[0]), "SmolVLA's language model is quicker in bfloat16"
    assert all("vision_model" in name for name in kept[1] - kept[0])
    with pytest.raises(VlaInferError, match="--keep: no product has 'nothing' in its name"):
        command.bench(
            weight_reader(ckpt), ckpt, setup, dataclasses.replace(plan, keep=("nothing",)), tmp_path
        )
    assert cli.main(["bench", "--policy", str(GOLDEN / "smolvla"), "--keep", "vision_model"]) == 1


def test_fp8_of_a_policy_is_by_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch_or_skip()
    from vla_infer.calibration import Runner
    from vla_infer.observations import random_observations

    policy = Path(shutil.copytree(GOLDEN / "smolvla", tmp_path / "policy"))
    words = ["bench", "--policy", str(policy), "--precision", "fp8", "--device", "reference", "--steps", "1"]
    words += ["--runs", "1", "--warmup", "0", "--pairs", "1", "--samples", "1", "--prompt", "16"]
    assert cli.main(words) == 1
    assert (
        "fp8.json: missing; precision 'fp8' needs scales: run: vla-infer calibrate" in capsys.readouterr().err
    )
    ckpt = read_checkpoint(policy)
    observations = random_observations(ckpt, build_processors(ckpt), 1)
    Runner(ckpt, observations, device="reference").calibrate().write(policy / "fp8.json")
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "Scales: fp8.json." in out
    assert "To the reference executor" not in out
    assert cli.main([*words[:5], "--device", "cpu"]) == 1
    assert "device 'cpu' does not have it" in capsys.readouterr().err
    assert cli.main([*words[:5], "--baseline", "torch"]) == 1
    assert "--baseline: expected device cpu or cuda and no fp8" in capsys.readouterr().err


# ------------------------------------------------------------------- rendering
class Nothing(Renderer):
    """A peer that computes nothing: for what the walk itself refuses."""

    def input(self, name, t):  # type: ignore[no-untyped-def]
        return object()

    stored = cut = stack = row_of_step = carried = cast = None  # type: ignore[assignment]


def test_a_tape_that_cannot_be_rendered_is_refused() -> None:
    t = Tape()
    x = t.input("x", (1, 8), "act")
    with t.loop(2):
        t.linear(x, Weight("a", 8, 8))
    t.linear(x, Weight("b", 8, 8))
    with pytest.raises(EngineError, match="after the denoising loop"):
        Nothing(t).walk()
    with pytest.raises(EngineError, match="rows 0 to 1 are read before they are written"):
        Nothing(t).read(t.temp("y", (1, 8)))


def test_pictures_of_two_sizes_are_refused() -> None:
    row = [480, 640, 1920, 384, 512, 128, 0, 1]
    assert picture(np.array([row, row], np.int32)) == tuple(row[:7])
    for other in ([*row[:7], 0], [240, *row[1:]]):
        with pytest.raises(EngineError, match="one size"):
            picture(np.array([row, other], np.int32))


def test_no_fewer_than_one_pair() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(VlaInferError, match="--pairs: expected 1 or more, got 0"):
        command.main(parser.parse_args(["--policy", str(GOLDEN / "smolvla"), "--pairs", "0"]))
