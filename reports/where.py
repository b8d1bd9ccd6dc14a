"""Conditions of ``--where``: which cases of run directories a report is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import Spec, format_size
from cpbench.results.store import Run
from cpbench.sweep.conditions import split_condition
from cpbench.sweep.sweep_file import INT_KEYS, SPEC_KEYS, parse_integer

if TYPE_CHECKING:
    import pandas as pd

_MAX_LISTED = 20  # values in a message


def filter_rows(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """The rows that meet every condition ``key=value[,value]``.

    Keys are those of a sweep.  An operator, strategy, layout or mask matches by its text or by its
    name before the colon, a mask also without its seed; a number may be written ``4k``.

    Raises:
        ValueError: for a condition that is not of that form, an unknown key, or no row left.
    """
    for condition in conditions:
        key, items = split_condition(condition)
        values = {_parse_value(key, item) for item in items}
        cells = table[key].fillna("")
        matches = {
            cell: not values.isdisjoint(_matching_values(key, cell)) for cell in cells.unique()
        }
        filtered = table[cells.map(matches)]
        if filtered.empty:
            listed = _list_values(key, table["mask_family"] if key == "mask" else cells)
            raise ValueError(f"no case has {condition}; {key} is one of: {listed}")
        table = filtered
    return table


def _parse_value(key: str, item: str) -> object:
    if key in INT_KEYS:
        return parse_integer(key, item)
    try:
        return str(Spec.parse(item)) if key in SPEC_KEYS else item
    except ValueError:
        return item  # records of a user's own code may hold it


def _matching_values(key: str, cell: Any) -> set[object]:
    """All values of a condition that a cell matches."""
    if key not in SPEC_KEYS:
        return {cell}
    try:
        spec = Spec.parse(cell)
    except ValueError:
        return {cell, str(cell).partition(":")[0]}
    seedless = tuple((name, value) for name, value in spec.params if name != "seed")
    return {cell, spec.name, *([str(Spec(spec.name, seedless))] if key == "mask" else [])}


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
