"""Operators that choose what to attend to: what they recover, what it costs, where it pays.

They compute a part of attention, so they win no contest; each is held against the fastest exact
method of the same problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import format_size
from cpbench.reports.labels import number, significant, told
from cpbench.reports.tables.summary import QUESTION, approximate, competing, method

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, str]
NO_RIVAL = "no exact method was timed"


def chosen(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of operators that choose and are ok, with ``exact_ms``, the time of the fastest
    exact method of the same problem, and ``exact``, its name."""
    exact = table[competing(table)].sort_values("time_ms", kind="stable")
    rivals = {key: rows.iloc[0] for key, rows in exact.groupby(list(QUESTION), sort=False)}
    found = table[approximate(table) & (table["status"] == "ok")]
    # A backward pass alone pays for no choosing: it is held against nothing.
    rivals = {key: row for key, row in rivals.items() if row["direction"] != "bwd"}
    keys = list(zip(*(found[column] for column in QUESTION), strict=True))
    return found.assign(
        exact_ms=[float(rivals[key]["time_ms"]) if key in rivals else math.nan for key in keys],
        exact=[method(rivals[key]) if key in rivals else "" for key in keys],
    )


def worth(table: pd.DataFrame, varying: Sequence[str]) -> list[Row]:
    """Every choice, problem by problem, the best recovery first."""
    rows = chosen(table)
    ordered = rows.sort_values(["recovered"], ascending=False, kind="stable")
    return [
        {
            **told(row, varying),
            "method": method(row),
            "kept %": _percent(row["kept"]),
            "recovered %": _percent(row["recovered"]),
            "of best %": _percent(row["recovered"] / row["best_recovered"]),
            "out error": number(row["out_error"], ".3f"),
            "ms": significant(row["time_ms"]),
            "fwd ms": significant(row["fwd_ms"]) if row["direction"] == "fwd_bwd" else "",
            "select": significant(row["select_ms"]),
            "plan": significant(row["arrange_ms"]),
            "kernel": significant(row["kernel_ms"]),
            "vs exact": number(row["exact_ms"] / row["time_ms"], ".2f", "x"),
            "exact": row["exact"],
        }
        for _, group in ordered.groupby(list(QUESTION), sort=True)
        for _, row in group.iterrows()
    ]


def overtakes(table: pd.DataFrame, varying: Sequence[str]) -> list[Row]:
    """For each method the length from which it is faster than the fastest exact one, at every
    measured length from there on, where several lengths were timed."""
    rows = chosen(table)
    rows = rows[rows["time_ms"].notna() & rows["exact_ms"].notna()]
    apart = [column for column in QUESTION if column != "seq_len"]
    found = []
    for _, group in rows.groupby([*apart, "operator"], sort=True):
        ordered = group.sort_values("seq_len").to_dict("records")
        if len({row["seq_len"] for row in ordered}) < 2:
            continue
        ratios = [(int(row["seq_len"]), row["exact_ms"] / row["time_ms"]) for row in ordered]
        found.append(
            {
                **told(ordered[0], [fact for fact in varying if fact != "tokens"]),
                "method": method(ordered[0]),
                "faster from": faster_from(ratios),
                "time of exact over its own": ", ".join(
                    f"{format_size(n)}: {ratio:.2f}x" for n, ratio in ratios
                ),
                "recovered %": ", ".join(_percent(row["recovered"]) for row in ordered),
            }
        )
    return found


def faster_from(ratios: Sequence[tuple[int, float]]) -> str:
    """The least length from which all ratios are above 1, in words.

    Args:
        ratios: by length, ascending: time of the exact method over that of the other.
    """
    first = None
    for tokens, ratio in ratios:
        first = (tokens if first is None else first) if ratio > 1 else None
    if first is None:
        return f"not up to {format_size(ratios[-1][0])}"
    return ("" if first > ratios[0][0] else "at most ") + format_size(first)


def _percent(share: Any) -> str:
    return number(float(share) * 100, ".1f")
