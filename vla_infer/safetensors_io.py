"""Safetensors files: a strict reader that owns what it reads, and a streaming writer. Needs numpy alone.

Layout: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes. The header maps
each name to {"dtype", "shape", "data_offsets": [begin, end]} relative to the end of the header, and may
hold "__metadata__", an object of strings.

The reader checks, before anything of the tensors' size is allocated: that the header is within the file and
below `MAX_HEADER_BYTES`; valid UTF-8 JSON without duplicate keys; known dtypes; shape times item size equal
to the offsets; and that the tensors cover the file's data exactly, without holes or overlaps.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.errors import CheckpointError
from vla_infer.json_io import Fields, parse_json_object, show

#: The format allows 100 MB; the policies of this package need about 0.2 MB.
MAX_HEADER_BYTES = 4 << 20
_MAX_NAME = 512
_MAX_DIMS = 8

#: dtype of the file → numpy dtype of the array that `read_tensor` returns. The formats that numpy lacks, and
#: F16, come as their bit patterns.
NUMPY_DTYPE: Mapping[str, str] = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<u2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: where its bytes are, and what the file was when its header was read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    #: Position of the first byte in the file.
    offset: int
    nbytes: int
    #: (size, modification time in ns) of the file; a file that changes under a reader is an error.
    stamp: tuple[int, int]


@dataclass(frozen=True)
class SafetensorsFile:
    """A validated header. `digest` is the SHA-256 of the header's bytes."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int
    digest: str


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Read and validate the header of a safetensors file; no tensor is read.

    Raises:
        CheckpointError: one line that names the file, the tensor and what is wrong with it.
    """
    path = Path(path)
    try:
        with _open_regular(path) as file:
            status = os.fstat(file.fileno())
            header = _read_header(file, path, status.st_size)
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read ({err.strerror or err})") from None
    entries = parse_json_object(header, f"{path}: header")
    metadata = Fields(entries, f"{path}: header").string_map("__metadata__")
    entries.pop("__metadata__", None)
    start = 8 + len(header)
    stamp = (status.st_size, status.st_mtime_ns)
    tensors = {name: _parse_entry(path, name, entry, start, stamp) for name, entry in entries.items()}
    _check_coverage(path, tensors.values(), start, status.st_size)
    return SafetensorsFile(path, tensors, metadata, status.st_size, hashlib.sha256(header).hexdigest())


def _open_regular(path: Path) -> io.FileIO:
    """Open without blocking on a named pipe, and only if it is a regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as err:  # an embedded null character
        raise CheckpointError(f"{show(str(path))}: {err}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: expected a regular file")
    return io.FileIO(descriptor, "rb")


def _read_header(file: io.FileIO, path: Path, size: int) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file; download it again")
    (length,) = struct.unpack("<Q", prefix)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header of {length} bytes, expected 2 to {MAX_HEADER_BYTES}: not a safetensors file"
        )
    if length > size - 8:
        raise CheckpointError(f"{path}: header of {length} bytes ends after the file ({size} bytes)")
    header = bytearray()
    while len(header) < length:
        part = file.read(length - len(header))
        if not part:
            raise CheckpointError(f"{path}: ended inside its header")
        header += part
    if header[:1] != b"{":
        raise CheckpointError(f"{path}: header does not start with '{{': not a safetensors file")
    return bytes(header)


def _parse_entry(path: Path, name: str, entry: Any, start: int, stamp: tuple[int, int]) -> TensorInfo:
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{path}: tensor name {show(name)} is not printable text of 1 to {_MAX_NAME}")
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, got {show(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPE:
        raise CheckpointError(f"{where}: unknown dtype {show(dtype)}, known: {', '.join(NUMPY_DTYPE)}")
    if not _is_count_list(shape) or len(shape) > _MAX_DIMS or 0 in shape:
        raise CheckpointError(f"{where}: shape {show(shape)} is not at most {_MAX_DIMS} sizes of 1 or more")
    if not _is_count_list(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {show(offsets)} is not [begin, end]")
    nbytes = np.dtype(NUMPY_DTYPE[dtype]).itemsize
    for size in shape:  # Python integers: no overflow
        nbytes *= size
    begin, end = offsets
    if end - begin != nbytes:
        raise CheckpointError(
            f"{where}: {dtype} {show(shape)} needs {nbytes} bytes, data_offsets {show(offsets)} "
            f"hold {end - begin}"
        )
    if start + end > stamp[0]:
        raise CheckpointError(
            f"{where}: ends at byte {start + end}, the file has {stamp[0]}; it is cut, download it again"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, nbytes, stamp)


def _is_count_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_coverage(path: Path, tensors: Iterable[TensorInfo], start: int, size: int) -> None:
    position, previous = start, "the header"
    for info in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if info.offset != position:
            problem = "overlaps" if info.offset < position else "leaves a hole after"
            raise CheckpointError(f"{path}: tensor {info.name} {problem} {previous}")
        position, previous = info.offset + info.nbytes, info.name
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor ({previous})")


def read_tensor(info: TensorInfo) -> npt.NDArray[Any]:
    """One tensor as an array of its own, of `NUMPY_DTYPE[info.dtype]`, read with plain file reads.

    Raises:
        CheckpointError: the file was changed or cut since its header was read.
    """
    array = np.empty(info.shape, np.dtype(NUMPY_DTYPE[info.dtype]))
    target = array.reshape(-1).view(np.uint8)
    try:
        with _open_regular(info.file) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != info.stamp:
                raise CheckpointError(f"{info.file}: changed while it was being loaded; load it again")
            file.seek(info.offset)
            done = 0
            while done < info.nbytes:  # one read returns at most 2 GiB
                count = file.readinto(target.data[done:])
                if not count:
                    raise CheckpointError(f"{info.file}: ended inside tensor {info.name}")
                done += count
    except OSError as err:
        raise CheckpointError(f"{info.file}: cannot be read ({err.strerror or err})") from None
    if info.dtype == "BOOL" and array.size and int(target.max()) > 1:
        raise CheckpointError(f"{info.file}: tensor {info.name}: a boolean that is neither 0 nor 1")
    return array


def read_prefixes(path: Path, tensors: Iterable[TensorInfo], count: int) -> Iterator[bytes]:
    """The first `count` bytes of each tensor of one file, or all of a shorter one."""
    try:
        with _open_regular(path) as file:
            for info in tensors:
                file.seek(info.offset)
                yield file.read(min(count, info.nbytes))
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read ({err.strerror or err})") from None


def to_float32(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Values as float32 from what `read_tensor` returned for a tensor of `dtype`."""
    if dtype == "BF16":
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif dtype == "F16":
        array = array.view(np.float16)
    elif dtype.startswith("F8"):
        raise CheckpointError(f"{dtype} cannot be converted to float32 here")
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32)


def to_bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round finite float32 values to bfloat16, to nearest and ties to even; returns the bit patterns."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.asarray(bits >> np.uint32(16), np.uint16)


#: name → (dtype, shape), in the order in which the tensors are written.
Layout = Mapping[str, tuple[str, tuple[int, ...]]]


def write_safetensors(
    path: str | Path,
    layout: Layout,
    arrays: Iterable[npt.NDArray[Any] | Iterator[npt.NDArray[Any]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, one tensor at a time.

    Args:
        path: the file; it appears under its name only when it is complete.
        layout: dtype and shape of every tensor, known before the first is made.
        arrays: one per entry of `layout`, in its order: an array, or an iterator over blocks of its first axis.
            A generator keeps memory at one tensor, blocks at less.
        metadata: strings for "__metadata__".

    Raises:
        ValueError: an array does not fit its entry in `layout`.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in layout.items():
        nbytes = np.dtype(NUMPY_DTYPE[dtype]).itemsize
        for size in shape:
            nbytes *= size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"header of {len(text)} bytes, at most {MAX_HEADER_BYTES}")
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            iterator = iter(arrays)
            for name, (dtype, shape) in layout.items():
                value = next(iterator, None)
                blocks = iter([value]) if isinstance(value, np.ndarray) else value or iter(())
                rows = 0
                for block in blocks:
                    _check_block(name, np.dtype(NUMPY_DTYPE[dtype]), shape, rows, block)
                    file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
                    rows += block.shape[0] if shape else 1
                if rows != (shape[0] if shape else 1):
                    raise ValueError(f"tensor {name}: expected {dtype} {shape}, got {rows} rows of it")
            if next(iterator, None) is not None:
                raise ValueError("more arrays than entries in the layout")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _check_block(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], rows: int, block: npt.NDArray[Any]
) -> None:
    fits = block.dtype == dtype and len(block.shape) == len(shape) and block.shape[1:] == shape[1:]
    if not fits or (shape and rows + block.shape[0] > shape[0]):
        raise ValueError(f"tensor {name}: expected {dtype} {shape}, got {block.dtype} {block.shape}")


def save_tensors(path: str | Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write float32, float64, integer or boolean arrays that are already in memory."""
    names = {np.dtype(n): d for d, n in NUMPY_DTYPE.items() if not d.startswith(("BF", "F16", "F8"))}
    layout = {k: (names[np.dtype(v.dtype)], v.shape) for k, v in tensors.items()}
    write_safetensors(path, layout, tensors.values())
