"""The same tape through PyTorch, as the comparison that `vla-infer bench --baseline torch` prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from vla_infer.reference import ReferenceExecutor, to_torch

if TYPE_CHECKING:
    from vla_infer.bench import Arrays, Setup
    from vla_infer.tape import Tape

Call = Callable[[int], object]


def baselines(
    tape: Tape,
    read: Callable[[str], npt.NDArray[np.generic]],
    setup: Setup,
    sets: list[Arrays],
    *,
    compiled: bool,
) -> dict[str, Call]:
    """Calls by name, each from host arrays to a host array: eager PyTorch on as many threads as the engine has, on
    a GPU also a CUDA graph of the eager calls, and torch.compile over the same code where it is asked for (it
    unrolls the denoising loop and takes many minutes).

    Pictures are resized once, outside the calls: their sizes come from the observation, which neither a compiled
    nor a captured PyTorch program can follow. That is in PyTorch's favour.
    """
    if setup.threads:
        torch.set_num_threads(setup.threads)
    device = "cuda" if setup.device.startswith("cuda") else "cpu"
    executor = ReferenceExecutor(tape, read, setup.precision, device=device)
    body = _after_pixels(executor, tape, sets[0])
    changing = [name for name in tape.inputs if name not in ("frames", "geometry")]
    places = {name: executor.memory[tape.inputs[name].buffer.id] for name in changing}

    def fill(i: int) -> None:
        for name, place in places.items():
            place.copy_(to_torch(sets[i % len(sets)][name]).reshape(place.shape))

    def call(run: Callable[[], torch.Tensor]) -> Call:
        def timed(i: int) -> object:
            with torch.no_grad():
                fill(i)
                return run().float().cpu().numpy()

        return timed

    calls = {"eager": call(body)}
    if device == "cuda":
        calls["CUDA graph"] = call(_captured(body))
    if compiled:
        calls["compiled"] = call(torch.compile(body))
    return calls


def _after_pixels(executor: ReferenceExecutor, tape: Tape, inputs: Arrays) -> Callable[[], torch.Tensor]:
    """Everything after the pictures have become patches, on inputs that lie in the executor's memory."""
    with torch.no_grad():
        executor.forward({name: to_torch(values) for name, values in inputs.items()})
    actions = tape.inputs["actions"].buffer.id
    noise = executor.memory[actions]
    ops = [op for op in tape.ops if not op.at_load and op.kind != "image_patches"]

    def run() -> torch.Tensor:
        executor.memory[actions] = noise
        for op in ops:
            if not op.loop:
                executor._run(op, 0)
        for step in range(tape.steps):
            for op in ops:
                if op.loop:
                    executor._run(op, step)
        result = executor.memory[actions]
        executor.memory[actions] = noise
        return result

    return run


def _captured(body: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = body()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay
