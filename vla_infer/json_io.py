"""Strict JSON reading: bounded files, no duplicate keys, no NaN, typed access with one-line errors."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vla_infer.errors import CheckpointError

#: Configuration and processor files are a few kilobytes; anything near this size is not one.
MAX_JSON_BYTES = 4 << 20
#: PaliGemma's tokenizer.json has 17 MB, Gemma 3's 33 MB.
MAX_TOKENIZER_BYTES = 64 << 20
#: Longest integer literal accepted; Python's own conversion is quadratic in the number of digits.
_MAX_INT_DIGITS = 40


def read_small_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: the file is missing, not a regular file, too large or unreadable.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: expected a regular file")
        if status.st_size > limit:
            raise CheckpointError(f"{path}: {status.st_size} bytes, at most {limit} expected of such a file")
        with path.open("rb") as file:
            data = file.read(status.st_size + 1)
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path}: cannot be read ({_reason(err)})") from None
    if len(data) != status.st_size:
        raise CheckpointError(f"{path}: changed while it was read; load it again")
    return data


def _reason(err: Exception) -> str:
    text = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
    return text or type(err).__name__


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object.

    Duplicate keys, NaN and infinities, integers of more than 40 digits and nesting past Python's
    recursion limit are refused, so that a file means the same to every reader.

    Raises:
        CheckpointError: names `where` and what is wrong.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise ValueError(f"duplicate key {key!r}")
                seen.add(key)
        return result

    def no_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    def bounded_int(text: str) -> int:
        if len(text) > _MAX_INT_DIGITS:
            raise ValueError(f"integer of {len(text)} digits")
        return int(text)

    def finite_float(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError("number out of range")
        return value

    try:
        result = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=no_duplicates,
            parse_constant=no_constant,
            parse_int=bounded_int,
            parse_float=finite_float,
        )
    except UnicodeDecodeError as err:
        raise CheckpointError(f"{where}: not UTF-8 text (byte {err.start})") from None
    except RecursionError:
        raise CheckpointError(f"{where}: JSON is nested too deeply") from None
    except ValueError as err:
        raise CheckpointError(f"{where}: not valid JSON ({_printable(str(err))})") from None
    if not isinstance(result, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(result).__name__}")
    return result


def load_json_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read and parse one JSON file; see `parse_json_object`."""
    return parse_json_object(read_small_file(path, limit), str(path))


def _printable(text: str, limit: int = 120) -> str:
    shown = "".join(char if char.isprintable() else "?" for char in text[:limit])
    return shown if len(text) <= limit else shown[: limit - 1] + "…"


def show(value: object) -> str:
    """A value for an error message: one line, printable, at most 120 characters."""
    return _printable(repr(value))


class Fields:
    """Typed access to one JSON object; every error names the file and the key."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def _fail(self, key: str, expected: str, got: object) -> NoReturn:
        raise CheckpointError(f"{self.where}: {key}: expected {expected}, got {show(got)}")

    def _get(self, key: str, default: Any, expected: str) -> Any:
        if key in self.data:
            return self.data[key]
        if default is None:
            raise CheckpointError(f"{self.where}: {key} is missing, expected {expected}")
        return default

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 1 << 20) -> int:
        expected = f"an integer from {low} to {high}"
        value = self._get(key, default, expected)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._fail(key, expected, value)
        return value

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            self._fail(key, "true or false", value)
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0) -> float:
        """A finite number above `low`."""
        expected = f"a number above {low:g}"
        value = self._get(key, default, expected)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < 1e30:
            self._fail(key, expected, value)
        return float(value)

    def text(self, key: str, default: str | None = None, *, choices: Sequence[str] = ()) -> str:
        expected = f"one of {', '.join(choices)}" if choices else "a string"
        value = self._get(key, default, expected)
        if not isinstance(value, str) or (choices and value not in choices):
            self._fail(key, expected, value)
        return value

    def object(self, key: str, default: Mapping[str, Any] | None = None) -> Fields:
        value = self._get(key, default, "an object")
        if not isinstance(value, Mapping):
            self._fail(key, "an object", value)
        return Fields(value, f"{self.where}: {key}")

    def strings(self, key: str) -> list[str] | None:
        """A list of strings, or None when the key is absent or null."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._fail(key, "a list of strings", value)
        return list(value)

    def string_map(self, key: str) -> dict[str, str]:
        """An object of strings; empty when absent."""
        fields = self.object(key, {})
        for name, value in fields.data.items():
            if not isinstance(value, str):
                self._fail(key, "an object of strings", value)
            fields._check_name(name)
        return dict(fields.data)

    def _check_name(self, name: str) -> None:
        if not name or not name.isprintable():
            self._fail("name", "printable text", name)

    def sizes(self, key: str, *, length: int | None = None, high: int = 1 << 16) -> tuple[int, ...]:
        """A list of positive integers, of `length` items when it is given."""
        expected = f"{length if length is not None else 'a list of'} positive integers up to {high}"
        value = self._get(key, None, expected)
        good = isinstance(value, list) and all(
            isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= high for n in value
        )
        if not good or (length is not None and len(value) != length):
            self._fail(key, expected, value)
        return tuple(value)


def is_plain_name(name: object) -> bool:
    """True for a file name with no directory part: it cannot leave the directory it is joined to."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name.isprintable()
        and name not in (".", "..")
        and not any(char in name for char in "/\\:")
    )
