"""What a run costs: processor time, memory, page faults and, through NVML, the GPU's load and energy."""

from __future__ import annotations

import hashlib
import os
import statistics
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def process_figures(pid: int) -> tuple[float, int, int]:
    """Processor time (s), resident memory (bytes) and minor page faults of a process so far (Linux)."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    fields = stat[stat.rindex(")") + 2 :].split()  # from field 3 on, see proc(5)
    return (int(fields[11]) + int(fields[12])) / _TICKS, int(fields[21]) * _PAGE, int(fields[7])


def waited(pid: int) -> float:
    """Seconds for which threads of a process could have run and had no processor, of those that live."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError, IndexError, ValueError):
            total += int(task.read_text().split()[1])
    return total * 1e-9


def machine() -> tuple[float, float]:
    """Seconds so far for which the processors that this process may use ran programs, and were taken away by a host
    of virtual machines (`steal`): /proc/stat, see proc(5). Interrupts are left out."""
    busy = stolen = 0
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in usable:
            busy += sum(int(field) for field in fields[:3])  # user (guests with it), nice, system
            stolen += int(fields[7]) if len(fields) > 7 else 0
    return busy / _TICKS, stolen / _TICKS


def preempted(pid: int) -> int:
    """How often threads of a process that live had a processor taken from them."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(OSError, IndexError, ValueError):
            total += int(task.read_text().rsplit("nonvoluntary_ctxt_switches:", 1)[1].split()[0])
    return total


def yardstick(times: int = 15) -> list[float]:
    """ms that SHA-256 of 1 MiB takes, so many times: it stays in registers and the nearest cache, so that it tells
    how fast a processor is clocked now and nothing of this package."""
    block, taken = bytes(1 << 20), []
    for _ in range(times):
        began = time.perf_counter()
        hashlib.sha256(block).digest()
        taken.append((time.perf_counter() - began) * 1e3)
    return taken


def visible_gpu(device: str) -> str:
    """NVML's index or UUID of the GPU that CUDA calls `cuda` or `cuda:N`: NVML counts the hidden ones, too.

    CUDA counts by speed where a machine's GPUs differ, NVML never: there CUDA_DEVICE_ORDER has to be PCI_BUS_ID.
    """
    number = device.removeprefix("cuda:") if device.startswith("cuda:") else "0"
    shown = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return shown[int(number)] if shown else number


class _Nvml:
    """One GPU by NVML; absent where the module, the library or the device is."""

    def __init__(self, device: str = "cuda") -> None:
        self.device: Any = None
        with suppress(Exception):
            import pynvml  # type: ignore[import-not-found,unused-ignore]

            pynvml.nvmlInit()
            gpu = visible_gpu(device)
            by_index, by_uuid = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID
            self.device = by_index(int(gpu)) if gpu.isdigit() else by_uuid(gpu)
            self._nvml = pynvml

    def read(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.device is None:
            return found
        with suppress(Exception):
            found["utilisation"] = float(self._nvml.nvmlDeviceGetUtilizationRates(self.device).gpu)
        with suppress(Exception):
            found["memory"] = float(self._nvml.nvmlDeviceGetMemoryInfo(self.device).used)
        with suppress(Exception):
            found["power"] = self._nvml.nvmlDeviceGetPowerUsage(self.device) * 1e-3
        with suppress(Exception):
            found["energy"] = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self.device) * 1e-3
        return found

    @property
    def name(self) -> str | None:
        if self.device is None:
            return None
        with suppress(Exception):
            name = self._nvml.nvmlDeviceGetName(self.device)
            return name.decode() if isinstance(name, bytes) else str(name)
        return None


def gpu_name() -> str | None:
    """The name of the first GPU, None where NVML has none."""
    return _Nvml().name


class Sampler:
    """Samples one process and the GPU of `device` ten times a second between `start` and `stop`.

    device: as load_policy takes it; for `cpu` the figures are of the first GPU.
    """

    def __init__(self, pid: int, *, device: str = "cuda", interval: float = 0.1) -> None:
        self._pid = pid
        self._interval = interval
        self._nvml = _Nvml(device)
        self._waited = 0.0
        self._preempted = 0
        self._own = {pid, os.getpid()}  # over ROS also the process that plays the recording
        self._machine: list[tuple[float, float, float]] = []  # busy, stolen, own: s, before and after
        self._yardstick: list[float] = []
        self._stop = threading.Event()
        self._rows: list[tuple[float, float, int, int, dict[str, float]]] = []
        self._thread = threading.Thread(target=self._run, name="resources", daemon=True)

    def start(self) -> None:
        self._yardstick = yardstick()
        self._waited, self._preempted = waited(self._pid), preempted(self._pid)
        self._look()
        self._sample()
        self._thread.start()

    def _sample(self) -> None:
        with suppress(OSError, ValueError):
            self._rows.append((time.monotonic(), *process_figures(self._pid), self._nvml.read()))

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
            self._sample()
            self._look()
            self._waited = max(0.0, waited(self._pid) - self._waited)
            self._preempted = max(0, preempted(self._pid) - self._preempted)
            self._yardstick += yardstick()

    def _look(self) -> None:
        with suppress(OSError, ValueError):
            own = sum(process_figures(pid)[0] for pid in self._own)
            self._machine.append((*machine(), own))

    def figures(self, *, inferences: int, commands: int) -> dict[str, float | None]:
        """Means and maxima over the run; the growth figures are of its second half, the steady state."""
        rows = self._rows
        if len(rows) < 2:
            return {}
        span = rows[-1][0] - rows[0][0]
        half = rows[len(rows) // 2]
        late = max(1.0, inferences / 2)
        result: dict[str, float | None] = {
            "cpu_percent": round(100.0 * (rows[-1][1] - rows[0][1]) / span, 2) if span > 0 else None,
            "runqueue_wait_percent": round(100.0 * self._waited / span, 2) if span > 0 else None,
            "involuntary_switches": float(self._preempted),
            **self._others(span),
            "yardstick_ms": round(statistics.median(self._yardstick), 5),
            "cpu_s_per_inference": round((rows[-1][1] - rows[0][1]) / max(1, inferences), 6),
            "memory_mb_max": round(max(row[2] for row in rows) / 1e6, 2),
            "memory_growth_mb": round((rows[-1][2] - half[2]) / 1e6, 3),
            "page_faults_per_inference": round((rows[-1][3] - half[3]) / late, 2),
        }
        for name in ("utilisation", "memory", "power"):
            values = [row[4][name] for row in rows if name in row[4]]
            scale = 1e-6 if name == "memory" else 1.0
            unit = {"utilisation": "percent", "memory": "mb", "power": "w"}[name]
            result[f"gpu_{name}_{unit}"] = round(sum(values) / len(values) * scale, 3) if values else None
        energy = [row[4]["energy"] for row in rows if "energy" in row[4]]
        known = len(energy) > 1 and commands
        result["gpu_energy_j_per_command"] = round((energy[-1] - energy[0]) / commands, 5) if known else None
        return result

    def _others(self, span: float) -> dict[str, float | None]:
        """What other processes, and a host of virtual machines, took of all processors; % of the run."""
        if len(self._machine) != 2 or span <= 0:
            return {"others_percent": None, "steal_percent": None}
        busy, stolen, own = (after - before for before, after in zip(*self._machine, strict=True))
        scale = 100.0 / (span * len(os.sched_getaffinity(0)))
        return {
            "others_percent": round(scale * max(0.0, busy - own), 2),
            "steal_percent": round(scale * stolen, 2),
        }
