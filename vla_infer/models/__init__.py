"""The model families: one module each, with `sizes`, `record` and `index_inputs`."""

from __future__ import annotations

from types import ModuleType

from vla_infer.models import pi0, pi05, smolvla

FAMILIES: dict[str, ModuleType] = {"smolvla": smolvla, "pi0": pi0, "pi05": pi05}

# Parts of the names of products that precision "fp8" leaves in bfloat16, by family. SmolVLA's language model over a
# prefix of a few hundred rows is one kernel on a GPU in bfloat16, which is quicker than launches in 8 bits.
BF16_IN_FP8: dict[str, tuple[str, ...]] = {"smolvla": (f"{smolvla.VLM}.text_model.",)}
