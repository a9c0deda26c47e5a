"""The programs that the engine is compared with. Each gives one `Peer` at a time, so that its memory is free before
the next is made; what cannot be had is one line that says why and what to install."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Generator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.bench.setups import ReadWeight
from vla_infer.errors import VlaInferError
from vla_infer.inputs import Arrays
from vla_infer.tape import Tape

# name on the command line -> what the module needs, the module
MODULES = {
    "torch": (("torch",), "torch_peer"),
    "torch-compile": (("torch",), "torch_peer"),
    "onnxruntime": (("onnx", "onnxruntime"), "onnxruntime_peer"),
    "openvino": (("onnx", "openvino"), "openvino_peer"),
}
# Relative L2 error of the actions above which a peer does not compute the same and is not timed.
LIMITS = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.3}


@dataclass(frozen=True)
class Job:
    """What every peer is to run: the tape, its weights, sets of inputs that call i takes in turn; `threads` None on a
    GPU; `scratch` a folder for exported models; compile_limit in seconds."""

    tape: Tape
    read: ReadWeight
    sets: list[Arrays]
    device: str
    threads: int | None
    scratch: Path
    compile_limit: float

    def inputs(self, i: int) -> Arrays:
        return self.sets[i % len(self.sets)]


@dataclass(frozen=True)
class Peer:
    """Something to time: `call(i)` takes input set i from host arrays to actions (horizon, action_dim)."""

    name: str
    precision: str
    call: Callable[[int], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Refused:
    """A peer, or a way to run one, that could not be had, and why."""

    name: str
    why: str


def parse(text: str) -> list[str]:
    """Names separated by commas. Raises VlaInferError for one that is not known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in MODULES:
            raise VlaInferError(f"bench: --baseline: expected {', '.join(MODULES)}, got {name!r}")
    return list(dict.fromkeys(names))


def missing(name: str) -> str | None:
    """What to install for a peer, None if all is there."""
    modules = [m for m in MODULES[name][0] if importlib.util.find_spec(m) is None]
    return f"not installed: pip install {' '.join(modules)} (or vla_infer[peers])" if modules else None


def open_peers(name: str, job: Job, precision: str) -> Generator[Peer | Refused, None, None]:
    """The ways to run peer `name` that are to be compared with the engine in `precision`, one after another."""
    lacking = missing(name)
    if lacking:
        yield Refused(name, lacking)
        return
    module: Any = import_module(f"vla_infer.bench.{MODULES[name][1]}")
    try:
        yield from module.peers(job, precision, name)
    except Exception as error:
        yield Refused(name, one_line(error))


def one_line(error: BaseException) -> str:
    """The first line of an error that says something, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
