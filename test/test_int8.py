"""Precision "int8": every operation against float64 on the same quantised operands, the golden policies by their
cosine, what stays in bfloat16, and who refuses it."""

from __future__ import annotations

import numpy as np
import pytest
from golden import relative
from golden_runs import golden_model
from int8_cosine import FAMILIES, worst
from op_cases import CASES, Case, make

from vla_infer import _engine
from vla_infer.engine import Engine, in_int8
from vla_infer.errors import EngineError
from vla_infer.tape import Op, Tape, Tensor, Weight

torch = pytest.importorskip("torch", reason="needs torch for the reference executor")
from torch.nn.functional import linear  # noqa: E402

from vla_infer.reference import _ACT, ReferenceExecutor  # noqa: E402

DEVICES = [f"cpu:{name}" for name in _engine.cpu_instruction_sets()]


def rounded(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """x as 8-bit integers with one scale for each slice along `dim`."""
    scale = x.abs().amax(dim, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, torch.zeros_like(x))


class Quantised(ReferenceExecutor):
    """The reference executor with the operands of what int8 computes in 8 bits rounded as int8 rounds them."""

    def _run(self, op: Op, step: int) -> None:
        self.int8 = in_int8(op)
        super()._run(op, step)

    def _normed(self, op: Op, o: dict, x: torch.Tensor) -> torch.Tensor:
        y = super()._normed(op, o, x)
        return rounded(y) if self.int8 else y

    def _product(self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._product(x, rounded(w) if self.int8 else w, bias)

    def _gated_linear(self, op: Op, o: dict, w: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        x = self._normed(op, o, o["x"])
        return {"out": _ACT[int(op.attrs["act"])](linear(x, rounded(w[0]))) * linear(x, rounded(w[1]))}

    def _attention(self, op: Op, o: dict, w: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.int8:
            return super()._attention(op, o, w)
        d, batch = int(op.attrs["head_dim"]), int(op.attrs["batch"])
        q, k, v = (
            t.reshape(batch, t.shape[0] // batch, -1, d).transpose(1, 2) for t in (o["q"], o["k"], o["v"])
        )
        group = q.shape[1] // k.shape[1]
        q, k, v = (
            rounded(q),
            rounded(k).repeat_interleave(group, 1),
            rounded(v, -2).repeat_interleave(group, 1),
        )
        scores = q @ k.transpose(-1, -2) * d**-0.5
        p = (255 * (scores - scores.amax(-1, keepdim=True)).exp()).round()
        out = p @ v / p.sum(-1, keepdim=True)
        return {"out": out.transpose(1, 2).reshape(o["q"].shape)}


def attention_wide(c: Case) -> Tensor:
    """More keys than a block of any kernel, a head that ends inside a panel, an odd number of keys."""
    return c.tape.attention(
        c.x(61, 2 * 40, name="q"), c.x(301, 40, name="k"), c.x(301, 40, name="v"), head_dim=40
    )


def linear_long(c: Case) -> Tensor:
    """A large k, no multiple of four, with outputs of one sign: sums that would saturate 16 bits."""
    c.weights["w"] = np.abs(c.normal(35, 1030))
    x = c.x(13, 1030)
    c.inputs["x"] = np.abs(c.inputs["x"])
    return c.tape.linear(x, Weight("w", 35, 1030))


def zero_rows(c: Case) -> Tensor:
    """A row of zeros, and an output whose weights are zeros."""
    w = c.weight("w", 34, 32)
    c.weights["w"][5] = 0
    x = c.x(14, 32)
    c.inputs["x"][3] = 0
    return c.tape.linear(x, w)


QUANTISED = [case for case in CASES if any(in_int8(op) for op in make(case, seed=0).tape.ops)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case", [*QUANTISED, attention_wide, linear_long, zero_rows], ids=lambda c: c.__name__
)
def test_matches_the_same_quantised_operands(case, device: str) -> None:
    c = make(case, seed=len(case.__name__))
    want = Quantised(c.tape, c.weights.__getitem__, "fp64").run(c.inputs)["result"]
    got = {}
    for threads in (1, 2):
        engine = Engine([c.tape], c.weights.__getitem__, device=device, precision="int8", threads=threads)
        program = engine.programs[0]
        for values in program.inputs.values():
            values[...] = np.nan if values.dtype == np.float32 else 0
        program.run()
        for name, values in c.inputs.items():
            program.inputs[name][...] = values
        program.run()
        got[threads] = program.result("result")
    # what is left is the rounding of results to bfloat16, and a value now and then that lay between two integers
    assert relative(got[1], want) < 4e-3
    np.testing.assert_array_equal(got[1], got[2])


def test_is_not_bfloat16() -> None:
    """The reference above tells int8 from an engine that would quietly compute in bfloat16."""
    c = make(linear_long, seed=1)
    want = Quantised(c.tape, c.weights.__getitem__, "fp64").run(c.inputs)["result"]
    exact = ReferenceExecutor(c.tape, c.weights.__getitem__, "fp64").run(c.inputs)["result"]
    c2 = make(next(case for case in CASES if case.__name__ == "linear_many_rows"), seed=1)
    near = Quantised(c2.tape, c2.weights.__getitem__, "fp64").run(c2.inputs)["result"]
    far = ReferenceExecutor(c2.tape, c2.weights.__getitem__, "fp64").run(c2.inputs)["result"]
    assert relative(near, far) > 5e-3
    assert relative(want, exact) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_nan_passes_through(device: str) -> None:
    for case in (c for c in CASES if c.__name__ in ("linear_all", "gated", "attention_plain")):
        c = make(case, seed=1)
        program = Engine([c.tape], c.weights.__getitem__, device=device, precision="int8").programs[0]
        for name, values in c.inputs.items():
            program.inputs[name][...] = values
        program.inputs["x" if "x" in c.inputs else "q"][0, 0] = np.nan
        program.run()
        assert np.isnan(program.result("result")[0]).any(), case.__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_actions_of_the_golden_policies(family: str) -> None:
    low = worst(family, 3)
    assert low.actions >= 0.995
    assert low.added >= 0.995


def test_what_stays_in_bfloat16() -> None:
    """The ends of the action expert, what is made of the prefix but for gate and up, and masked attention; all large
    products of the vision encoder and of the loop are int8."""
    m = golden_model("smolvla")
    kept: dict[str, set[str]] = {"vision": set(), "prefix": set(), "head": set()}
    quick: dict[str, set[str]] = {"vision": set(), "prefix": set(), "head": set()}
    for op in m.tape(prompt=16).ops:
        for w in op.weights:
            (quick if in_int8(op) else kept)[op.stage].add(w.name.removesuffix(".weight").split(".")[-1])
    ends = {"action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out"}
    assert kept == {
        "vision": {"state_proj"},
        "prefix": {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"},
        "head": {"k_proj", "v_proj"} | ends,  # the keys and values of the prefix, once a call
    }
    assert quick["vision"] == {
        "patch_embedding",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "fc1",
        "fc2",
        "proj",
    }
    assert quick["prefix"] == {"gate_proj", "up_proj"}
    assert quick["head"] == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    attention = [op for op in m.tape(prompt=16).ops if op.kind == "attention"]
    assert {op.stage for op in attention if in_int8(op)} == {"vision"}


def one() -> Tape:
    t = Tape()
    t.output("y", t.linear(t.input("x", (4, 8), "f32"), Weight("w", 8, 8)))
    return t


def test_other_devices_refuse() -> None:
    with pytest.raises(EngineError, match="precision 'int8': device 'cuda' does not have it"):
        Engine([one()], lambda _: np.eye(8, dtype=np.float32), device="cuda", precision="int8")
    with pytest.raises(
        EngineError, match="reference: precision: expected one of fp32, fp64, bf16, fp8, got 'int8'"
    ):
        ReferenceExecutor(one(), lambda _: np.eye(8, dtype=np.float32), "int8")


def test_memory() -> None:
    """Weights take a byte each, and a scale and a starting sum for each output."""
    c = make(next(case for case in CASES if case.__name__ == "linear_many_rows"), seed=1)
    sizes = {
        p: Engine([c.tape], c.weights.__getitem__, precision=p, threads=1).weight_bytes
        for p in ("bf16", "int8")
    }
    assert sizes["bf16"] - sizes["int8"] == 224 * 64 * (2 - 1) - 224 * 8
