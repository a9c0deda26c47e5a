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


def baselines(
    tape: Tape, read: Callable[[str], npt.NDArray[np.generic]], setup: Setup, sets: list[Arrays]
) -> dict[str, Callable[[int], object]]:
    """Calls by name: eager PyTorch, from host arrays to a host array, on as many threads as the engine has."""
    if setup.threads:
        torch.set_num_threads(setup.threads)
    executor = ReferenceExecutor(tape, read, setup.precision)

    def eager(i: int) -> object:
        with torch.no_grad():
            inputs = {name: to_torch(values) for name, values in sets[i % len(sets)].items()}
            return executor.forward(inputs)["actions"].float().cpu().numpy()

    return {"eager": eager}
