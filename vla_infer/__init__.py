"""Real-time inference of vision-language-action (VLA) policies on a robot.

    import vla_infer
    policy = vla_infer.load_policy("path/to/checkpoint", device="cpu", precision="fp32")
    actions = policy.predict(images, state, "pick up the red cube")   # (H, A), robot units

Importing the package needs numpy alone; ROS 2 is imported by `vla_infer.node` and torch by
`vla_infer.reference`, when they are used.
"""
from __future__ import annotations

__version__ = "0.1.0"
