"""PyTorch as a peer: eager, compiled, and on a GPU captured in a CUDA graph."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_inductor_cache

from vla_infer.bench.peers import Job, Peer, Refused, one_line
from vla_infer.bench.torch_rendering import TorchRenderer

# Of the engine's precision, what PyTorch runs: it has no int8 products for a tape without tools beside it.
PRECISION = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16"}

# Files of the compiler's own Python, and of what it waits in for a C++ compiler; seconds until it is looked at again.
_INTERRUPTED = (
    "/torch/_inductor/",
    "/torch/_dynamo/",
    "/torch/fx/",
    "/sympy/",
    "/subprocess.py",
    "/selectors.py",
)
_AGAIN = 0.01

Body = Callable[[dict[str, torch.Tensor]], torch.Tensor]


class TimeLimit(BaseException):
    """Raised in the main thread where a limit is reached; no Exception, so that nothing on the way swallows it."""


def peers(job: Job, precision: str, name: str) -> Iterator[Peer | Refused]:
    """Eager first. Compiled on a CPU, and where `name` is "torch-compile" on a GPU too."""
    if job.threads:
        torch.set_num_threads(job.threads)
    precision = PRECISION[precision]
    device = "cuda" if job.device.startswith("cuda") else "cpu"
    # A captured graph cannot follow sizes that change: they are those of the first set, as of all.
    renderer = TorchRenderer(job.tape, job.read, precision, geometry=job.inputs(0)["geometry"], device=device)
    yield Peer("PyTorch eager", precision, calling(job, renderer.run, device))
    if device == "cuda":
        yield Peer("PyTorch CUDA graph", precision, _captured(job, renderer.run))
    if device == "cpu" or name == "torch-compile":
        yield _compiled(job, renderer, precision, device)


def calling(job: Job, run: Body, device: str) -> Callable[[int], npt.NDArray[np.float32]]:
    """A call from host arrays to a host array."""

    def call(i: int) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            inputs = {n: torch.from_numpy(v).to(device) for n, v in job.inputs(i).items()}
            actions: npt.NDArray[np.float32] = run(inputs).float().cpu().numpy()
            return actions

    return call


def _compiled(job: Job, renderer: TorchRenderer, precision: str, device: str) -> Peer | Refused:
    """`torch.compile` of each of the two graphs, weights frozen and packed (Inductor's `freezing`)."""
    name = "PyTorch compiled"
    # Frozen weights are constants of the program, which Inductor packs for the CPU's products.
    options: dict[str, Any] = {"freezing": device == "cpu"}
    once, step = (torch.compile(graph, options=options) for graph in (renderer.once, renderer.step))
    call = calling(job, lambda inputs: renderer.run(inputs, once, step), device)
    expired: list[int] = []
    try:
        # A folder of its own: what a limit leaves half written there is met by nobody else. One C++ compiler at a
        # time, in this process: with a pool of them, libraries were seen to be loaded before they were whole.
        alone = inductor_config.patch(compile_threads=1)
        with alone, fresh_inductor_cache(dir=str(job.scratch)), time_limit(job.compile_limit) as expired:
            call(0)
    except (TimeLimit, Exception) as error:
        torch._dynamo.reset()
        if not expired:
            return Refused(name, one_line(error))
    if expired:  # whatever the compiler made of it: another error, or nothing where it came in a destructor
        return Refused(
            name, f"torch.compile had not ended after {job.compile_limit:g} s (see --compile-limit)"
        )
    return Peer(name, precision, call)


@contextmanager
def time_limit(seconds: float) -> Iterator[list[int]]:
    """Raises TimeLimit where the block takes longer; what it yields is empty until then. For the main thread, which
    signals interrupt.

    It is raised in the compiler's own Python only, a few hundredths of a second later where something else runs: what
    C++ calls, such as a hook or a destructor, may end the process instead of passing it on.
    """
    expired: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if frame is not None and any(part in frame.f_code.co_filename for part in _INTERRUPTED):
            signal.setitimer(signal.ITIMER_REAL, 0)  # once: what cleans up afterwards is left alone
            expired.append(number)
            raise TimeLimit

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield expired
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _captured(job: Job, run: Body) -> Callable[[int], npt.NDArray[np.float32]]:
    """Replays a CUDA graph of the eager calls."""
    places = {n: torch.from_numpy(v).to("cuda") for n, v in job.inputs(0).items()}
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            run(places)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        out = run(places)

    def call(i: int) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            for name, values in job.inputs(i).items():
                places[name].copy_(torch.from_numpy(values))
            graph.replay()
            actions: npt.NDArray[np.float32] = out.float().cpu().numpy()
            return actions

    return call


def product_on_gpu(size: tuple[int, int, int], *, runs: int = 10) -> float | None:
    """Seconds of the quickest bfloat16 product (m, n, k) of random numbers on the GPU; None where PyTorch has none."""
    if not torch.cuda.is_available():
        return None
    m, n, k = size
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        F.linear(a, b)
        for mark in marks:
            mark.record()
            F.linear(a, b)
        torch.cuda.synchronize()
    best = min(first.elapsed_time(second) for first, second in itertools.pairwise(marks)) * 1e-3
    del a, b
    torch.cuda.empty_cache()
    return float(best)


def product(
    x: npt.NDArray[np.float32], w: npt.NDArray[np.float32], precision: str, *, threads: int
) -> Callable[[], object]:
    """x W^T by PyTorch, for the product ceiling; in int8 products of bytes with sums in int32."""
    torch.set_num_threads(threads)
    a, b = torch.from_numpy(x), torch.from_numpy(w)
    if precision == "int8":
        a8, b8 = ((t * 31).clamp(-127, 127).to(torch.int8) for t in (a, b.t().contiguous()))
        return lambda: torch._int_mm(a8, b8)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = a.to(dtype), b.to(dtype)

    def call() -> object:
        with torch.inference_mode():
            return F.linear(a, b)

    return call
