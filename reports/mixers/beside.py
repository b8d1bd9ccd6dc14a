"""Sequence mixers beside exact attention of as many tokens and heads.

Mixers compute another thing than attention, so they are not ranked with it: each is compared with
the fastest exact attention, whatever its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import format_size
from cpbench.reports.labels import fact_values, format_number, three_digits
from cpbench.reports.tables.selection import beside_attention, length_rows
from cpbench.reports.tables.summary import PROBLEM_KEYS, has_result, method_label, method_name
from cpbench.results.record import ATTENTION

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, str]
KEYS = tuple(key for key in PROBLEM_KEYS if key not in ("computes", "inputs", "content"))


def sections(table: pd.DataFrame, varying_facts: Sequence[str]) -> list[tuple[str, list[Row]]]:
    """Titles and rows of the tables of mixers that have any."""
    found = (
        ("length from which each is faster than exact attention", length_table),
        ("weak scaling, at fixed tokens a rank", weak_scaling_rows),
        ("several ranks, fastest first", rank_rows),
    )
    made = ((title, make(table, varying_facts)) for title, make in found)
    return [(title, rows) for title, rows in made if rows]


def mixer_cases(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of sequence mixers that are ok, beside the fastest exact attention."""
    cases = table[(table["computes"] != ATTENTION) & (table["status"] == "ok")]
    return beside_attention(cases, table, list(KEYS))


def length_table(table: pd.DataFrame, varying_facts: Sequence[str]) -> list[Row]:
    """For each mixer timed at several lengths, the length from which it is faster than the fastest
    exact attention; bytes of its state, and how many times as many keys and values have."""
    return [
        {
            **length_row,
            "state MB": three_digits(float(rows[0]["state_mb"])),
            "KV over state": ", ".join(
                f"{format_size(int(row['seq_len']))}: {row['kv_mb'] / row['state_mb']:.3g}x"
                for row in rows
            ),
        }
        for length_row, rows in length_rows(mixer_cases(table), varying_facts, "attention")
    ]


def weak_scaling_rows(table: pd.DataFrame, varying_facts: Sequence[str]) -> list[Row]:
    """For each method of a problem with as many tokens on every rank, the times by ranks, and the
    rate per rank over that of one rank with the same operator, or of the fewest ranks: of mixers,
    and of exact attention beside them."""
    timed = table[has_result(table) & table["tflops_per_rank"].notna()]
    timed = timed.assign(share=timed["seq_len"] / timed["world_size"])
    keys = [key for key in KEYS if key not in ("seq_len", "world_size")] + ["share"]
    facts = [fact for fact in varying_facts if fact not in ("computes", "tokens", "ranks")]
    rows = []
    for _, group in timed.groupby(keys, sort=True):
        share = int(group["share"].iloc[0])
        computed = set(group["computes"])
        if computed == {ATTENTION} or group["world_size"].nunique() < 2:
            continue
        for method, members in _by_method(group):
            by_ranks = sorted(members, key=lambda row: int(row["world_size"]))
            base = float(by_ranks[0]["tflops_per_rank"])
            ranks = [int(row["world_size"]) for row in by_ranks]
            rates = [float(row["tflops_per_rank"]) / base for row in by_ranks]
            rows.append(
                {
                    **fact_values(by_ranks[-1], facts),
                    "tokens a rank": format_size(share),
                    "method": method,
                    "ms by ranks": ", ".join(
                        f"{n}: {three_digits(float(row['time_ms']))}"
                        for n, row in zip(ranks, by_ranks, strict=True)
                    ),
                    "rate per rank": ", ".join(
                        f"{n}: {rate:.0%}" for n, rate in zip(ranks[1:], rates[1:], strict=True)
                    ),
                }
            )
    return rows


def _by_method(group: pd.DataFrame) -> list[tuple[str, list[Any]]]:
    """The methods on several ranks with more than one number of ranks, that of one rank being the
    fastest with the same operator."""
    rows = group.sort_values("time_ms", kind="stable").to_dict("records")
    alone: dict[tuple[str, Any], Any] = {}
    spread: dict[tuple[str, Any], dict[int, Any]] = {}
    for row in rows:
        if row["world_size"] == 1:
            alone.setdefault((row["operator"], row["inputs"]), row)
        else:
            by_ranks = spread.setdefault((method_name(row), row["inputs"]), {})
            by_ranks.setdefault(int(row["world_size"]), row)
    found = []
    for (method, inputs), by_ranks in sorted(spread.items()):
        one = alone.get((next(iter(by_ranks.values()))["operator"], inputs))
        members = ([] if one is None else [one]) + list(by_ranks.values())
        if len(members) > 1:
            found.append((method, members))
    return found


def rank_rows(table: pd.DataFrame, varying_facts: Sequence[str]) -> list[Row]:
    """Every mixer on several ranks, fastest first: beside attention on as many, the share of its
    forward phase in which it summarises runs of tokens, exposed and hidden communication, and what
    it sends."""
    cases = mixer_cases(table)
    cases = cases[(cases["world_size"] > 1) & cases["time_ms"].notna()]
    rows = []
    for _, group in cases.groupby(list(PROBLEM_KEYS), sort=True):
        for row in group.sort_values("time_ms", kind="stable").to_dict("records"):
            rows.append(
                {
                    **fact_values(row, varying_facts),
                    "method": method_label(row),
                    "ms": three_digits(row["time_ms"]),
                    "vs attention": format_number(row["exact_ms"] / row["time_ms"], ".2f", "x"),
                    "summarise %": _percent(row["summarise_ms"] / row["fwd_ms"]),
                    "exposed %": _percent(row["exposed"]),
                    "hidden %": _percent(row["hidden"]),
                    "sent MB": three_digits(row["sent_mb"]),
                    "attention": row["exact"],
                }
            )
    return rows


def _percent(share: float | None) -> str:
    known = share is not None and not math.isnan(share)
    return format_number(float(share) * 100, ".1f") if known and share is not None else ""
