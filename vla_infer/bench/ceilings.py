"""What this machine reaches with nothing in the way: the fastest large product and a plain copy, both measured here.

The product ceiling is the best of the engine's own product and, where it is installed, PyTorch's (oneDNN, cuBLASLt), at
sizes that suit both. It is what a program reached, not what the processor's data sheet says.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_infer.calibration import Magnitudes
from vla_infer.engine import Engine
from vla_infer.tape import Tape, Weight

SIZES = ((512, 1024, 1024), (1024, 2048, 1024), (1024, 3072, 768))  # m, n, k
COPIED = 128 << 20  # bytes: more than any second-level cache, a few times most third-level ones
GPU_SIZES = ((4096, 4096, 4096), (4096, 8192, 4096))
GPU_COPIED = 1 << 30
GPU_PROFILES = 6
SECONDS = 0.4  # of each measurement


@dataclass(frozen=True)
class Ceilings:
    """Operations and bytes a second; where the product was reached; reading and writing both count as bytes."""

    flops: float
    bytes: float
    where: str

    def json(self) -> dict[str, Any]:
        return {
            "product_tflops": round(self.flops / 1e12, 4),
            "copy_gb_s": round(self.bytes / 1e9, 2),
            "product_by": self.where,
        }


def measure_ceilings(precision: str, *, device: str, threads: int) -> Ceilings:
    """Ceilings of the CPU with `threads` threads (device: "cpu" or "cpu:<instruction set>"), or of a GPU."""
    if not device.startswith("cpu"):
        return _of_gpu(precision, device)
    reached: dict[str, float] = {}
    for m, n, k in SIZES:
        flops = 2.0 * m * n * k
        for name, call in _products(precision, device, threads, (m, n, k)).items():
            reached[f"{name}, {m} × {n} × {k}"] = flops / fastest(call)
    where = max(reached, key=lambda name: reached[name])
    return Ceilings(reached[where], 2.0 * COPIED / fastest(copying(threads)), where)


@functools.cache  # a second setup in the same process need not wait for it
def _of_gpu(precision: str, device: str) -> Ceilings:
    """Of the device "cuda"; the engine's product in `precision`, PyTorch's in bfloat16."""
    reached: dict[str, float] = {}
    copied = 0.0
    for m, n, k in GPU_SIZES:
        flops = 2.0 * m * n * k
        engine = _product_engine(precision, device, (m, n, k))
        seconds = min(engine.programs[0].profile()["prefix"] for _ in range(GPU_PROFILES))
        reached[f"engine, {m} × {n} × {k}"] = flops / seconds
        copied = copied or engine.copy_rate(GPU_COPIED)
        del engine
        if precision != "fp8" and importlib.util.find_spec("torch"):
            from vla_infer.bench.torch_peer import product_on_gpu

            if its := product_on_gpu((m, n, k)):
                reached[f"PyTorch, {m} × {n} × {k}"] = flops / its
    where = max(reached, key=lambda name: reached[name])
    return Ceilings(reached[where], copied, where)


def _product_engine(precision: str, device: str, size: tuple[int, int, int]) -> Engine:
    """An engine whose stage "prefix" is one large product of random numbers, and whose result is small."""
    m, n, k = size
    random = np.random.default_rng(0)
    values = {"w": random.standard_normal((n, k), np.float32), "few": np.zeros((8, n), np.float32)}
    tape = Tape()
    tape.stage = "prefix"
    x = tape.input("x", (m, k), "act")
    y = tape.linear(x, Weight("w", n, k))
    tape.stage = "rest"
    tape.output("z", tape.linear(y, Weight("few", 8, n)))
    scales = None
    if precision == "fp8":
        magnitudes = Magnitudes(tape)
        magnitudes.add(tape.ops[0], 5.0)
        scales = magnitudes.scales(samples=1)
    engine = Engine([tape], values.__getitem__, device=device, precision=precision, scales=scales)
    place = engine.programs[0].inputs["x"]
    place[...] = (random.standard_normal((m, k), np.float32).view(np.uint32) >> 16).astype(place.dtype)
    return engine


def _products(
    precision: str, device: str, threads: int, size: tuple[int, int, int]
) -> dict[str, Callable[[], object]]:
    m, n, k = size
    random = np.random.default_rng(0)
    w = random.standard_normal((n, k), np.float32)
    tape = Tape()
    x = tape.input("x", (m, k), "act")
    tape.output("y", tape.linear(x, Weight("w", n, k)))
    program = Engine([tape], lambda _: w, device=device, precision=precision, threads=threads).programs[0]
    values = random.standard_normal((m, k), np.float32)
    place = program.inputs["x"]
    place[...] = values if place.dtype == np.float32 else (values.view(np.uint32) >> 16).astype(place.dtype)
    calls: dict[str, Callable[[], object]] = {"engine": program.run}
    if importlib.util.find_spec("torch"):
        from vla_infer.bench.torch_peer import product

        calls["PyTorch"] = product(values, w, precision, threads=threads)
    return calls


def copying(threads: int) -> Callable[[], None]:
    """Copies `COPIED` bytes, an equal part by each thread."""
    source, target = np.zeros(COPIED, np.uint8), np.zeros(COPIED, np.uint8)
    parts = [slice(i * COPIED // threads, (i + 1) * COPIED // threads) for i in range(threads)]

    def copy() -> None:
        workers = [threading.Thread(target=np.copyto, args=(target[p], source[p])) for p in parts[1:]]
        for worker in workers:
            worker.start()
        np.copyto(target[parts[0]], source[parts[0]])
        for worker in workers:
            worker.join()

    return copy


def fastest(call: Callable[[], object], *, seconds: float = SECONDS) -> float:
    """The shortest time of a call among those that fit into `seconds`, after one that does not count."""
    call()
    best, stop = np.inf, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > stop:
            return float(best)
