"""Methods ranked per problem: the fastest, its lead over the runner-up, ties."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.results.record import APPROXIMATE

if TYPE_CHECKING:
    import pandas as pd

# Columns of the tidy table that define a problem: what is computed, on how many ranks, where.
PROBLEM_KEYS = (
    "mask",
    "seq_len",
    "queries",
    "world_size",
    "ranks_per_node",
    "direction",
    "dtype",
    "batch",
    "num_heads_q",
    "num_heads_kv",
    "head_dim",
    "seed",
    "inputs",
    "content",
    "machine",
)


@dataclass(frozen=True)
class MethodRanking:
    """Methods for one problem, fastest first.

    Attributes:
        problem: values of ``PROBLEM_KEYS``.
        rows: comparable rows of the tidy table, fastest first.
        tie: whether another method is as fast as the fastest within noise.
    """

    problem: dict[str, Any]
    rows: pd.DataFrame
    tie: bool

    @property
    def lead(self) -> float | None:
        """Time of the runner-up over that of the fastest; None when uncontested."""
        times = self.rows["time_ms"].tolist()
        return times[1] / times[0] if len(times) > 1 else None

    @property
    def verdict(self) -> str:
        """``"won"``, ``"tie"`` or ``"uncontested"``."""
        return "uncontested" if self.lead is None else "tie" if self.tie else "won"


def rank_methods(table: pd.DataFrame) -> list[MethodRanking]:
    """Rank the methods of each problem that has a comparable case."""
    ranked = table[comparable(table)].sort_values("time_ms", kind="stable")
    return [
        MethodRanking(dict(zip(PROBLEM_KEYS, key, strict=True)), rows, _is_tie(rows))
        for key, rows in ranked.groupby(list(PROBLEM_KEYS), sort=True)
    ]


def comparable(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows can be ranked: ok, timed, checked against float64, and exact attention."""
    unchecked = table["flags"].str.contains("unchecked", na=False)
    timed = (table["status"] == "ok") & table["time_ms"].notna()
    return timed & ~unchecked & ~is_approximate(table)


def is_approximate(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows are of selectors, operators that compute part of attention."""
    return table["flags"].str.contains(APPROXIMATE, na=False)


def method_name(row: Any) -> str:
    """Name of the method of a row: the operator, with strategy and layout on several ranks."""
    if row["strategy"] == "single" and row["world_size"] == 1:
        return str(row["operator"])
    placement = f" {row['placement']} inside" if row["placement"] else ""
    return f"{row['strategy']}{placement}/{row['layout']} {row['operator']}"


def method_names(table: pd.DataFrame) -> list[str]:
    """:func:`method_name` of every row."""
    columns = ["operator", "strategy", "layout", "placement", "world_size"]
    cache: dict[tuple[Any, ...], str] = {}
    names = []
    for values in zip(*(table[column] for column in columns), strict=True):
        if values not in cache:
            cache[values] = method_name(dict(zip(columns, values, strict=True)))
        names.append(cache[values])
    return names


def _is_tie(rows: pd.DataFrame) -> bool:
    """Whether the interval of the median of any slower method overlaps that of the fastest; an
    unknown interval overlaps with all."""
    low, high = rows["low_ms"].tolist(), rows["high_ms"].tolist()
    if len(low) < 2:
        return False
    unknown = any(math.isnan(end) for end in (*low, *high))
    return unknown or min(low[1:]) <= high[0]
