"""The reference executor in the engine's place, so that a policy can run on it: slow, to compare whole episodes by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vla_infer.engine import Engine
from vla_infer.errors import EngineError
from vla_infer.fp8 import Scales
from vla_infer.inputs import empty_inputs
from vla_infer.tape import Tape

if TYPE_CHECKING:
    from vla_infer.reference import ReferenceExecutor

Array = npt.NDArray[np.generic]


def import_reference(what: str) -> type[ReferenceExecutor]:
    """The reference executor. Raises EngineError, `what` needs it, where PyTorch is missing."""
    try:
        from vla_infer.reference import ReferenceExecutor
    except ModuleNotFoundError as error:
        raise EngineError(f"{what} needs {error.name}; pip install torch") from None
    return ReferenceExecutor


class ReferenceProgram:
    """One tape with inputs to fill, as `engine.Program`."""

    def __init__(self, executor: ReferenceExecutor, tape: Tape) -> None:
        self._executor = executor
        self.inputs = empty_inputs(tape)
        self._results: dict[str, Array] = {}

    def stage(self, name: str, rows: Sequence[Array | None]) -> None:
        """As `engine.Program.stage`, done when it returns."""
        for place, row in zip(self.inputs[name], rows, strict=False):
            if row is not None:
                place[: row.size] = row.reshape(-1)

    def settle(self) -> None:
        """Nothing is under way here."""

    def run(self, times: int = 1) -> None:
        """Inputs to outputs."""
        for _ in range(times):
            self._results = self._executor.run(self.inputs)

    def profile(self) -> dict[str, float]:
        """Nothing is known of stages."""
        return {}

    def result(self, name: str) -> npt.NDArray[np.float32]:
        """A copy of an output as float32."""
        return np.array(self._results[name], np.float32)


class ReferenceEngine:
    """As `engine.Engine`. device: "reference", or "reference:cuda" to run it there; scales: of precision "fp8"."""

    weight_bytes = 0
    arena_bytes = 0

    def __init__(
        self,
        tapes: Sequence[Tape],
        read: Callable[[str], Array],
        *,
        device: str,
        precision: str,
        scales: Scales | None = None,
    ) -> None:
        executor_of = import_reference("device reference:")
        place = device.partition(":")[2] or "cpu"
        self.device_name = f"reference ({place})"
        first: ReferenceExecutor | None = None
        self.programs = []
        for tape in tapes:
            executor = executor_of(tape, read, precision, device=place, scales=scales, like=first)
            first = first or executor
            self.programs.append(ReferenceProgram(executor, tape))

    def host_memory(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """As `engine.Engine.host_memory`, in usual memory."""
        return np.zeros(shape, np.uint8)


def make_engine(
    tapes: Sequence[Tape],
    read: Callable[[str], Array],
    *,
    device: str,
    precision: str,
    threads: int | None = None,
    scales: Scales | None = None,
) -> Engine | ReferenceEngine:
    """The engine of a device, see `Engine` and `ReferenceEngine`; threads: of the CPU's."""
    if device.partition(":")[0] == "reference":
        return ReferenceEngine(tapes, read, device=device, precision=precision, scales=scales)
    return Engine(tapes, read, device=device, precision=precision, threads=threads, scales=scales)
