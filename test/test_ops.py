"""Every operation on every device and instruction set, against the reference executor in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from golden import relative as error
from op_cases import CASES, Case, make

from vla_infer import _engine
from vla_infer.engine import Engine

torch = pytest.importorskip("torch", reason="needs torch for the reference executor")
from vla_infer.reference import ReferenceExecutor  # noqa: E402

DEVICES = [f"cpu:{name}" for name in _engine.cpu_instruction_sets()]
if _engine.built_with_cuda() and torch.cuda.is_available():
    DEVICES.append("cuda")


def reference(c: Case, precision: str) -> npt.NDArray[np.floating]:
    return ReferenceExecutor(c.tape, c.weights.__getitem__, precision).run(c.inputs)["result"]


def poison(program_inputs: dict[str, npt.NDArray[np.generic]]) -> None:
    """Inputs that leave NaN in every place of the arena that depends on them."""
    for values in program_inputs.values():
        if values.dtype == np.float32:
            values[...] = np.nan


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_matches_reference(case, precision: str, device: str) -> None:
    if device == "cuda" and precision == "fp32":
        pytest.skip("the CUDA executor has no float32")
    c = make(case, seed=len(case.__name__))
    program = Engine([c.tape], c.weights.__getitem__, device=device, precision=precision, threads=2).programs[
        0
    ]
    poison(program.inputs)
    program.run()
    for name, values in c.inputs.items():
        program.inputs[name][...] = values
    program.run()
    got, want = program.result("result"), reference(c, "fp64")
    if precision == "fp32":
        assert error(got, want) <= 2e-6
    else:
        # as good as PyTorch in bfloat16 on the same tape, with room for one rounding more on tiny cases
        assert error(got, want) <= 1.5 * error(reference(c, "bf16"), want) + 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_nan_passes_through(device: str) -> None:
    """A NaN in an input is in the result, not hidden by a clamp or a mask."""
    for case in (c for c in CASES if c.__name__ in ("linear_all", "gated", "attention_plain", "euler_loop")):
        c = make(case, seed=1)
        program = Engine([c.tape], c.weights.__getitem__, device=device, precision="bf16").programs[0]
        for name, values in c.inputs.items():
            program.inputs[name][...] = values
        first = next(name for name in ("x", "q", "actions") if name in c.inputs)
        program.inputs[first][0, 0] = np.nan
        program.run()
        assert np.isnan(program.result("result")[0]).any(), case.__name__
