"""Policies with a known answer for the node's tests, and the node started with one as a program.

The policy parameter names the behaviour: `python standin.py --ros-args -p policy:=slow -p contract:=so101`.
"""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from vla_infer.errors import DeviceLostError

CAMERAS = ("observation.images.top", "observation.images.wrist")


class StandIn:
    """Answers an observation with its own joint angles, row i being i degrees further.

    behaviour: `plain`; `slow` takes 3 s with the GIL released; `nan` spoils one number in the last row;
    `raises` fails every time; `narrow` has actions of the wrong size; `lost` reports a lost device; `hangs`
    returns once `released` is set. It may be changed between two calls.
    """

    def __init__(self, behaviour: str, *, action_dim: int = 6, horizon: int = 30) -> None:
        self.behaviour = behaviour
        self.calls: list[tuple[dict[str, np.ndarray], np.ndarray, str]] = []
        self.closed = False
        self.released = threading.Event()
        self.info = SimpleNamespace(
            family="standin",
            device="cpu",
            cameras=CAMERAS,
            state_dim=6,
            action_dim=action_dim,
            horizon=horizon,
            weight_bytes=0,
        )

    def predict(self, images: dict[str, np.ndarray], state: np.ndarray, task: str) -> np.ndarray:
        self.calls.append((images, state, task))
        if self.behaviour == "slow":
            time.sleep(3.0)
        if self.behaviour == "raises":
            raise RuntimeError("the engine\nis on fire")
        if self.behaviour == "lost":
            raise DeviceLostError("cuda:0: the GPU has fallen off the bus; see dmesg")
        if self.behaviour == "hangs":
            self.released.wait()
        width = self.info.action_dim + (self.behaviour == "narrow")
        actions = np.zeros((self.info.horizon, width), dtype=np.float32)
        actions[:, : len(state)] = state + np.arange(self.info.horizon, dtype=np.float32)[:, None]
        if self.behaviour == "nan":
            actions[-1, -1] = np.nan
        return actions

    def close(self) -> None:
        self.closed = True


def load(path: str, **options: Any) -> StandIn:
    if path == "slow_load":
        time.sleep(30.0)
    return StandIn(path)


if __name__ == "__main__":
    from vla_infer.node import main

    sys.exit(main(policy_loader=load))
