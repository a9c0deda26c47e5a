"""Which GPU a replay's figures are of."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

import pytest

from vla_infer.replay.resources import Sampler, visible_gpu


@pytest.mark.parametrize(
    ("device", "shown", "gpu"),
    [
        ("cuda", None, "0"),
        ("cuda:1", None, "1"),
        ("cuda", "", "0"),
        ("cuda", "2,3", "2"),
        ("cuda:1", "2, 3", "3"),
        ("cuda:1", "GPU-a,GPU-b", "GPU-b"),
        ("cpu:avx2", "3", "3"),
        ("reference", None, "0"),
    ],
)
def test_gpu_is_the_one_that_cuda_uses(
    monkeypatch: pytest.MonkeyPatch, device: str, shown: str | None, gpu: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert visible_gpu(device) == gpu


def nvml(powers: dict[int | str, float]) -> SimpleNamespace:
    """A stand-in for pynvml with these GPUs: index or UUID -> W; there is none here to ask."""
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: powers[index],
        nvmlDeviceGetHandleByUUID=lambda uuid: powers[uuid],
        nvmlDeviceGetPowerUsage=lambda power: power * 1e3,
    )


@pytest.mark.parametrize(
    ("device", "shown", "power"),
    [
        ("cuda", "", 100.0),
        ("cuda:1", "", 250.0),
        ("cuda", "1", 250.0),
        ("cuda", "GPU-b", 70.0),
        ("cuda:5", "1", None),
    ],
)
def test_sampler_reads_that_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, shown: str, power: float | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml({0: 100.0, 1: 250.0, "GPU-b": 70.0}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    sampler = Sampler(os.getpid(), device=device, interval=0.005)
    sampler.start()
    time.sleep(0.02)
    sampler.stop()
    figures = sampler.figures(inferences=1, commands=1)
    assert figures["gpu_power_w"] == power
    assert figures["gpu_memory_mb"] is None  # what NVML has not is left out
