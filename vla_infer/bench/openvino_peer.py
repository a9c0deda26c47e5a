"""OpenVINO as a peer: float32, bfloat16 by its inference precision hint, int8 as compressed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from vla_infer.bench.onnx_rendering import Dialect, Exported, exported
from vla_infer.bench.peers import Job, Peer, Refused

NAME = "OpenVINO"
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}


def peers(job: Job, precision: str, name: str) -> Iterator[Peer | Refused]:
    """One, in the engine's precision."""
    if job.device.startswith("cuda"):
        yield Refused(NAME, "compared on --device cpu only")
        return
    with exported(job, Dialect(contrib=False, int8=precision == "int8")) as model:
        yield Peer(NAME, precision, _ready(model, job, precision))


def _ready(model: Exported, job: Job, precision: str) -> Callable[[int], npt.NDArray[np.float32]]:
    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": job.threads or 0,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[precision],
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(model.path)), "CPU", options)
    request = compiled.create_infer_request()

    def call(i: int) -> npt.NDArray[np.float32]:
        inputs = job.inputs(i)
        out = request.infer({n: inputs[n] for n in model.inputs}, share_inputs=True)
        return np.array(out[0], np.float32)

    return call
