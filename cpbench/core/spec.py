"""Specs: names with parameters, one grammar for masks, operators, strategies, layouts and inputs.

``causal_document:corpus=pile,seed=3`` in a string is ``{name = "causal_document", corpus = "pile",
seed = 3}`` as a TOML table.  Values are integers (``64k`` means 65536), floats, true/false, lists
in brackets, or plain strings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Value = bool | int | float | str | tuple[int | float, ...]

_SIZE = re.compile(r"(\d+(?:_\d+)*)\s*([kmKM]?)")
_NEGATIVE = re.compile(r"-\d{1,19}")
_FRACTION = re.compile(r"[+-]?\d*\.\d+(e[+-]?\d+)?")
_NAME = re.compile(r"[^:]+\.py:\w+|[\w.\-]+")
_SUFFIX = {"": 1, "k": 1024, "m": 1024 * 1024}
_MAX_DIGITS = 19  # decimal digits of a 64-bit integer


def parse_size(text: str | int) -> int:
    """A token count such as ``4096``, ``"64k"`` (65536) or ``"1m"`` (1048576).

    Raises:
        ValueError: for any other text.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write 4096, or with k or m (64k, 1m)")
    if len(match[1]) > _MAX_DIGITS:
        raise ValueError(f"{match[1][:_MAX_DIGITS]}... is too large: at most {_MAX_DIGITS} digits")
    return int(match[1].replace("_", "")) * _SUFFIX[match[2].lower()]


def format_size(tokens: int) -> str:
    """``65536`` as ``64k``; sizes that are not multiples of 1024 as they are."""
    for suffix, unit in (("m", 1024 * 1024), ("k", 1024)):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{suffix}"
    return str(tokens)


@dataclass(frozen=True)
class Spec:
    """A name and its parameters, in a canonical order.

    Attributes:
        name: a registered name, or ``path/file.py:attribute``.
        params: ``(key, value)`` pairs sorted by key.
    """

    name: str
    params: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def parse(cls, source: str | Mapping[str, Any] | Spec) -> Spec:
        """A spec from its text or its table.

        Raises:
            ValueError: when the text or table does not follow the grammar.
        """
        if isinstance(source, Spec):
            return source
        if isinstance(source, Mapping):
            table = dict(source)
            name = table.pop("name", None)
            if not isinstance(name, str):
                raise ValueError(f'{dict(source)!r} needs a name: {{name = "…", key = value}}')
            values = {key: _value_from_toml(key, value) for key, value in table.items()}
            return cls.of(name, **values)
        if not isinstance(source, str):
            raise ValueError(f"{source!r} is neither a name nor a table with a name")
        match = _NAME.match(source.strip())
        rest = source.strip()[match.end() :] if match else source
        if match is None or (rest and not rest.startswith(":")):
            raise ValueError(f"{source!r} is not of the form name or name:key=value,key=value")
        params: dict[str, Value] = {}
        for item in _split_items(rest[1:]):
            key, equals, text = item.partition("=")
            if not equals or not key.strip().isidentifier() or not text.strip():
                raise ValueError(f"{item!r} in {source!r} is not of the form key=value")
            if key.strip() == "name":
                raise ValueError(f"no parameter can be called 'name', as in {source!r}")
            if key.strip() in params:
                raise ValueError(f"{key.strip()!r} is given twice in {source!r}")
            params[key.strip()] = parse_value(text.strip())
        if rest == ":":
            raise ValueError(f"{source!r} ends in ':' but gives no key=value")
        return cls.of(match[0], **params)

    @classmethod
    def of(cls, name: str, /, **params: Value) -> Spec:
        """A spec from Python values."""
        return cls(name, tuple(sorted(params.items())))

    @property
    def kwargs(self) -> dict[str, Value]:
        """The parameters as keyword arguments."""
        return dict(self.params)

    def __str__(self) -> str:
        items = ",".join(f"{key}={format_value(value)}" for key, value in self.params)
        return f"{self.name}:{items}" if items else self.name

    def to_json(self) -> dict[str, Any]:
        """``{"name": …, key: value, …}``, which :meth:`parse` reads back."""
        table: dict[str, Any] = {"name": self.name}
        for key, value in self.params:
            table[key] = list(value) if isinstance(value, tuple) else value
        return table


def parse_value(text: str) -> Value:
    """One parameter value from text."""
    if text.startswith("[") and text.endswith("]"):
        items = [item.strip() for item in text[1:-1].split(",")]
        return tuple(_parse_list_item(item) for item in items if item)
    if text in ("true", "false"):
        return text == "true"
    if _SIZE.fullmatch(text):
        return parse_size(text)
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    return _require_finite(text, number)


def _parse_list_item(text: str) -> int | float:
    # A list may hold negative numbers and fractions, which are not sizes.
    if _NEGATIVE.fullmatch(text):
        return int(text)
    if _FRACTION.fullmatch(text):
        return _require_finite(text, float(text))
    return parse_size(text)


def format_value(value: Value) -> str:
    """The text that :func:`parse_value` reads back to ``value``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value)


def _value_from_toml(key: str, value: object) -> Value:
    if isinstance(value, str):
        return parse_value(value)
    if isinstance(value, float):
        return _require_finite(f"{key} = {value}", value)
    if isinstance(value, bool | int):
        return value
    if isinstance(value, list) and all(type(item) in (int, float) for item in value):
        return tuple(
            _require_finite(f"{key} = {value}", item) if type(item) is float else item
            for item in value
        )
    raise ValueError(f"{key} = {value!r} is not a number, a string, a boolean or a list of numbers")


def _require_finite(text: str, number: float) -> float:
    # nan and inf are meaningless as parameters, and JSON has neither.
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _split_items(text: str) -> list[str]:
    """Split at commas that are not inside brackets."""
    return re.split(r",(?![^\[]*\])", text) if text else []


def three_digits(value: float) -> str:
    """Three significant digits, never in scientific notation; "" for nan."""
    if math.isnan(value):
        return ""
    rounded = abs(float(f"{value:.2e}"))
    digits = 2 - math.floor(math.log10(rounded)) if 0 < rounded < math.inf else 0
    text = f"{value:,.{max(digits, 0)}f}"
    return text.lstrip("-") if rounded == 0 else text
