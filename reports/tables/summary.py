"""Who won where: the short answer of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.results.record import APPROXIMATE

if TYPE_CHECKING:
    import pandas as pd

QUESTION = (
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
class Answer:
    """The contest for one problem on one number of ranks.

    Attributes:
        question: what was to be computed.
        ranking: rows of the tidy table that are ok and timed, fastest first.
        tie: whether some rival cannot be told apart from the winner within the noise.
    """

    question: dict[str, Any]
    ranking: pd.DataFrame
    tie: bool

    @property
    def lead(self) -> float | None:
        """Time of the runner-up over the winner's; None without one."""
        times = self.ranking["time_ms"].tolist()
        return times[1] / times[0] if len(times) > 1 else None


def answers(table: pd.DataFrame) -> list[Answer]:
    """One answer for each problem and number of ranks that has a timed case."""
    ranked = table[competing(table)].sort_values("time_ms", kind="stable")
    return [
        Answer(dict(zip(QUESTION, key, strict=True)), ranking, _tie(ranking))
        for key, ranking in ranked.groupby(list(QUESTION), sort=True)
    ]


def competing(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows are timed, were held against float64, and are attention, not part of it."""
    unchecked = table["flags"].str.contains("unchecked", na=False)
    return (table["status"] == "ok") & table["time_ms"].notna() & ~unchecked & ~approximate(table)


def approximate(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows are of operators that choose what to attend to."""
    return table["flags"].str.contains(APPROXIMATE, na=False)


def method(row: Any) -> str:
    """What competes in a row: the operator, and how it is spread where it is."""
    if row["strategy"] == "single" and row["world_size"] == 1:
        return str(row["operator"])
    place = f" {row['placement']} inside" if row["placement"] else ""
    return f"{row['strategy']}{place}/{row['layout']} {row['operator']}"


def methods(table: pd.DataFrame) -> list[str]:
    """:func:`method` of every row."""
    columns = ["operator", "strategy", "layout", "placement", "world_size"]
    known: dict[tuple[Any, ...], str] = {}
    found = []
    for values in zip(*(table[column] for column in columns), strict=True):
        if values not in known:
            known[values] = method(dict(zip(columns, values, strict=True)))
        found.append(known[values])
    return found


def _tie(ranking: pd.DataFrame) -> bool:
    """Whether some rival's interval of the median reaches into the winner's; an interval that is
    not known reaches everywhere."""
    low, high = ranking["low_ms"].tolist(), ranking["high_ms"].tolist()
    if len(low) < 2:
        return False
    unknown = any(math.isnan(end) for end in (*low, *high))
    return unknown or min(low[1:]) <= high[0]
