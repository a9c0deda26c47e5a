"""`vla-infer doctor`: what is in the way on this machine, and what to do about it. One line a finding."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vla_infer
from vla_infer.errors import VlaInferError

if TYPE_CHECKING:
    from vla_infer.checkpoint import Checkpoint
    from vla_infer.contract import Contract

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
_SEGMENT = (
    16 << 20
)  # bytes a shared-memory segment should have at least: some images from each of several cameras
_PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
_MESSAGES = (
    "diagnostic_msgs",
    "geometry_msgs",
    "lifecycle_msgs",
    "sensor_msgs",
    "std_msgs",
    "trajectory_msgs",
)


@dataclass(frozen=True)
class Finding:
    """One line: PASS, WARN or FAIL; which check; what was found; what to do (empty for PASS)."""

    level: str
    check: str
    found: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.level}  {self.check:<10}  {self.found}" + (f"; {self.mend}" if self.mend else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", help="a policy directory to check")
    parser.add_argument("--contract", help="a contract to check, alone and against the policy")
    parser.add_argument("--device", default="cpu", help="where the policy is to run: cpu (default) or cuda")
    parser.add_argument(
        "--topics", action="store_true", help="listen to the contract's topics (needs --contract)"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to listen (default: 3)")


def main(args: argparse.Namespace) -> int:
    """Print the findings as they come. Returns 1 when one is a FAIL."""
    worst = 0
    for finding in findings(args):
        print(finding, flush=True)
        worst |= finding.level == FAIL
    return int(worst)


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    """Every finding for the parsed options."""
    engine = _engine_module()
    yield engine_finding(engine)
    yield gpu_finding(wanted=args.device.startswith("cuda"), engine=engine)
    ros = ros_finding()
    yield ros
    yield from dds_findings(dict(os.environ))
    checkpoint: Checkpoint | None = None
    contract: Contract | None = None
    if args.policy:
        checkpoint, finding = checkpoint_finding(args.policy)
        yield finding
    if args.contract:
        contract, finding = contract_finding(args.contract, checkpoint)
        yield finding
    if args.topics:
        if contract is None:
            yield Finding(FAIL, "topics", "no valid contract says which", "give one with --contract")
        elif ros.level == FAIL or ros.found.startswith("not"):
            yield Finding(FAIL, "topics", "cannot listen without ROS", "see the line about ros")
        else:
            from vla_infer.doctor_topics import topic_findings

            yield from topic_findings(contract, seconds=args.seconds)


def _engine_module() -> Any:
    """The compiled module, or the error that its import gave."""
    try:
        return import_module("vla_infer._engine")
    except ImportError as error:
        return error


def engine_finding(engine: Any) -> Finding:
    """The compiled library: there, of this version, and what processor code it uses."""
    if isinstance(engine, ImportError):
        return Finding(
            FAIL, "engine", f"cannot be imported ({engine})", "build it: `pip install .` or `colcon build`"
        )
    if engine.version() != vla_infer.__version__:
        return Finding(
            FAIL,
            "engine",
            f"is of version {engine.version()}, the package of {vla_infer.__version__} ({engine.__file__})",
            "build it again",
        )
    sets = engine.cpu_instruction_sets()
    cuda = "with CUDA" if engine.built_with_cuda() else "without CUDA"
    text = f"{engine.version()} {cuda}, {os.cpu_count()} processors, runs {', '.join(sets)}"
    if len(sets) < 2:
        return Finding(WARN, "engine", text, "only portable code runs here: use a processor with AVX2")
    return Finding(PASS, "engine", text)


def gpu_finding(*, wanted: bool, engine: Any) -> Finding:
    """The GPUs as the driver names them, and whether the engine can use them."""
    bad = FAIL if wanted else WARN
    program = shutil.which("nvidia-smi")
    if program is None:
        mend = "install NVIDIA's driver, or use device:=cpu" if wanted else "policies run on the CPU"
        return Finding(bad, "gpu", "none found (no nvidia-smi)", mend)
    query = [program, "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(bad, "gpu", f"nvidia-smi failed ({error})", "check the driver's installation")
    gpus = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not gpus:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no GPU listed"]
        return Finding(
            bad, "gpu", f"nvidia-smi: {words[0]}", "load the driver, or give the container the GPU"
        )
    if isinstance(engine, ImportError) or not engine.built_with_cuda():
        return Finding(
            bad, "gpu", f"{gpus[0]}; the engine is built without CUDA", "put nvcc on PATH and build again"
        )
    major = gpus[0].split(",")[1].strip().partition(".")[0] if gpus[0].count(",") >= 3 else "0"
    if major.isdigit() and int(major) < 8:
        return Finding(
            bad, "gpu", gpus[0], "too old: the CUDA executor needs compute capability 8.0 (Ampere)"
        )
    return Finding(PASS, "gpu", " | ".join(gpus))


def ros_finding() -> Finding:
    """rclpy, the message packages and the executor."""
    mend = "source /opt/ros/<distribution>/setup.bash or pip install -r requirements/ros.txt"
    try:
        rclpy = import_module("rclpy")
        middleware = rclpy.get_rmw_implementation_identifier()
    except ImportError as error:
        return Finding(WARN, "ros", f"not found ({error}); engine and Python API work without", mend)
    missing = []
    for package in _MESSAGES:
        try:
            import_module(f"{package}.msg")
        except ImportError:
            missing.append(package)
    if missing:
        names = " ".join(f"ros-<distribution>-{name.replace('_', '-')}" for name in missing)
        return Finding(FAIL, "ros", f"lacks {', '.join(missing)}", f"install {names}")
    distribution = os.environ.get("ROS_DISTRO", "of pip")
    try:
        import_module("rclpy.experimental")
    except ImportError:
        return Finding(
            WARN,
            "ros",
            f"{distribution}, {middleware}: no EventsExecutor, so timers are less exact",
            "use ROS 2 Jazzy or later where the control rate matters",
        )
    return Finding(PASS, "ros", f"{distribution}, {middleware}, EventsExecutor")


def dds_findings(environment: dict[str, str], shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Room for images in shared memory: the file system, and the profile that asks for a large segment."""
    try:
        usage = shutil.disk_usage(shm)
        text = f"{shm} has {usage.free >> 20} of {usage.total >> 20} MiB free"
        if usage.free < 256 << 20:
            yield Finding(
                WARN,
                "dds",
                text,
                "a segment of 64 MiB a process may not fit: docker run --shm-size=1g, or remount",
            )
        else:
            yield Finding(PASS, "dds", text)
    except OSError as error:
        yield Finding(
            WARN, "dds", f"{shm}: {error.strerror}", "mount a tmpfs there: images go by UDP without it"
        )
    middleware = environment.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp")
    if "fastrtps" not in middleware:
        yield Finding(
            WARN,
            "dds",
            f"RMW_IMPLEMENTATION is {middleware}: the shipped profile is for Fast DDS",
            "set that middleware's own shared memory and socket buffers for images",
        )
        return
    yield profile_finding(environment)


def profile_finding(environment: dict[str, str]) -> Finding:
    """The Fast DDS profile of this shell."""
    named = next(((name, environment[name]) for name in _PROFILE_VARIABLES if environment.get(name)), None)
    if named is None:
        return Finding(
            WARN,
            "dds",
            "no Fast DDS profile in this shell: most raw images from drivers started here are lost",
            f"export {_PROFILE_VARIABLES[0]}={shipped_profile()}",
        )
    name, path = named
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        return Finding(FAIL, "dds", f"{name}={path}: {error}", f"point it to {shipped_profile()}")
    sizes = [
        int(e.text or 0) for e in root.iter() if e.tag.endswith("segment_size") and (e.text or "").isdigit()
    ]
    if max(sizes, default=0) < _SEGMENT:
        found = f"a segment of {max(sizes) >> 10} KiB" if sizes else "no segment_size"
        return Finding(
            WARN,
            "dds",
            f"{path} has {found}: too small for images",
            f"use {shipped_profile()} or raise it to 64 MiB",
        )
    return Finding(PASS, "dds", f"{path}: segments of {max(sizes) >> 20} MiB")


def shipped_profile() -> str:
    """Where config/fastdds.xml is: below the install prefix, or in the source tree."""
    package = Path(vla_infer.__file__).resolve().parent
    inside = [parent / "share" / "vla_infer" / "config" for parent in package.parents]
    for folder in (package.parent / "config", *inside, Path(sys.prefix) / "share" / "vla_infer" / "config"):
        if (folder / "fastdds.xml").exists():
            return str(folder / "fastdds.xml")
    return "<vla_infer>/config/fastdds.xml"


def checkpoint_finding(policy: str) -> tuple[Checkpoint | None, Finding]:
    """The policy directory, and whether its weights fit in memory."""
    from vla_infer.checkpoint import read_checkpoint

    try:
        checkpoint = read_checkpoint(policy)
    except VlaInferError as error:
        return None, Finding(FAIL, "policy", str(error))
    cameras = ", ".join(checkpoint.cameras)
    text = (
        f"{checkpoint.family}, {len(checkpoint.tensors)} tensors, {checkpoint.weight_bytes / 2**20:.1f} MiB; cameras "
        f"{cameras}; state {checkpoint.state_dim}, actions {checkpoint.horizon}x{checkpoint.action_dim}"
    )
    free = _available_memory()
    if free is not None and checkpoint.weight_bytes * 1.3 > free:
        need = f"{checkpoint.weight_bytes * 1.3 / 2**30:.1f} GiB"
        return checkpoint, Finding(
            WARN, "policy", f"{text}; {free / 2**30:.1f} GiB of memory free", f"loading needs up to {need}"
        )
    return checkpoint, Finding(PASS, "policy", text)


def contract_finding(name: str, checkpoint: Checkpoint | None) -> tuple[Contract | None, Finding]:
    """The contract alone, and against the policy where one is given."""
    from vla_infer.contract import load_contract

    try:
        contract = load_contract(name)
        if checkpoint is not None:
            contract.check_policy(checkpoint)
    except VlaInferError as error:
        return None, Finding(FAIL, "contract", str(error))
    fits = "fits the policy" if checkpoint is not None else "not compared with a policy (--policy)"
    return contract, Finding(
        PASS,
        "contract",
        f"{contract.robot}: {len(contract.cameras)} cameras, state {contract.state_dim}, "
        f"action {contract.action_dim}, {contract.control_rate:g} Hz; {fits}",
    )


def _available_memory() -> int | None:
    """Bytes that programs may still take, as Linux counts them."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
