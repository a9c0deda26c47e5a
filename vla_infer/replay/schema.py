"""Checks a report against `schema.json`: the part of JSON Schema that it uses, in a few lines."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from vla_infer.contract_parse import one_line
from vla_infer.errors import ReplayError

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


@cache
def schema() -> dict[str, Any]:
    """The schema of a report."""
    loaded: dict[str, Any] = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    return loaded


def check(document: object) -> None:
    """Raise ReplayError, naming the place, where a document is not a report."""
    _check(document, schema(), "report")


def _check(value: object, rule: dict[str, Any], where: str) -> None:
    if "$ref" in rule:
        rule = schema()["$defs"][rule["$ref"].rsplit("/", 1)[-1]]
    if "const" in rule and value != rule["const"]:
        raise ReplayError(f"{where}: expected {rule['const']!r}, got {one_line(value, limit=60)}")
    if "enum" in rule and value not in rule["enum"]:
        raise ReplayError(f"{where}: expected one of {rule['enum']}, got {one_line(value, limit=60)}")
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        raise ReplayError(f"{where}: expected {' or '.join(kinds)}, got {type(value).__name__}")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value < rule.get("minimum", value):
        raise ReplayError(f"{where}: expected at least {rule['minimum']}, got {value}")
    if isinstance(value, dict):
        _check_members(value, rule, where)
    if isinstance(value, list) and "items" in rule:
        for index, item in enumerate(value):
            _check(item, rule["items"], f"{where}[{index}]")


def _check_members(value: dict[str, Any], rule: dict[str, Any], where: str) -> None:
    known = rule.get("properties", {})
    for name in rule.get("required", []):
        if name not in value:
            raise ReplayError(f"{where}: {name} is missing")
    rest = rule.get("additionalProperties", True)
    for name, member in value.items():
        if name in known:
            _check(member, known[name], f"{where}.{name}")
        elif rest is False:
            raise ReplayError(f"{where}: {name} is not known")
        elif isinstance(rest, dict):
            _check(member, rest, f"{where}.{name}")


def _is(value: object, kind: str) -> bool:
    if isinstance(value, bool) and kind in ("number", "integer"):
        return False
    return isinstance(value, _TYPES[kind])
