"""Tables of TOML as dataclasses, whose fields say what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar

from cpbench.core.user_files import require_known

T = TypeVar("T")


def as_table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a table: [{where}]")
    return value


def build(kind: type[T], table: Any, where: str) -> T:
    """A dataclass from a table with its fields, all of the right types, numbers not negative."""
    prefix = f"{where}." if where else ""
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in as_table(table, where).items():
        require_known(key, known, prefix)
        values[key] = _checked(f"{prefix}{key}", str(known[key].type), value)
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{prefix}{name} is missing")
    return kind(**values)


def _checked(name: str, wanted: str, value: Any) -> Any:
    if wanted == "str" and isinstance(value, str):
        return value
    if wanted == "bool" and type(value) is bool:
        return value
    if wanted == "int" and type(value) is int and value >= 0:
        return value
    if wanted == "float" and type(value) in (int, float) and 0 <= value < math.inf:
        return float(value)
    if wanted == "tuple[str, ...]" and _is_list(value, (str,)) and value:
        return tuple(value)
    if (
        wanted == "tuple[int, int]"
        and _is_list(value, (int,))
        and len(value) == 2
        and min(value) > 0
    ):
        return tuple(value)
    if (
        wanted == "tuple[float, float]"
        and _is_list(value, (int, float))
        and len(value) == 2
        and all(0 < item < math.inf for item in value)
    ):
        return tuple(map(float, value))
    if wanted not in _WORDS:  # tables, which were made before
        return value
    raise ValueError(f"{name} = {value!r} is not {_WORDS[wanted]}")


_WORDS = {
    "str": "a string", "bool": "true or false", "int": "an integer of 0 or more",
    "float": "a number of 0 or more",
    "tuple[str, ...]": "a list of strings", "tuple[int, int]": "a list of two positive integers",
    "tuple[float, float]": "a list of two positive numbers",
}  # fmt: skip


def _is_list(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(type(item) in types for item in value)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float) else asdict(value)
