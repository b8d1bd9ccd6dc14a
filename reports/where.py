"""Conditions of ``--where``: which cases of run directories a report is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import Spec, format_size
from cpbench.results.store import Run
from cpbench.sweep.conditions import meets, split_condition
from cpbench.sweep.decoding import parse_key_lens
from cpbench.sweep.sweep_file import INT_KEYS, SPEC_KEYS, parse_integer, parse_specs

if TYPE_CHECKING:
    import pandas as pd

_MAX_LISTED = 20  # values in a message


def filter_rows(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """The rows that meet every condition ``key=value[,value]``.

    Keys are those of a sweep.  What has parameters, such as an operator, a mask or inputs, matches
    by its name and any of its parameters; a number may be written ``4k``.

    Raises:
        ValueError: for a condition that is not of that form, an unknown key, or no row left.
    """
    for condition in conditions:
        key, items = split_condition(condition)
        wanted = [value for item in items for value in _parse_values(key, item)]
        cells = table[key].fillna("")
        matches = {
            cell: any(meets(_value_of(key, cell), value) for value in wanted)
            for cell in cells.unique()
        }
        filtered = table[cells.map(matches)]
        if filtered.empty:
            listed = _list_values(key, table["mask_family"] if key == "mask" else cells)
            raise ValueError(f"no case has {condition}; {key} is one of: {listed}")
        table = filtered
    return table


def _parse_values(key: str, item: str) -> Sequence[object]:
    """The values of an item of a condition."""
    if key in INT_KEYS:
        return [parse_integer(key, item)]
    if key == "key_lens" and item:
        return ["+".join(map(format_size, lens)) for lens in parse_key_lens(item)]
    try:
        return parse_specs(key, item) if key in SPEC_KEYS else [item]
    except ValueError:
        return [item]  # records of a user's own code may hold it


def _value_of(key: str, cell: Any) -> object:
    """The value of a cell."""
    try:
        return Spec.parse(cell) if key in SPEC_KEYS else cell
    except ValueError:
        return cell


def _list_values(key: str, cells: pd.Series[Any]) -> str:
    values = sorted(cells.unique())
    sized = key in ("seq_len", "queries")
    texts = [format_size(int(v)) if sized else str(v) or '""' for v in values[:_MAX_LISTED]]
    more = [f"and {len(values) - _MAX_LISTED} more"] if len(values) > _MAX_LISTED else []
    return ", ".join([*texts, *more])


def filter_run(run: Run, ids: set[str]) -> Run:
    """A run with the cases of these ids only."""
    return replace(
        run,
        records={key: record for key, record in run.records.items() if key in ids},
        launches={key: launches for key, launches in run.launches.items() if key in ids},
        other_launches={key: other for key, other in run.other_launches.items() if key in ids},
        predictions={key: one for key, one in run.predictions.items() if key in ids},
    )
