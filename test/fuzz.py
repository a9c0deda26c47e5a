"""A deterministic fuzzer of everything that reads what others wrote: checkpoints, messages, contracts, URDFs,
calibrations.

    python test/fuzz.py --cases 1000000 --processes 2       all targets in turn
    python test/fuzz.py --target checkpoint --seed 7 --cases 10000
    python test/fuzz.py --target checkpoint --seed 7 --first 4711 --cases 1     one case again
    python test/fuzz_coverage.py checkpoint        guided by coverage, with atheris (`pip install atheris`)

Case i of a seed is always the same. Only the package's own errors may come out, with one line of text, and
no case may allocate more than a few MiB: a checkpoint is refused before anything of its weights' size.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace as Record
from typing import Any

import numpy as np
import yaml

from vla_infer.checkpoint import read_checkpoint
from vla_infer.codecs import CODECS, COMMAND_CODECS, stamp_ns
from vla_infer.codecs_image import MAX_PIXELS
from vla_infer.contract import parse_contract
from vla_infer.contract_parse import read_yaml
from vla_infer.errors import VlaInferError
from vla_infer.fp8 import Errors, Scales, read_scales
from vla_infer.frame import FrameBuffer, Now
from vla_infer.instruction import clean_instruction, neutralize_markers
from vla_infer.processors import build_processors
from vla_infer.urdf import parse_urdf_limits

HERE = Path(__file__).resolve().parent
_AT_ONCE = 1_000  # cases that a process takes at a time
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "../../../etc/passwd", "/etc/passwd", "..", "a/../b", "nul\0", "\ud800", "<eos>", "x" * 100_000,
    [], {}, [[]], [0], [-1, 2], {"a": 1}, [None] * 1000,
)  # fmt: skip


# ----------------------------------------------------------------- mutations
def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flips, cuts, repeats, insertions."""
    kind = rng.randrange(6)
    if kind == 0:  # truncation at every hundredth, and anywhere
        return data[
            : len(data) * rng.randrange(100) // 100 if rng.random() < 0.5 else rng.randrange(len(data) + 1)
        ]
    changed = bytearray(data)
    if kind == 1 and changed:
        for _ in range(1 << rng.randrange(6)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        at = rng.randrange(len(changed) + 1)
        changed[at:at] = rng.randbytes(1 << rng.randrange(10))
    elif kind == 3 and changed:
        start, end = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
        del changed[start:end]
    elif kind == 4:
        changed += changed[: rng.randrange(len(changed) + 1)]
    else:
        return rng.randbytes(rng.randrange(4096))
    return bytes(changed)


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """A document with some of its values, keys and list entries changed, in place where it can be."""
    for _ in range(1 << rng.randrange(3)):
        node, place = _pick(rng, tree)
        if place is None:
            return rng.choice(ODD_VALUES)
        kind = rng.randrange(5)
        if kind == 0:
            del node[place]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(["", "x", "../x", "__class__", str(place) * 2])] = node.pop(place)
        elif kind == 2 and isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), deepcopy(node[place]))
        elif kind == 3 and isinstance(node[place], (int, float)) and not isinstance(node[place], bool):
            node[place] = rng.choice([node[place] + 1, -node[place], node[place] * 1000, node[place] * 0.5])
        else:
            node[place] = deepcopy(rng.choice(ODD_VALUES))
    return tree


def _pick(rng: random.Random, tree: Any) -> tuple[Any, Any]:
    """A container within `tree` and one of its keys or indices; key None where there is none."""
    places = []
    stack = [tree]
    while stack:
        node = stack.pop()
        keys: Any = (
            list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        )
        for key in keys:
            places.append((node, key))
            stack.append(node[key])
    return rng.choice(places) if places else (tree, None)


# ------------------------------------------------------------------- targets
class CheckpointTarget:
    """One file of a policy's directory is changed. Weights are a hole of some size: no case reads them."""

    #: Bytes that reading a directory may take at most; the weights of most cases have 64 MiB.
    most = 6 << 20
    #: A directory like the golden ones but of few tensors, which is read ten times as fast.
    _FEW = 12

    def __init__(self) -> None:
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._folder = tempfile.TemporaryDirectory(dir=base, prefix="vla_infer_fuzz")
        self.root = Path(self._folder.name)
        self._families: list[tuple[Path, dict[Path, tuple[bytes, int | None]]]] = []
        for name in ("smolvla", "pi0", "pi05"):
            data = (HERE / "golden" / name / "model.safetensors").read_bytes()
            header = data[8 : 8 + struct.unpack("<Q", data[:8])[0]]
            self._add(name, header, len(data) - 8 - len(header))
            self._add(f"few_{name}", *self._small(json.loads(header)))

    def _small(self, header: dict[str, Any]) -> tuple[bytes, int]:
        """A header with every so many of the tensors, the first of them so large that all have 64 MiB."""
        names = [name for name in header if name != "__metadata__"]
        kept, begin = {}, 0
        for name in names[:: len(names) // self._FEW + 1]:
            entry = header[name]
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            if not kept:
                entry["shape"] = [(64 << 20) // size, *entry["shape"]]
                size *= entry["shape"][0]
            kept[name] = {**entry, "data_offsets": [begin, begin + size]}
            begin += size
        return json.dumps(kept).encode(), begin

    def _add(self, name: str, header: bytes, size: int) -> None:
        """A directory `name` with the golden files of its family and weights of `size` bytes."""
        target = self.root / name
        source = HERE / "golden" / name.removeprefix("few_")
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("golden.*", "model.*"))
        files: dict[Path, tuple[bytes, int | None]] = {
            file.relative_to(target): (file.read_bytes(), None)
            for file in target.rglob("*.*")
            if file.is_file()
        }
        head = struct.pack("<Q", len(header)) + header
        files[Path("model.safetensors")] = (head, len(head) + size)
        self._write(target / "model.safetensors", head, len(head) + size)
        self._families.append((target, files))

    @staticmethod
    def _write(path: Path, data: bytes, size: int | None) -> None:
        with path.open("wb") as file:
            file.write(data)
            if size is not None:
                file.truncate(max(size, 0))

    def __call__(self, rng: random.Random) -> None:
        # One case in ten is of a whole golden directory.
        target, files = self._families[2 * rng.randrange(3) + (rng.random() < 0.9)]
        name = rng.choice(sorted(files))
        data, size = files[name]
        changed, changed_size = self._change(rng, name, data, size)
        self._write(target / name, changed, changed_size)
        try:
            build_processors(read_checkpoint(target))
        finally:
            self._write(target / name, data, size)

    def _change(
        self, rng: random.Random, name: Path, data: bytes, size: int | None
    ) -> tuple[bytes, int | None]:
        if name.suffix == ".json" and rng.random() < 0.7:
            return json.dumps(mutate_tree(rng, json.loads(data))).encode("utf-8", "surrogatepass"), None
        if name.suffix == ".safetensors" and rng.random() < 0.6:
            length = struct.unpack("<Q", data[:8])[0]
            header = json.dumps(self._header(rng, json.loads(data[8 : 8 + length]))).encode(
                "utf-8", "surrogatepass"
            )
            claimed = rng.choice([len(header)] * 8 + [0, 2**63, 2**64 - 1, len(header) + 1, 100 << 20])
            rest = data[8 + length :]
            total = None if size is None else len(header) - length + size
            return struct.pack("<Q", claimed) + header + rest, total
        if size is not None and rng.random() < 0.5:  # cut at a hundredth of the whole file
            return data, size * rng.randrange(100) // 100
        return mutate_bytes(rng, data), size

    @staticmethod
    def _header(rng: random.Random, header: Any) -> Any:
        """Offsets that overlap, leave holes or lie outside; shapes and types that do not fit; or any change."""
        names = [name for name in header if name != "__metadata__"]
        entry = header[rng.choice(names)]
        kind = rng.randrange(6)
        if kind == 0:
            entry["data_offsets"] = list(header[rng.choice(names)]["data_offsets"])
        elif kind == 1:
            entry["data_offsets"][rng.randrange(2)] += rng.choice([-1, 1, 4, -4, 2**40, -(2**40)])
        elif kind == 2:
            entry["shape"] = [*entry["shape"], rng.choice([0, 1, 2, -1, 2**40])]
        elif kind == 3:
            entry["dtype"] = rng.choice(["F64", "I8", "Q4", "", None, "BF16", "F8_E4M3"])
        elif kind == 4:
            header[rng.choice(["../x", "", "x" * 600, "\0"])] = header.pop(rng.choice(names))
        else:
            return mutate_tree(rng, header)
        return header


class MessageTarget:
    """Messages of every type with fields of the right kind and wrong content, as DDS would deliver them."""

    most = 8 << 20

    def __init__(self) -> None:
        document = yaml.safe_load((HERE.parent / "config" / "so101.yaml").read_text())
        self._contract = parse_contract(document, file="so101.yaml")
        import cv2

        pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        self._streams = [cv2.imencode(kind, pixels)[1].tobytes() for kind in (".jpg", ".png")]

    def __call__(self, rng: random.Random) -> None:
        kind = rng.randrange(5)
        stamp = Record(
            sec=rng.choice([0, 1, -1, 2**31 - 1, rng.randrange(2**31)]), nanosec=rng.randrange(2**32)
        )
        header = Record(stamp=stamp, frame_id="x")
        if kind == 0:
            message = Record(
                header=header, height=self._size(rng), width=self._size(rng), step=self._size(rng) * 3,
                encoding=rng.choice(["rgb8", "bgr8", "mono8", "rgba8", "bgra8", "", "16UC1", "\0", "yuv422"]),
                is_bigendian=rng.randrange(3), data=b"",
            )  # fmt: skip
            right = message.height * message.step
            if right <= 1 << 18 and rng.random() < 0.7:
                message.data = bytes(max(0, right + rng.choice([0, 0, 0, -1, 1])))
            CODECS["sensor_msgs/msg/Image"].decode(message)
        elif kind == 1:
            data = mutate_bytes(rng, rng.choice(self._streams))
            message = Record(header=header, format=rng.choice(["jpeg", "png", "", "rgb8; jpeg"]), data=data)
            pixels = CODECS["sensor_msgs/msg/CompressedImage"].decode(message)
            assert pixels.size <= 3 * MAX_PIXELS
        elif kind == 2:
            names = rng.sample([*self._contract.states[0].joints, "", "x", "a" * 1000], rng.randrange(7))
            numbers = [rng.choice([0.0, 1.0, -1e308, float("nan"), float("inf")]) for _ in range(7)]
            count = rng.choice([len(names)] * 3 + [0, 1, 7])
            message = Record(header=header, name=names, position=numbers[:count], velocity=[], effort=[])
            buffer = FrameBuffer(self._contract)
            now = Now(1.0, 10**18)
            sample = CODECS["sensor_msgs/msg/JointState"].decode(message)
            buffer.add_state(0, sample, stamp_ns(message), now)
            values = buffer.states()[0]
            assert values is not None
            assert np.isfinite(values).all()
        elif kind == 3:
            text = "".join(
                chr(rng.choice([rng.randrange(128), rng.randrange(0x110000)]))
                for _ in range(rng.randrange(60))
            )
            cleaned = neutralize_markers(clean_instruction(text))
            assert not any(ord(char) < 32 for char in cleaned)
        else:
            points = [
                Record(positions=[0.0] * rng.randrange(3), time_from_start=stamp)
                for _ in range(rng.randrange(3))
            ]
            message = Record(joint_names=["a", "b"][: rng.randrange(3)], points=points)
            COMMAND_CODECS["trajectory_msgs/msg/JointTrajectory"].decode(message)

    @staticmethod
    def _size(rng: random.Random) -> int:
        return rng.choice([0, 1, 2, 7, 64, 480, 2**16, 2**31, 2**32 - 1])


class ContractTarget:
    """Contracts changed as documents and as text."""

    most = 24 << 20  # a YAML of pathological nesting costs what PyYAML makes of it, below its limit of 1 MiB

    def __init__(self) -> None:
        files = sorted((HERE.parent / "config").glob("*.yaml"))
        self._texts = [file.read_bytes() for file in files]
        self._trees = [pickle.dumps(yaml.safe_load(text)) for text in self._texts]
        self._folder = tempfile.TemporaryDirectory(prefix="vla_infer_fuzz")

    def __call__(self, rng: random.Random) -> None:
        if rng.random() < 0.8:
            parse_contract(mutate_tree(rng, pickle.loads(rng.choice(self._trees))), file="f.yaml")
            return
        path = Path(self._folder.name) / "f.yaml"
        path.write_bytes(mutate_bytes(rng, rng.choice(self._texts)))
        parse_contract(read_yaml(path), file="f.yaml")


class CalibrationTarget:
    """Calibration files of precision fp8, changed as documents and as text. What is taken can be divided by."""

    most = 24 << 20

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vla_infer_fuzz")
        self._path = Path(self._folder.name) / "fp8.json"
        errors = Errors(0.999, 0.9995, 0.998, 0.04, 0.03, 1.5)
        scales = {f"layers.{i}.weight": 0.1 * i + 0.1 for i in range(4)}
        Scales(scales, ("layers.1.weight",), "a" * 64, "b" * 64, 48, 16, errors, errors).write(self._path)
        self._text = self._path.read_bytes()

    def __call__(self, rng: random.Random) -> None:
        if rng.random() < 0.7:
            text = json.dumps(mutate_tree(rng, json.loads(self._text))).encode()
        else:
            text = mutate_bytes(rng, self._text)
        self._path.write_bytes(text)
        scales = read_scales(self._path)
        assert set(scales.bf16) <= set(scales.activations)
        assert all(np.isfinite(np.float32(1) / np.float32(s)) for s in scales.activations.values())


class UrdfTarget:
    """A URDF changed as text."""

    most = 4 << 20
    TEXT = (
        b'<?xml version="1.0"?><robot name="r"><link name="a"/><joint name="j" type="revolute">'
        b'<limit lower="-1" upper="1" velocity="2" effort="3"/></joint></robot>'
    )

    def __call__(self, rng: random.Random) -> None:
        data = mutate_bytes(rng, self.TEXT)
        if rng.random() < 0.3:
            data = self.TEXT.replace(
                b'"-1"', b'"' + rng.choice([b"nan", b"1e999", b"", b"0x1", b"--1"]) + b'"'
            )
        parse_urdf_limits(data, file="r.urdf")


#: Of all cases, how many tenths go to each target: most of what comes from elsewhere are policies and messages.
SHARES = {"checkpoint": 4, "message": 4, "contract": 1, "urdf": 1}
TARGETS: dict[str, Callable[[], Any]] = {
    "checkpoint": CheckpointTarget,
    "message": MessageTarget,
    "contract": ContractTarget,
    "urdf": UrdfTarget,
    "calibration": CalibrationTarget,
}


def check_text(text: str, again: str) -> None:
    """An error is one line of a length that a person reads."""
    assert text.isprintable(), f"{again}: more than one line: {text[:200]!r}"
    assert len(text) < 2000, f"{again}: {len(text)} characters"


def fuzz(name: str, *, seed: int, first: int, cases: int, memory_every: int = 100) -> Counter[str]:
    """Run cases `first` to `first + cases - 1`; how many were taken and how many refused, by type of error.

    Raises AssertionError, naming the case, for an error that is not the package's own, for text of more than
    one line, and for a case that allocates more than the target may. One case in `memory_every` is measured.
    """
    target = TARGETS[name]()
    found: Counter[str] = Counter()
    for case in range(first, first + cases):
        rng = random.Random(f"{seed} {name} {case}")
        again = f"python test/fuzz.py --target {name} --seed {seed} --first {case} --cases 1"
        measured = case % memory_every == 0
        if measured:
            tracemalloc.start()
        try:
            target(rng)
            found["taken"] += 1
        except VlaInferError as error:
            found[type(error).__name__] += 1
            check_text(str(error), again)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{again}: {type(error).__name__}: {str(error)[:200]}") from error
        finally:
            if measured:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
        if measured:
            assert peak < target.most, f"{again}: {peak} bytes at once, expected less than {target.most}"
    return found


def _part(name: str, seed: int, first: int, cases: int) -> Counter[str]:
    """`fuzz` in a process of its own, without what image libraries write to stderr."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    return fuzz(name, seed=seed, first=first, cases=cases)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--cases", type=int, default=10_000, help="of all targets together (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: 0)")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    total, tenths = 0, sum(SHARES.values())
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        for name in TARGETS if args.target == "all" else [args.target]:
            began = time.monotonic()
            cases = max(1, args.cases * SHARES[name] // tenths) if args.target == "all" else args.cases
            parts = [
                pool.submit(_part, name, args.seed, first, min(_AT_ONCE, args.first + cases - first))
                for first in range(args.first, args.first + cases, _AT_ONCE)
            ]
            found: Counter[str] = Counter()
            try:
                for part in parts:
                    found += part.result()
            except (AssertionError, BrokenProcessPool) as error:  # broken: a process has crashed
                pool.shutdown(cancel_futures=True)
                print(f"FAIL  {name}, cases {args.first} to {args.first + cases - 1}: {error}")
                return 1
            total += cases
            rate = cases / (time.monotonic() - began)
            print(f"{name:<10}  {cases} cases, {rate:.0f} a second: {dict(found.most_common())}", flush=True)
    print(f"{total} cases, no crash and no error but the package's own")
    return 0


if __name__ == "__main__":
    sys.exit(main())
