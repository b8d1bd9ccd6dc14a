"""Sparse selection: attention recall of selectors, their time, and their break-even length.

Selectors compute part of attention, so they are not ranked with exact methods; each is compared
with the fastest exact method for the same problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import format_size
from cpbench.reports.labels import fact_values, format_number, three_digits
from cpbench.reports.tables.contest import Contest, hold_contest
from cpbench.reports.tables.summary import (
    PROBLEM_KEYS,
    has_result,
    is_approximate,
    method_label,
    method_name,
)
from cpbench.results.record import APPROXIMATE

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, str]


def selector_cases(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of selectors that are ok, with more columns: ``exact``, the fastest exact method for the
    same problem, ``exact_ms``, its time, and ``exact_evidence``; none where the time of the
    selector does not count."""
    ranked = table[table["competes"]].sort_values("time_ms", kind="stable")
    fastest = {key: rows.iloc[0] for key, rows in ranked.groupby(list(PROBLEM_KEYS), sort=False)}
    # A backward pass alone does not include the selection, so it is not compared.
    fastest = {key: row for key, row in fastest.items() if row["direction"] != "bwd"}
    cases = table[is_approximate(table) & (table["status"] == "ok")]
    keys = zip(*(cases[column] for column in PROBLEM_KEYS), strict=True)
    exact = [
        fastest.get(key) if counts else None
        for key, counts in zip(keys, has_result(cases), strict=True)
    ]
    return cases.assign(
        exact_ms=[math.nan if row is None else float(row["time_ms"]) for row in exact],
        exact=["" if row is None else method_name(row) for row in exact],
        exact_evidence=["" if row is None else row["evidence"] for row in exact],
    )


def recall_rows(table: pd.DataFrame, varying_facts: Sequence[str]) -> list[Row]:
    """Every case of a selector, by problem, highest recall first."""
    cases = selector_cases(table).sort_values(["recovered"], ascending=False, kind="stable")
    return [
        {
            **fact_values(row, varying_facts),
            "method": method_label(row, ignored=APPROXIMATE),
            "kept %": _percent(row["kept"]),
            "recall %": _percent(row["recovered"]),
            "% of oracle": _percent(row["recovered"] / row["best_recovered"]),
            "out error": format_number(row["out_error"], ".3f"),
            "ms": three_digits(row["time_ms"]),
            "fwd ms": three_digits(row["fwd_ms"]) if row["direction"] == "fwd_bwd" else "",
            "select": three_digits(row["select_ms"]),
            "plan": three_digits(row["arrange_ms"]),
            "kernel": three_digits(row["kernel_ms"]),
            "vs exact": format_number(row["exact_ms"] / row["time_ms"], ".2f", "x"),
            "exact": row["exact"],
        }
        for _, rows in cases.groupby(list(PROBLEM_KEYS), sort=True)
        for _, row in rows.iterrows()
    ]


def break_even_rows(table: pd.DataFrame, varying_facts: Sequence[str]) -> list[Row]:
    """For each selector timed at several lengths, the length from which it is faster than the
    fastest exact method."""
    cases = selector_cases(table)
    cases = cases[cases["time_ms"].notna() & cases["exact_ms"].notna()]
    other_keys = [key for key in PROBLEM_KEYS if key != "seq_len"]
    other_facts = [fact for fact in varying_facts if fact != "tokens"]
    table_rows = []
    for _, group in cases.groupby([*other_keys, "operator"], sort=True):
        by_length = group.sort_values("seq_len").to_dict("records")
        if len({row["seq_len"] for row in by_length}) < 2:
            continue
        contests = [
            (int(row["seq_len"]), hold_contest([row["evidence"], row["exact_evidence"]]))
            for row in by_length
        ]
        table_rows.append(
            {
                **fact_values(by_length[0], other_facts),
                "method": method_name(by_length[0]),
                "faster from": break_even_length(contests),
                "speedup over exact": ", ".join(
                    f"{format_size(int(row['seq_len']))}: {row['exact_ms'] / row['time_ms']:.2f}x"
                    for row in by_length
                ),
                "recall %": ", ".join(_percent(row["recovered"]) for row in by_length),
            }
        )
    return table_rows


def break_even_length(contests: Sequence[tuple[int, Contest]]) -> str:
    """The smallest measured length from which on the selector is significantly faster, as text.

    Args:
        contests: by length, ascending: of the selector with the exact method.
    """
    if any(contest.verdict == "inconclusive" for _, contest in contests):
        return "inconclusive"
    first = None
    for tokens, contest in contests:
        first = (tokens if first is None else first) if contest.verdict == "won" else None
    if first is None:
        return f"not up to {format_size(contests[-1][0])}"
    return ("" if first > contests[0][0] else "at most ") + format_size(first)


def _percent(share: Any) -> str:
    return format_number(float(share) * 100, ".1f")
