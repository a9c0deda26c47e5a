"""ONNX Runtime as a peer: float32, and int8 with rows quantised as they come. It has no bfloat16 products on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from vla_infer.bench.onnx_rendering import Dialect, Exported, exported
from vla_infer.bench.peers import Job, Peer, Refused

NAME = "ONNX Runtime"
WHY_NOT = {"bf16": "has no bfloat16 products on a CPU; its float32 is in the float32 table"}


def peers(job: Job, precision: str, name: str) -> Iterator[Peer | Refused]:
    """One, in the engine's precision."""
    if job.device.startswith("cuda"):
        yield Refused(NAME, "compared on --device cpu only")
        return
    if precision in WHY_NOT:
        yield Refused(NAME, WHY_NOT[precision])
        return
    with exported(job, Dialect(contrib=True, int8=precision == "int8")) as model:
        yield Peer(NAME, precision, _ready(model, job, precision))


def _ready(model: Exported, job: Job, precision: str) -> Callable[[int], npt.NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its threads spin between operations, as they do by default, but not on while the engine has its turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session: Any = ort.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])

    def call(i: int) -> npt.NDArray[np.float32]:
        inputs = job.inputs(i)
        actions: npt.NDArray[np.float32] = session.run([model.output], {n: inputs[n] for n in model.inputs})[
            0
        ]
        return actions

    return call
