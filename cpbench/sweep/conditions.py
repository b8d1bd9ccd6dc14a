"""Conditions of ``--where``: which cases of a sweep are run, or reported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.sweep.sweep_file import KEYS, parse_values, split_list


def split_condition(condition: str) -> tuple[str, list[str]]:
    """Key and values of ``key=value[,value]``; the key is one of a sweep, or ``id``.

    Raises:
        ValueError: for another form, or another key.
    """
    key, equals, value = (part.strip() for part in condition.partition("="))
    known = ", ".join((*KEYS, "id"))
    if not equals:
        raise ValueError(f"{condition!r} is not of the form key=value; keys: {known}")
    if key not in (*KEYS, "id"):
        raise ValueError(f"no key {key!r}; keys: {known}")
    return key, split_list(value)


def meets(value: Any, wanted: Any) -> bool:
    """Whether a value of a case is the one of a condition; a spec, if it has that name and at least
    those parameters."""
    if not isinstance(value, Spec) or not isinstance(wanted, Spec):
        return bool(value == wanted)
    return value.name == wanted.name and set(wanted.params) <= set(value.params)


def select_cases(cases: Iterable[Case], conditions: Sequence[str]) -> list[Case]:
    """The cases that :func:`meets` every ``key=value[,value]``; the key may also be ``id``.

    Raises:
        ValueError: for a condition that is not of that form, for an unknown key, or when no case
            matches.
    """
    selected = list(cases)
    for condition in conditions:
        key, items = split_condition(condition)
        wanted = items if key == "id" else parse_values(key, items)
        values = dict.fromkeys(str(getattr(case, key)) for case in selected)
        selected = [
            case for case in selected if any(meets(getattr(case, key), one) for one in wanted)
        ]
        if not selected:
            raise ValueError(f"no case has {condition}; {key} is one of: {', '.join(values)}")
    return selected
