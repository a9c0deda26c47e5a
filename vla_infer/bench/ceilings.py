"""What this machine reaches with nothing in the way: the fastest large product and a plain copy, both measured here.

The product ceiling is the best of the engine's own product and, where it is installed, PyTorch's (oneDNN), at sizes
that suit both. It is what a program reached, not what the processor's data sheet says.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_infer.engine import Engine
from vla_infer.tape import Tape, Weight

SIZES = ((512, 1024, 1024), (1024, 2048, 1024), (1024, 3072, 768))  # m, n, k
COPIED = 128 << 20  # bytes: more than any second-level cache, a few times most third-level ones
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
    """Ceilings of the CPU with `threads` threads; device: "cpu" or "cpu:<instruction set>"."""
    reached: dict[str, float] = {}
    for m, n, k in SIZES:
        flops = 2.0 * m * n * k
        for name, call in _products(precision, device, threads, (m, n, k)).items():
            reached[f"{name}, {m} × {n} × {k}"] = flops / fastest(call)
    where = max(reached, key=lambda name: reached[name])
    return Ceilings(reached[where], 2.0 * COPIED / fastest(copying(threads)), where)


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
