"""The model families: one module each, with `sizes`, `record` and `index_inputs`."""

from __future__ import annotations

from types import ModuleType

from vla_infer.models import pi0, pi05, smolvla

FAMILIES: dict[str, ModuleType] = {"smolvla": smolvla, "pi0": pi0, "pi05": pi05}
