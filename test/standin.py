"""Policies with a known answer for the node's tests; standin_node.py is the node with one as a program."""

from __future__ import annotations

import threading
import time
from pathlib import Path
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


class Busy(StandIn):
    """As `plain`, but for `seconds` every inference keeps the engine and with it all processors busy."""

    def __init__(self, seconds: float) -> None:
        super().__init__("plain")
        from vla_infer.policy import load_policy

        self._seconds = seconds
        self._engine = load_policy(str(Path(__file__).resolve().parent / "golden" / "smolvla"))

    def predict(self, images: dict[str, np.ndarray], state: np.ndarray, task: str) -> np.ndarray:
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            self._engine.predict(images, state, task)
        return super().predict(images, state, task)

    def close(self) -> None:
        super().close()
        self._engine.close()


def load(path: str, **options: Any) -> StandIn:
    """The policy parameter names the behaviour; `busy 0.3` keeps all processors busy for that many seconds."""
    if path == "slow_load":
        time.sleep(3600.0)
    if path.startswith("busy "):
        return Busy(float(path.split()[1]))
    return StandIn(path)
