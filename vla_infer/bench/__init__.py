"""`vla-infer bench`: how long one inference takes, where the time goes, what the hardware would allow, and what the
same tape takes in PyTorch, ONNX Runtime and OpenVINO.

A call is what a robot waits for: pictures, state and tokens copied into the engine's staging, one engine call, the
actions copied out. Inputs are random and change from call to call.
"""

from __future__ import annotations

from vla_infer.bench.command import add_arguments, main
from vla_infer.bench.host import commit, processor

__all__ = ["add_arguments", "commit", "main", "processor"]
