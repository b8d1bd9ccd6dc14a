"""Methods ranked per problem: the fastest, its lead over the runner-up, ties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.reports.tables.contest import Contest, hold_contest
from cpbench.results.record import APPROXIMATE, DISQUALIFYING, UNCHECKED

if TYPE_CHECKING:
    import pandas as pd

# Columns of the tidy table that define a problem: what is computed, on how many ranks, where.
PROBLEM_KEYS = (
    "computes",
    "mask",
    "seq_len",
    "queries",
    "phase",
    "key_lens",
    "page_size",
    "world_size",
    "ranks_per_node",
    "direction",
    "dtype",
    "batch",
    "num_heads_q",
    "num_heads_kv",
    "head_dim",
    "head_dim_v",
    "seed",
    "inputs",
    "rope",
    "content",
    "machine",
)
_METHOD_COLUMNS = ("operator", "strategy", "layout", "placement", "world_size")


@dataclass(frozen=True)
class MethodRanking:
    """Methods for one problem, fastest first.

    Attributes:
        problem: values of ``PROBLEM_KEYS``.
        rows: rows of the tidy table that compete, fastest first.
        contest: of the fastest with each other one.
    """

    problem: dict[str, Any]
    rows: pd.DataFrame
    contest: Contest

    @property
    def lead(self) -> float | None:
        """Time of the runner-up over that of the fastest; None when uncontested."""
        times = self.rows["time_ms"].tolist()
        return times[1] / times[0] if len(times) > 1 else None

    @property
    def verdict(self) -> str:
        """See ``Contest.verdict``."""
        return self.contest.verdict


def rank_methods(table: pd.DataFrame) -> list[MethodRanking]:
    """Rank the methods of each problem that has a competing case."""
    ranked = table[table["competes"]].sort_values("time_ms", kind="stable")
    return [
        MethodRanking(
            dict(zip(PROBLEM_KEYS, key, strict=True)), rows, hold_contest(rows["evidence"].tolist())
        )
        for key, rows in ranked.groupby(list(PROBLEM_KEYS), sort=True)
    ]


def is_approximate(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows are of selectors, operators that compute part of attention."""
    return table["flags"].str.split().map({APPROXIMATE}.issubset).astype(bool)


def has_result(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows have a time that may be compared with that of an exact method: those that compete,
    and selectors that would if they were exact."""
    return table["competes"] | (table["disqualified"] == APPROXIMATE)


def is_checked(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows were checked against float64 in full, whatever came of it."""
    reasons = table["disqualified"].fillna("").str.split()
    return ~reasons.map({UNCHECKED}.issubset).astype(bool)


def method_label(row: Any, ignored: str = "") -> str:
    """:func:`method_name`, with the flags that keep its time from being compared, but for one."""
    flags = [
        flag
        for flag in (row["disqualified"] or "").split()
        if flag in DISQUALIFYING and flag != ignored
    ]
    return method_name(row) + (f" ({', '.join(flags)})" if flags else "")


def method_name(row: Any) -> str:
    """Name of the method of a row: the operator, with strategy and layout on several ranks."""
    if row["strategy"] == "single" and row["world_size"] == 1:
        return str(row["operator"])
    placement = f" {row['placement']} inside" if row["placement"] else ""
    return f"{row['strategy']}{placement}/{row['layout']} {row['operator']}"


def method_names(table: pd.DataFrame) -> list[str]:
    """:func:`method_name` of every row."""
    return _by_row(method_name, table, _METHOD_COLUMNS)


def method_labels(table: pd.DataFrame) -> list[str]:
    """:func:`method_label` of every row."""
    return _by_row(method_label, table, [*_METHOD_COLUMNS, "disqualified"])


def _by_row(text: Callable[[Any], str], table: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """A text for every row, made once for each combination of values of the columns."""
    cache: dict[tuple[Any, ...], str] = {}
    texts = []
    for values in zip(*(table[column] for column in columns), strict=True):
        if values not in cache:
            cache[values] = text(dict(zip(columns, values, strict=True)))
        texts.append(cache[values])
    return texts
