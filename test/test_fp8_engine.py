"""Precision "fp8" in the engine, as far as a machine without a GPU can tell: what is kept as E4M3 and how much memory
that takes. `test_cuda.py` runs it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fp8_support import CHAINS, calibrated, in_vision
from golden import relative
from golden_runs import RUNS, golden_model
from op_cases import make

from vla_infer.arena import plan
from vla_infer.engine import kept_in_fp8
from vla_infer.fp8 import in_fp8, key, products
from vla_infer.models import FAMILIES
from vla_infer.reference import ReferenceExecutor


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.__name__)
def test_what_is_kept(case) -> None:
    """What lies between two products, but not where the first is not in fp8."""
    c = make(case, seed=1)
    in_vision(c.tape)
    scales = calibrated(c.tape, c.weights.__getitem__, c.inputs)
    kept = kept_in_fp8(c.tape, scales)
    last = c.tape.ops[-1]
    read = last.operands["x"].buffer
    assert kept == ({} if case.__name__ == "kept_writer" else {read.id: scales.activations[key(last)]})
    writer = next(op for op in c.tape.ops if read.id in {t.buffer.id for t in op.writes})
    if in_fp8(writer):
        assert kept_in_fp8(c.tape, replace(scales, bf16=(key(writer),))) == {}


def test_rows_that_start_anywhere_stay_in_bfloat16() -> None:
    """SigLIP's patches of 14 x 14 have 588 columns; others with 16 in each row are kept."""
    counts = {}
    for family in FAMILIES:
        m = golden_model(family)
        run = RUNS["plain"]
        tape = m.tape(prompt=m.prompt(run))
        scales = calibrated(tape, m.ckpt.read, m.inputs(tape, run))
        kept = kept_in_fp8(tape, scales)
        buffers = {b.id: b for b in tape.buffers}
        assert kept
        assert all(buffers[id_].cols % 16 == 0 for id_ in kept)
        patches = next(op.operands["out"].buffer for op in tape.ops if op.kind == "image_patches")
        assert (patches.id in kept) == (patches.cols % 16 == 0)
        assert plan(tape, 2, kept).arena_bytes <= plan(tape, 2).arena_bytes
        counts[family] = len(kept)
        assert set(scales.activations) == set(products(tape))
    assert min(counts.values()) >= 11


@pytest.mark.parametrize("family", FAMILIES)
def test_the_format_itself(family: str) -> None:
    """What fp8 costs the golden policies in exact arithmetic; test_cuda.py compares the engine with this."""
    m = golden_model(family)
    run = RUNS["plain"]
    tape = m.tape(prompt=m.prompt(run))
    inputs = m.inputs(tape, run, m.noise(run))
    scales = calibrated(tape, m.ckpt.read, inputs)
    want = ReferenceExecutor(tape, m.ckpt.read, "fp32").run(inputs)["actions"]
    got = ReferenceExecutor(tape, m.ckpt.read, "fp64", scales=scales).run(inputs)["actions"]
    assert 1e-4 < relative(got, want) < 0.1
