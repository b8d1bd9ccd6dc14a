"""Tables of TOML as dataclasses, whose fields say what is allowed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeAlias, TypeVar

from cpbench.core.user_files import require_known

T = TypeVar("T")
PositiveInt: TypeAlias = int
PositiveFloat: TypeAlias = float
LEAST = 1e-300  # the least of what is above 0: others can be divided by it


def as_table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a table: [{where}]")
    return value


def build(kind: type[T], table: Any, where: str) -> T:
    """A dataclass from a table with its fields, all of the right types, numbers not negative.

    Raises:
        ValueError: for a missing or unknown field, or a value that its type does not allow.
    """
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
    if wanted not in _ALLOWED:
        assert not isinstance(value, int | float | str), (name, wanted)  # tables, made before
        return value
    words, is_allowed, convert = _ALLOWED[wanted]
    if not is_allowed(value):
        raise ValueError(f"{name} = {value!r} is not {words}")
    return convert(value)


def _is_number(value: Any, least: float = 0, kinds: tuple[type, ...] = (int, float)) -> bool:
    return type(value) in kinds and least <= value <= sys.float_info.max


def _is_list(value: Any, kind: Callable[[Any], bool], length: int = 0) -> bool:
    """Whether it is a list of so many, or of some."""
    return (
        isinstance(value, list)
        and len(value) == (length or len(value) or 1)
        and all(map(kind, value))
    )


# Types of fields: what is allowed, in words and as a test, and what it becomes.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    "str": ("a string", lambda x: isinstance(x, str), str),
    "bool": ("true or false", lambda x: type(x) is bool, bool),
    "int": ("an integer of 0 or more", lambda x: _is_number(x, 0, (int,)), int),
    "float": ("a number of 0 or more", _is_number, float),
    "PositiveInt": ("an integer of 1 or more", lambda x: _is_number(x, 1, (int,)), int),
    "PositiveFloat": ("a number above 0", lambda x: _is_number(x, LEAST), float),
    "tuple[str, ...]": (
        "a list of strings", lambda x: _is_list(x, lambda one: isinstance(one, str)), tuple,
    ),
    "tuple[int, int]": (
        "a list of two positive integers",
        lambda x: _is_list(x, lambda one: _is_number(one, 1, (int,)), 2), tuple,
    ),
    "tuple[float, float]": (
        "a list of two positive numbers",
        lambda x: _is_list(x, lambda one: _is_number(one, LEAST), 2),
        lambda x: tuple(map(float, x)),
    ),
}  # fmt: skip


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float) else asdict(value)
