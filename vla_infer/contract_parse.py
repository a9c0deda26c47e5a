"""Reading a contract's YAML strictly: typed values, unknown and duplicate keys, one-line errors."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import ContractError

# A ROS 2 name: absolute, relative or private (~/), tokens of letters, digits and underscores.
_TOPIC = re.compile(r"^(/|~/)?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*$")
_MAX_BYTES = 1 << 20


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest of `known`, else the whole list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word.lower(), [name.lower() for name in names], n=1, cutoff=0.5)
    if close:
        return f"did you mean '{next(name for name in names if name.lower() == close[0])}'?"
    return f"known: {', '.join(names) or 'none'}"


def one_line(value: object, *, limit: int = 80) -> str:
    """`value` as it would be written in Python, on one line and cut at `limit` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def readable(text: str, *, limit: int = 600) -> str:
    """`text` on one line, what cannot be printed escaped, and its middle left out beyond `limit` characters."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit // 2]} … {line[-limit // 3 :]}"


class _UniqueLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, which YAML itself would silently overwrite."""


def _construct_mapping(loader: _UniqueLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, (str, int, float, bool)):
            raise yaml.constructor.ConstructorError(
                None, None, "a key is not a plain name", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{key}' is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def read_yaml(path: Path) -> object:
    """The parsed document of `path`. Raises ContractError for a file that is missing or is not YAML."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ContractError(f"{path}: larger than 1 MiB, which no contract is; check the path")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ContractError(f"{path}: cannot be read ({reason}); give the path of a contract") from error
    try:
        # _UniqueLoader is a SafeLoader: plain data only.
        return yaml.load(text, Loader=_UniqueLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "too deeply nested or malformed"
        raise ContractError(f"{path}:{where} is not valid YAML: {' '.join(str(problem).split())}") from error


def config_directories() -> list[Path]:
    """Where shipped contracts lie: beside the package in a checkout, in share/ once installed."""
    here = Path(__file__).resolve()
    candidates = [here.parent.parent / "config"]
    candidates += [parent / "share" / "vla_infer" / "config" for parent in here.parents]
    return [directory for directory in candidates if directory.is_dir()]


def find_contract(name: str) -> Path:
    """The path of a contract given as a path or as the name of a shipped one, such as so101."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.name != name or path.suffix in (".yaml", ".yml"):
        raise ContractError(f"{name}: no such contract file; give a path, or the name of a shipped contract")
    shipped = {
        file.stem: file for directory in config_directories() for file in sorted(directory.glob("*.yaml"))
    }
    if name not in shipped:
        raise ContractError(f"contract '{name}': no file and no shipped contract; {nearest(name, shipped)}")
    return shipped[name]


class Section:
    """One mapping of a contract together with its place in the file.

    Every getter checks the type and the range and raises ContractError on one line; `done()` then
    reports a key that nobody asked for, with the nearest one that was.
    """

    def __init__(self, value: object, *, file: str, where: str) -> None:
        self.file = file
        self.where = where
        if not isinstance(value, dict):
            raise ContractError(
                f"{file}: {where or 'the document'}: expected a mapping, got {one_line(value)}"
            )
        self.values: dict[Any, object] = value
        self._asked: set[str] = set()

    def place(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def error(self, key: str, problem: str) -> ContractError:
        """A ContractError that names the file and the key; `problem` is expected, got and mend."""
        return ContractError(readable(f"{self.file}: {self.place(key)}: {problem}"))

    def has(self, key: str) -> bool:
        self._asked.add(key)
        return self.values.get(key) is not None

    def members(self) -> list[str]:
        """All keys, for a mapping keyed by the user's own names; none is unknown then."""
        for key in self.values:
            if not isinstance(key, str) or not key.strip():
                raise self.error(str(key), f"expected a name, got {one_line(key)}; quote it")
            self._asked.add(key)
        return list(self.values)

    def _get(self, key: str, expected: str) -> object:
        if not self.has(key):
            raise self.error(key, f"is missing; expected {expected}")
        return self.values[key]

    def text(self, key: str, *, default: str | None = None) -> str:
        if default is not None and not self.has(key):
            return default
        value = self._get(key, "a string")
        if not isinstance(value, str):
            raise self.error(key, f"expected a string, got {one_line(value)}; quote it")
        return value

    def choice(self, key: str, choices: Sequence[str], *, default: str | None = None) -> str:
        value = self.text(key, default=default)
        if value not in choices:
            raise self.error(
                key, f"expected one of {', '.join(choices)}, got '{value}'; {nearest(value, choices)}"
            )
        return value

    def topic(self, key: str, *, default: str | None = None) -> str:
        value = self.text(key, default=default)
        if not _TOPIC.match(value) or "__" in value:
            raise self.error(
                key, f"expected a ROS topic name such as /camera/image_raw, got {one_line(value)}"
            )
        return value

    def number(self, key: str, low: float, high: float, *, default: float | None = None) -> float:
        """A finite number in [low, high]."""
        if default is not None and not self.has(key):
            return default
        return self.as_number(key, self._get(key, f"a number in [{low:g}, {high:g}]"), low, high)

    def as_number(self, key: str, value: object, low: float, high: float) -> float:
        span = f"a number in [{low:g}, {high:g}]"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"expected {span}, got {one_line(value)}")
        if not math.isfinite(value) or not low <= value <= high:
            raise self.error(key, f"expected {span}, got {value:g}")
        return float(value)

    def integer(self, key: str, low: int, high: int, *, default: int | None = None) -> int:
        if default is not None and not self.has(key):
            return default
        value = self._get(key, f"an integer in [{low}, {high}]")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"expected an integer in [{low}, {high}], got {one_line(value)}")
        return value

    def interval(self, key: str) -> tuple[float, float]:
        """Two finite numbers, the first below the second."""
        value = self._get(key, "[low, high]")
        if not isinstance(value, list) or len(value) != 2:
            raise self.error(key, f"expected [low, high], got {one_line(value)}")
        low, high = (self.as_number(key, item, -1e9, 1e9) for item in value)
        if low >= high:
            raise self.error(key, f"expected low < high, got [{low:g}, {high:g}]")
        return low, high

    def names(self, key: str, *, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of different, non-empty strings; may be empty only when `default` is."""
        if default is not None and not self.has(key):
            return default
        value = self._get(key, "a list of names")
        if not isinstance(value, list) or (not value and default != ()):
            raise self.error(key, f"expected a list of names, got {one_line(value)}")
        for index, item in enumerate(value):
            if not isinstance(item, str) or not item.strip():
                raise self.error(f"{key}[{index}]", f"expected a name, got {one_line(item)}; quote it")
            if item in value[:index]:
                raise self.error(f"{key}[{index}]", f"'{item}' is listed twice; name each once")
        return tuple(value)

    def section(self, key: str) -> Section:
        return Section(self._get(key, "a mapping"), file=self.file, where=self.place(key))

    def sections(self, key: str) -> list[Section]:
        """One mapping, or a list of them: a list of one or more sections."""
        value = self._get(key, "a mapping or a list of mappings")
        if not isinstance(value, list):
            return [Section(value, file=self.file, where=self.place(key))]
        if not value:
            raise self.error(key, "expected at least one entry, got an empty list")
        return [
            Section(item, file=self.file, where=f"{self.place(key)}[{index}]")
            for index, item in enumerate(value)
        ]

    def done(self) -> None:
        """Raise ContractError for the first key that no getter asked for."""
        for key in self.values:
            if key not in self._asked:
                raise self.error(str(key), f"unknown key; {nearest(str(key), self._asked)}")
