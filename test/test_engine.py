"""The engine under a policy: memory, repeatability, what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from op_cases import image_patches, make

from vla_infer import _engine
from vla_infer.engine import Engine
from vla_infer.errors import EngineError
from vla_infer.tape import Tape, Weight

HERE = Path(__file__).parent

COUNT = """
import ctypes, sys
import numpy as np
import vla_infer
policy = vla_infer.load_policy(sys.argv[1], precision=sys.argv[2], threads=2)
image = np.full((48, 80, 3), 128, np.uint8)
policy.predict({name: image for name in policy.info.cameras}, np.zeros(policy.info.state_dim), "go")
program = policy._programs[0][1]
count = ctypes.CDLL(None).allocations
count.restype = ctypes.c_long
taken = []
for times in (1, 101):
    before = count()
    program.run(times)
    taken.append(count() - before)
print(*taken, count())
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_no_heap_allocation_in_100_inferences(tmp_path: Path, precision: str) -> None:
    """1 and 101 inferences take the same number of blocks from the heap: those of the Python call."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and glibc for the counter")
    library = tmp_path / "count.so"
    source = str(HERE / "count_allocations.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", str(library)], check=True)
    command = [sys.executable, "-c", COUNT, str(HERE / "golden" / "smolvla"), precision]
    paths = ":".join(p for p in sys.path if p)
    run = subprocess.run(
        command,
        env={"LD_PRELOAD": str(library), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    once, more, total = map(int, run.stdout.split())
    assert total > 1000, "the counter counts nothing"
    assert more == once


def one_product(*, rows: int = 4) -> Tape:
    t = Tape()
    t.output("y", t.linear(t.input("x", (rows, 8), "f32"), Weight("w", 8, 8)))
    return t


def test_threads_end_with_their_engine() -> None:
    """However soon after its work an engine goes: a worker between two pieces of work must not miss it."""
    t = Tape()
    t.output("y", t.linear(t.input("x", (64, 256), "f32"), Weight("w", 256, 256)))
    w = np.eye(256, dtype=np.float32)
    for _ in range(300):
        Engine([t], lambda _: w, threads=3).programs[0].run()


def test_programs_share_weights() -> None:
    reads = []

    def read(name: str) -> np.ndarray:
        reads.append(name)
        return np.eye(8, dtype=np.float32)

    engine = Engine([one_product(rows=r) for r in (1, 4, 9)], read)
    assert reads == ["w"]
    for program in engine.programs:
        program.inputs["x"][...] = 2.0
        program.run()
        np.testing.assert_array_equal(program.result("y"), program.inputs["x"])


def test_result_is_the_callers_own() -> None:
    program = Engine([one_product()], lambda _: np.eye(8, dtype=np.float32)).programs[0]
    program.inputs["x"][...] = 1.0
    program.run()
    first = program.result("y")
    program.inputs["x"][...] = 3.0
    program.run()
    assert (first == 1.0).all()
    assert (program.result("y") == 3.0).all()


def test_stage_fills_rows() -> None:
    """Arrays of any shape and stride from the start of their rows, and nothing past their end."""
    program = Engine([make(image_patches, 0).tape], lambda name: np.empty(0), threads=1).programs[0]
    frames = program.inputs["frames"]
    frames[...] = 7
    want = frames.copy()
    random = np.random.default_rng(0)
    whole = random.integers(0, 256, want.shape[1], np.uint8)
    cut = random.integers(0, 256, (20, 40, 3), np.uint8)[:, 5:31]
    want[0], want[2, : cut.size] = whole, cut.reshape(-1)
    program.stage("frames", [whole, None, cut])
    program.settle()
    np.testing.assert_array_equal(frames, want)


def test_host_memory_outlives_the_engine() -> None:
    engine = Engine([make(image_patches, 0).tape], lambda name: np.empty(0), threads=1)
    memory = engine.host_memory((4, 1000))
    other = engine.host_memory((4, 1000))
    del engine
    memory[...] = 5
    assert (memory == 5).all()
    assert not other.any()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([np.zeros(33 * 160 + 1, np.uint8)], "rows of 5280 bytes staged with 5281"),
        ([None] * 5, "input of 4 rows staged with 5"),
        ([np.zeros(3, np.float32)], "expected uint8"),
    ],
)
def test_stage_refuses(rows: list[np.ndarray | None], message: str) -> None:
    program = Engine([make(image_patches, 0).tape], lambda name: np.empty(0), threads=1).programs[0]
    program.inputs["frames"][...] = 7
    with pytest.raises(EngineError, match=message):
        program.stage("frames", rows)
    assert (program.inputs["frames"] == 7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "expected 'cpu' or 'cuda', got 'tpu'"),
        ({"device": "cpu:mmx"}, "'cpu:mmx': this processor runs .*generic"),
        ({"precision": "fp4"}, "precision: expected one of fp32, bf16, int8, fp8, got 'fp4'"),
        (
            {"precision": "fp8"},
            "precision 'fp8': device 'cpu' does not have it: use 'cuda', or precision 'bf16'",
        ),
        (
            {"precision": "fp8", "device": "cuda"},
            "expected the policy's scales, got none: run vla-infer calibrate",
        ),
    ],
)
def test_refuses(options: dict[str, str], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Engine([one_product()], lambda _: np.eye(8, dtype=np.float32), **options)


def test_weight_of_the_wrong_shape() -> None:
    with pytest.raises(EngineError, match=r"w: expected \(8, 8\), got \(8, 9\)"):
        Engine([one_product()], lambda _: np.zeros((8, 9), np.float32))


def test_the_engines_errors_are_the_packages() -> None:
    """An error inside the library arrives as EngineError, a caller's mistake in a call as Python's own."""
    native = _engine.Engine(device="cpu", bf16=False, threads=1)
    with pytest.raises(EngineError, match="expected at least one matrix"):
        native.pack(0, [], 1)
    with pytest.raises(
        EngineError, match=r"device 'cpu .*' has no fp8, device 'cuda' of compute capability 9.0 has"
    ):
        native.pack_fp8(0, [np.eye(8, dtype=np.float32)])
    native.reserve(256)
    with pytest.raises(EngineError, match="reserved already"):
        native.reserve(256)
    with pytest.raises(TypeError):
        native.reserve("much")  # type: ignore[arg-type]
