"""Conditions of ``run --where``: which cases of a sweep are run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cpbench.core.problem import Case
from cpbench.sweep.sweep_file import KEYS, check_key, matches, parse_values, split_list


def select_cases(cases: Iterable[Case], conditions: Sequence[str]) -> list[Case]:
    """The cases that match every ``key=value`` (a spec matches by its text or its name); the key
    may also be ``id``.

    Raises:
        ValueError: for a condition that is not of that form, for an unknown key, or when no case
            matches.
    """
    selected = list(cases)
    for condition in conditions:
        key, equals, value = (part.strip() for part in condition.partition("="))
        if not equals:
            raise ValueError(f"{condition!r} is not of the form key=value; keys: {', '.join(KEYS)}")
        if key == "id":
            rule = {key: split_list(value)}
        else:
            check_key(key)
            rule = {key: parse_values(key, split_list(value))}
        values = dict.fromkeys(str(getattr(case, key)) for case in selected)
        selected = [case for case in selected if matches(case, rule)]
        if not selected:
            raise ValueError(f"no case has {condition}; {key} is one of: {', '.join(values)}")
    return selected
