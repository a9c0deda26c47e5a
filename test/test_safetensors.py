"""Safetensors: what is written is read back, and a file that is not exactly right is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vla_infer.errors import CheckpointError
from vla_infer.safetensors_io import (
    MAX_HEADER_BYTES,
    NUMPY_DTYPE,
    open_safetensors,
    read_tensor,
    save_tensors,
    to_bfloat16_bits,
    to_float32,
    write_safetensors,
)

GOLDEN = Path(__file__).parent / "golden"


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "scalar": np.array(7, np.int64),
        "mask": np.array([True, False]),
        "frames": rng.integers(0, 256, (2, 5, 3), np.uint8),
        "bits": rng.integers(0, 1 << 16, 9, np.uint16),
    }
    save_tensors(tmp_path / "t.safetensors", tensors)
    file = open_safetensors(tmp_path / "t.safetensors")
    assert list(file.tensors) == list(tensors)
    for name, array in tensors.items():
        back = read_tensor(file.tensors[name])
        assert back.dtype == array.dtype
        assert np.array_equal(back, array)
        assert back.flags.owndata
        assert back.flags.writeable
    assert file.tensors["a"].offset % 8 == 0
    assert not list(tmp_path.glob("*.part"))


def test_streaming_writer_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    layout = {f"w{i}": ("F32", (4,)) for i in range(5)}
    alive: list[int] = []

    def arrays() -> Any:
        for i in range(5):
            alive.append(i)
            yield np.full(4, i, np.float32)

    write_safetensors(tmp_path / "s.safetensors", layout, arrays(), {"format": "pt"})
    file = open_safetensors(tmp_path / "s.safetensors")
    assert file.metadata == {"format": "pt"}
    assert read_tensor(file.tensors["w3"]).tolist() == [3.0] * 4
    assert alive == list(range(5))


@pytest.mark.parametrize(
    "arrays",
    [[], [np.zeros(3, np.float32)], [np.zeros(2, np.float64)], [np.zeros(2, np.float32)] * 2],
    ids=["missing", "shape", "dtype", "extra"],
)
def test_writer_refuses_what_does_not_fit_and_leaves_nothing(tmp_path: Path, arrays: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"tensor a: expected|more arrays"):
        write_safetensors(tmp_path / "x.safetensors", {"a": ("F32", (2,))}, arrays)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "header of 0 bytes"),
        (b"[]", b"", "does not start with"),
        (b'{"a"', b"", "not valid JSON"),
        (b'{"a":1}', b"", "expected dtype"),
        (b"\xff\xff", b"", "does not start"),
        (b'{"\xff":1}', b"", "UTF-8"),
        (b"{" + b'"a":[' * 60000, b"", "nested too deeply|not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "integer of 5000 digits"),
        (b'{"a":NaN}', b"", "NaN is not JSON"),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"1",
            "duplicate key 'a'",
        ),
        ({"a": entry("F33")}, b"8" * 8, "unknown dtype 'F33'"),
        ({"a": entry(["F32"])}, b"8" * 8, "unknown dtype"),
        ({"a": entry(shape=[3])}, b"8" * 8, "needs 12 bytes"),
        ({"a": entry(shape=[True, 2])}, b"8" * 8, "shape"),
        ({"a": entry(shape=[-2])}, b"8" * 8, "shape"),
        ({"a": entry(shape=[2.0])}, b"8" * 8, "shape"),
        ({"a": entry(shape=[0, 2**80], end=0)}, b"", "1 or more"),
        ({"a": entry(shape=[2**70, 2**70])}, b"8" * 8, "needs"),
        ({"a": entry(shape=[1] * 9, end=4)}, b"8" * 4, "at most 8 sizes"),
        ({"a": entry(begin=-8, end=0)}, b"8" * 8, "data_offsets"),
        ({"a": entry(begin=8, end=0)}, b"8" * 8, "hold -8"),
        ({"a": entry()}, b"8" * 7, "it is cut"),
        ({"a": entry()}, b"8" * 9, "1 bytes after the last tensor"),
        ({"a": entry(begin=4, end=12)}, b"8" * 12, "leaves a hole after the header"),
        ({"a": entry(), "b": entry(begin=12, end=20)}, b"8" * 20, "b leaves a hole after a"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, b"8" * 12, "b overlaps a"),
        ({"a": entry(), "b": entry()}, b"8" * 8, "overlaps"),
        ({"": entry()}, b"8" * 8, "tensor name"),
        ({"a\nb": entry()}, b"8" * 8, "tensor name"),
        ({"\ud800": entry()}, b"8" * 8, "tensor name"),
        ({"x" * 600: entry()}, b"8" * 8, "tensor name"),
        ({"__metadata__": {"a": 1}, "b": entry()}, b"8" * 8, "object of strings"),
        ({"__metadata__": "a", "b": entry()}, b"8" * 8, "expected an object"),
    ],
)
def test_malformed_files_are_refused_in_one_line(
    tmp_path: Path, header: Any, data: bytes, message: str
) -> None:
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as info:
        open_safetensors(path)
    assert "\n" not in str(info.value)
    assert str(path) in str(info.value)
    assert len(str(info.value)) < len(str(path)) + 400


def test_header_length_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    for length in (MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1):
        path = tmp_path / "huge.safetensors"
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            open_safetensors(path)
    path.write_bytes(struct.pack("<Q", 1000) + b"{}")
    with pytest.raises(CheckpointError, match="ends after the file"):
        open_safetensors(path)


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", tmp_path / "a\0b"):
        with pytest.raises(CheckpointError):
            open_safetensors(path)


def test_a_file_that_changes_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": np.zeros(100, np.float32)})
    info = open_safetensors(path).tensors["a"]
    os.truncate(path, 300)
    with pytest.raises(CheckpointError, match="changed while it was being loaded"):
        read_tensor(info)


def test_booleans_hold_0_or_1(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "b.safetensors", {"m": entry("BOOL", [2], 0, 2)}, b"\x01\x02")
    with pytest.raises(CheckpointError, match="neither 0 nor 1"):
        read_tensor(open_safetensors(path).tensors["m"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_file_is_a_typed_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Cuts, flipped bits and overwritten spans of a good file: a CheckpointError, or tensors within it."""
    good = (GOLDEN / "smolvla" / "policy_preprocessor_step_5_normalizer_processor.safetensors").read_bytes()
    kind = data.draw(st.sampled_from(["cut", "flip", "span", "grow"]))
    place = data.draw(st.integers(0, len(good) - 1))
    if kind == "cut":
        bad = good[:place]
    elif kind == "flip":
        bad = good[:place] + bytes([good[place] ^ 1 << data.draw(st.integers(0, 7))]) + good[place + 1 :]
    elif kind == "span":
        junk = data.draw(st.binary(min_size=1, max_size=16))
        bad = good[:place] + junk + good[place + len(junk) :]
    else:
        bad = good + data.draw(st.binary(min_size=1, max_size=16))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(bad)
    try:
        file = open_safetensors(path)
    except CheckpointError:
        return
    assert kind not in ("cut", "grow")
    for info in file.tensors.values():
        assert read_tensor(info).nbytes == info.nbytes <= len(bad)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_bfloat16_rounds_to_nearest_even(values: list[float]) -> None:
    x = np.array(values, np.float32)
    x = x[np.abs(x) < 3e38]
    back = to_float32(to_bfloat16_bits(x), "BF16")
    spacing = np.maximum(np.abs(x) * 2.0**-7, 2.0**-133).astype(np.float64)
    assert (np.abs(back.astype(np.float64) - x) <= spacing / 2).all()
    assert np.array_equal(to_bfloat16_bits(back), to_bfloat16_bits(x))


def test_bfloat16_ties() -> None:
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)], np.float32)
    assert to_float32(to_bfloat16_bits(x), "BF16").tolist() == [1.0, 1 + 2**-6, -1.0]


def test_half_precision_as_bits(tmp_path: Path) -> None:
    x = np.array([1.5, -0.25], np.float16)
    write_safetensors(tmp_path / "h.safetensors", {"h": ("F16", (2,))}, [x.view(np.uint16)])
    info = open_safetensors(tmp_path / "h.safetensors").tensors["h"]
    assert to_float32(read_tensor(info), info.dtype).tolist() == [1.5, -0.25]


def test_every_dtype_has_the_size_of_its_format() -> None:
    sizes = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "U16": 2, "I16": 2}
    sizes |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
    assert {name: np.dtype(numpy).itemsize for name, numpy in NUMPY_DTYPE.items()} == sizes
