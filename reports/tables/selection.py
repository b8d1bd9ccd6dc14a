"""Selectors beside exact attention: attention recall, time, and break-even lengths.

Selectors compute part of attention, so they are not ranked with exact attention; each is compared
with the fastest exact method for the same problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import format_size
from cpbench.reports.labels import (
    fact_values,
    format_megabytes,
    format_number,
    if_multi_rank,
    three_digits,
)
from cpbench.reports.tables.contest import Contest, hold_contest
from cpbench.reports.tables.summary import (
    PROBLEM_KEYS,
    has_result,
    is_approximate,
    method_label,
    method_name,
    method_names,
)
from cpbench.results.record import APPROXIMATE, ATTENTION

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, str]


def selector_cases(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of selectors that are ok, beside the fastest exact method for the same problem."""
    # A backward pass alone does not include the selection, so it is not compared.
    compared = table[table["direction"] != "bwd"]
    cases = table[is_approximate(table) & (table["status"] == "ok")]
    return beside_attention(cases, compared, list(PROBLEM_KEYS))


def beside_attention(cases: pd.DataFrame, table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Cases with more columns: ``exact``, the fastest exact attention in a table with the same
    values of ``keys``, ``exact_ms``, its time, and ``exact_evidence``; none where the time of the
    case does not count."""
    ranked = table[table["competes"] & (table["computes"] == ATTENTION)]
    ranked = ranked.sort_values("time_ms", kind="stable")
    fastest = {key: rows.iloc[0] for key, rows in ranked.groupby(keys, sort=False)}
    values = zip(*(cases[column] for column in keys), strict=True)
    exact = [
        fastest.get(key) if counts else None
        for key, counts in zip(values, has_result(cases), strict=True)
    ]
    return cases.assign(
        exact_ms=[math.nan if row is None else float(row["time_ms"]) for row in exact],
        exact=["" if row is None else method_name(row) for row in exact],
        exact_evidence=["" if row is None else row["evidence"] for row in exact],
    )


def recall_rows(table: pd.DataFrame, varying_facts: Sequence[str]) -> list[Row]:
    """Every case of a selector, by problem, highest recall first; with figures of its index where
    any selector searches one."""
    cases = selector_cases(table).sort_values(["recovered"], ascending=False, kind="stable")
    index = _index_cells if cases["index_mb"].notna().any() else lambda _: {}
    return [
        {
            **fact_values(row, varying_facts),
            "method": method_label(row, ignored=APPROXIMATE),
            "kept %": _percent(row["kept"]),
            "recall %": _percent(row["recovered"]),
            "% of oracle": _percent(row["recovered"] / row["best_recovered"]),
            "out error": format_number(row["out_error"], ".3f"),
            "ms": three_digits(row["time_ms"]),
            "vs exact": format_number(row["exact_ms"] / row["time_ms"], ".2f", "x"),
            "exact": row["exact"],
            "fwd ms": three_digits(row["fwd_ms"]) if row["direction"] == "fwd_bwd" else "",
            "select": three_digits(row["select_ms"]),
            "plan": three_digits(row["arrange_ms"]),
            "kernel": three_digits(row["kernel_ms"]),
            **index(row),
            "sent MB": format_megabytes(if_multi_rank(row, "sent_mb")),
            "all-gather MB": format_megabytes(row["allgather_mb"]),
        }
        for _, rows in cases.groupby(list(PROBLEM_KEYS), sort=True)
        for _, row in rows.iterrows()
    ]


def _index_cells(row: Any) -> Row:
    """Recall, build time and size of the index of a selector."""
    return {
        "index recall %": _percent(row["index_recall"]),
        "index ms": three_digits(row["index_build_ms"]),
        "index MB": three_digits(row["index_mb"]),
    }


def needle_rows(table: pd.DataFrame, varying_facts: Sequence[str]) -> list[Row]:
    """Every case whose inputs have needles that are asked for, by problem, most found first."""
    cases = table[(table["status"] == "ok") & table["found"].notna()]
    cases = cases.sort_values(["found", "solved"], ascending=False, kind="stable")
    return [
        {
            **fact_values(row, varying_facts),
            "method": method_label(row, ignored=APPROXIMATE),
            "found %": _percent(row["found"]),
            "all found %": _percent(row["solved"]),
            "kept %": _percent(row["kept"]),
            "ms": three_digits(row["time_ms"]),
        }
        for _, rows in cases.groupby(list(PROBLEM_KEYS), sort=True)
        for _, row in rows.iterrows()
    ]


def break_even_rows(table: pd.DataFrame, varying_facts: Sequence[str]) -> list[Row]:
    """For each selector timed at several lengths, the length from which it is faster than the
    fastest exact method."""
    return [
        {**length_row, "recall %": ", ".join(_percent(row["recovered"]) for row in rows)}
        for length_row, rows in length_rows(selector_cases(table), varying_facts, "exact")
    ]


def length_rows(
    cases: pd.DataFrame, varying_facts: Sequence[str], beside: str
) -> Iterator[tuple[Row, list[Any]]]:
    """For each method timed at several lengths, a row with the length from which it is faster than
    what is beside it, and its cases by length."""
    cases = cases[cases["time_ms"].notna() & cases["exact_ms"].notna()]
    other_keys = [key for key in PROBLEM_KEYS if key != "seq_len"]
    other_facts = [fact for fact in varying_facts if fact not in ("tokens", "computes")]
    cases = cases.assign(method=method_names(cases))
    for _, group in cases.groupby([*other_keys, "method"], sort=True):
        by_length = group.sort_values("seq_len").to_dict("records")
        if len({row["seq_len"] for row in by_length}) < 2:
            continue
        contests = [
            (int(row["seq_len"]), hold_contest([row["evidence"], row["exact_evidence"]]))
            for row in by_length
        ]
        speedups = ", ".join(
            f"{format_size(int(row['seq_len']))}: {row['exact_ms'] / row['time_ms']:.2f}x"
            for row in by_length
        )
        yield (
            {
                **fact_values(by_length[0], other_facts),
                "method": method_name(by_length[0]),
                "faster from": break_even_length(contests),
                f"speedup over {beside}": speedups,
            },
            by_length,
        )


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
