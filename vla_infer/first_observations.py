"""Precision "fp8" for a policy that has no scales yet: it starts in bfloat16, makes them from its first observations
and goes on in fp8, or stays in bfloat16 and says why."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.calibration_engine import make_runner, require_fp8
from vla_infer.checkpoint import Checkpoint, read_checkpoint
from vla_infer.errors import EngineError, VlaInferError
from vla_infer.fp8 import FILE, MAX_ERROR
from vla_infer.observations import Observation
from vla_infer.policy import Policy, PolicyInfo, Timing, load_policy
from vla_infer.time_slice import ask_for_usual_slice

Loader = Callable[..., Any]
Say = Callable[[str], None]

_NICE = 10  # of the thread that calibrates, and of those that it starts: control and inference go first


class CalibratingPolicy:
    """Takes the calls of a `Policy`, which it is in bfloat16 until the scales are there.

    The first `count` observations are kept; then a thread calibrates on them (`vla_infer.calibration_engine`), writes
    `fp8.json` as `vla-infer calibrate` would, where the error is within `MAX_ERROR`, and loads the policy again. The
    next `predict` after that is in fp8, `info` says so. Meanwhile inferences go on and take longer, for they share the
    device, and the device holds the weights three times.
    """

    def __init__(
        self, ckpt: Checkpoint, count: int, *, load: Callable[[str], Policy], device: str, say: Say
    ) -> None:
        self._ckpt = ckpt
        self._count = count
        self._load = load
        self._device = device
        self._say = say
        self._policy = load("bf16")
        self._lock = threading.Lock()  # of everything below and _policy
        self._kept: list[Observation] = []
        self._next: Policy | None = None
        self._closed = False
        self._collecting = True
        self.thread: threading.Thread | None = None  # that calibrates, once it was started
        say(
            f"fp8: no {FILE} beside {ckpt.path}: bfloat16 until {count} observations are there to calibrate on"
        )

    @property
    def info(self) -> PolicyInfo:
        return self._policy.info

    @property
    def timing(self) -> Timing:
        return self._policy.timing

    def seed(self, value: int) -> None:
        self._policy.seed(value)

    def picture_memory(self, height: int, width: int) -> npt.NDArray[np.uint8]:
        """As `Policy.picture_memory`; it is good for the policy in fp8, too."""
        return self._current().picture_memory(height, width)

    def predict(
        self,
        images: Mapping[str, npt.NDArray[np.uint8]],
        state: npt.NDArray[np.floating],
        task: str,
        **options: Any,
    ) -> npt.NDArray[np.float32]:
        """As `Policy.predict`."""
        policy = self._current()
        actions = policy.predict(images, state, task, **options)
        if self._collecting:
            copies = {name: np.array(image) for name, image in images.items()}
            self._keep(Observation(copies, np.array(state), task))
        return actions

    def close(self) -> None:
        """As `Policy.close`; a calibration that is under way ends before its next observation."""
        with self._lock:
            self._closed = True
            later, self._next = self._next, None
        self._policy.close()
        if later is not None:
            later.close()

    def _current(self) -> Policy:
        with self._lock:
            if self._next is not None:
                old, self._policy, self._next = self._policy, self._next, None
                # not here: giving back gigabytes takes longer than an inference may
                threading.Thread(target=old.close, name="vla_close", daemon=True).start()
            return self._policy

    def _keep(self, observation: Observation) -> None:
        with self._lock:
            if not self._collecting or self._closed:
                return
            self._kept.append(observation)
            if len(self._kept) == self._count:
                self._collecting = False
                self.thread = threading.Thread(
                    target=self._calibrate, args=(self._kept,), name="vla_calibrate", daemon=True
                )
                self._kept = []
                self.thread.start()

    def _calibrate(self, observations: list[Observation]) -> None:
        ask_for_usual_slice()  # not that of a control thread, should one have started this
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            self._say(self._take_up(observations))
        except Exception as error:  # a thread's end is nobody's to see
            text = " ".join(str(error).split())
            kind = "" if isinstance(error, VlaInferError) else f"{type(error).__name__}: "
            self._say(f"fp8: not taken up, bfloat16 goes on: {kind}{text}")

    def _take_up(self, observations: list[Observation]) -> str:
        """Calibrate, write, load; what came of it."""
        runner = make_runner(self._ckpt, observations, device=self._device)
        runner.proceed = self._proceed
        scales = runner.calibrate()
        runner.close()
        errors = scales.seen if scales.unseen is None else scales.unseen
        worst = max(scales.seen.relative_l2, errors.relative_l2)
        if not worst <= MAX_ERROR:
            return (
                f"fp8: not taken up, bfloat16 goes on: relative L2 error {worst:.4f} on the first {self._count} "
                f"observations, expected {MAX_ERROR} or less; run: vla-infer calibrate {self._ckpt.path} --layers "
                "--keep"
            )
        self._proceed()
        scales.write(self._ckpt.path / FILE)
        policy = self._load("fp8")
        with self._lock:
            closed = self._closed
            self._next = None if closed else policy
        if closed:
            policy.close()
        return (
            f"fp8 from here on, by the first {self._count} observations: against bfloat16 worst cosine "
            f"{min(scales.seen.cosine, errors.cosine):.5f}, relative L2 {worst:.4f}; wrote {self._ckpt.path / FILE}"
        )

    def _proceed(self) -> None:
        if self._closed:
            raise EngineError("the policy was closed")


def calibrating(load: Loader, count: int, say: Say = print) -> Loader:
    """A loader with the signature of `load` (see `load_policy`) that calibrates on the first `count` observations where
    the policy has no `fp8.json`; `load` itself for 0. say: told in one line what happens, from any thread.

    It raises as `load` does, and EngineError for another precision than "fp8" or a device that does not compute it.
    """
    if count == 0:
        return load

    def loader(path: str | Path, *, device: str = "cpu", precision: str = "fp32", **options: Any) -> Any:
        if precision != "fp8":
            raise EngineError(f"calibrate_first: expected precision 'fp8', got {precision!r}")
        ckpt = read_checkpoint(path)
        if (ckpt.path / FILE).exists():
            return load(path, device=device, precision="fp8", **options)
        require_fp8(device)
        again = lambda precision: load(path, device=device, precision=precision, **options)  # noqa: E731
        return CalibratingPolicy(ckpt, count, load=again, device=device, say=say)

    return loader


def load_calibrating(path: str | Path, count: int, *, device: str = "cuda", say: Say = print) -> Any:
    """A `Policy` in fp8, or a `CalibratingPolicy` where it has no scales: see `calibrating`."""
    return calibrating(load_policy, count, say)(path, device=device, precision="fp8")
