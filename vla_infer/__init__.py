"""Real-time inference of vision-language-action (VLA) policies on a robot.

    import vla_infer
    policy = vla_infer.load_policy("path/to/checkpoint", device="cpu", precision="fp32")
    actions = policy.predict(images, state, "pick up the red cube")   # (H, A), robot units

ROS 2 is imported by `vla_infer.node` and torch by `vla_infer.reference`, when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_infer.policy import Policy as Policy
    from vla_infer.policy import PolicyInfo as PolicyInfo
    from vla_infer.policy import load_policy as load_policy
    from vla_infer.rtc import Rtc as Rtc

__version__ = "0.1.0"
__all__ = ["Policy", "PolicyInfo", "Rtc", "__version__", "load_policy"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: tools that read a contract or a bag need no engine.
    if name in ("Policy", "PolicyInfo", "load_policy"):
        from vla_infer import policy

        return getattr(policy, name)
    if name == "Rtc":
        from vla_infer.rtc import Rtc

        return Rtc
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
