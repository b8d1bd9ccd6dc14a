"""Answers as rows of text: winners, cases, methods over draws, refusals, failures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.labels import (
    FACT_COLUMNS,
    FACTS,
    Rate,
    counted,
    number,
    seeds,
    sentence,
    significant,
    told,
)
from cpbench.reports.tables.mask_seeds import FEWEST_P95, Family, Spread
from cpbench.reports.tables.summary import Answer, method

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, str]


def winners(found: Sequence[Answer], varying: Sequence[str], rate: Rate) -> list[Row]:
    """The fastest method of each problem, and how far ahead of which other it is."""
    rows = []
    for answer in found:
        first = answer.ranking.iloc[0]
        second = method(answer.ranking.iloc[1]) if len(answer.ranking) > 1 else "no other"
        rows.append(
            {
                **told(first, varying),
                "draws": "",
                "fastest": method(first),
                "ms": significant(first["time_ms"]),
                rate.unit: rate(first["tflops_per_rank"]),
                "lead": "tie" if answer.tie else f"{answer.lead:.2f}x" if answer.lead else "",
                "over": second,
                "at p95": "",
                "at worst": "",
            }
        )
    return rows


def winners_over_draws(families: Sequence[Family], varying: Sequence[str], rate: Rate) -> list[Row]:
    """The same of each family: the fastest in the median over draws, and in the tail."""
    rows = []
    for family in families:
        if not family.compared:
            continue
        first, *rivals = family.compared
        tail = (family.tail_winner or "tie") if rivals else ""
        tail = "same" if tail == first.method else tail
        won = family.verdict == "won"
        rows.append(
            {
                **told(family.question, varying),
                "draws": _share(first, family),
                "fastest": first.method,
                "ms": significant(first.median("time_ms")),
                rate.unit: rate(first.median("tflops_per_rank")),
                "lead": f"{rivals[0].ratio(first):.2f}x" if won else family.verdict * bool(rivals),
                "over": rivals[0].method if rivals else "no other",
                "at p95": tail if family.common >= FEWEST_P95 else "",
                "at worst": tail if family.common < FEWEST_P95 else "",
            }
        )
    return rows


def score(found: Sequence[Answer], families: Sequence[Family]) -> str:
    """How often each method was the fastest."""
    verdicts = ["alone" if a.lead is None else "tie" if a.tie else "won" for a in found]
    best = [method(a.ranking.iloc[0]) for a in found]
    contests = [family for family in families if family.compared]
    verdicts += [family.verdict for family in contests]
    best += [family.compared[0].method for family in contests]
    if not best:
        return "No case competes: none was exact, timed and checked."
    won = Counter(name for name, how in zip(best, verdicts, strict=True) if how == "won")
    parts = [f"{name} {count}" for name, count in won.most_common()]
    others = {"tie": "ties", "open": "open for want of draws", "alone": "without a rival"}
    parts += [f"{words} {verdicts.count(how)}" for how, words in others.items() if how in verdicts]
    return f"Of {counted(len(best), 'problem')}: {', '.join(parts)}."


def every_case(
    found: Sequence[Answer],
    timed: pd.DataFrame,
    varying: Sequence[str],
    rate: Rate,
    marks: dict[str, str],
) -> list[Row]:
    """Every case that is ok, problem by problem: its noise, memory and traffic."""
    contests = [
        (row, float(answer.ranking["time_ms"].iloc[0]))
        for answer in found
        for _, row in answer.ranking.iterrows()
    ]
    ranked = {row["id"] for row, _ in contests}
    others = timed[~timed["id"].isin(ranked)]  # only checked, or not checked
    return [
        {
            **told(row, varying),
            "method": method(row),
            "ms": significant(row["time_ms"]),
            "±%": number(row["noise"] * 100, ".1f"),
            "": "".join(mark for flag, mark in marks.items() if flag in row["flags"].split()),
            "vs best": number(row["time_ms"] / best, ".2f", "x"),
            rate.unit: rate(row["tflops_per_rank"]),
            "peak MB": number(row["peak_mb"], ".1f"),
            "predicted": number(_several(row, "predicted_peak_mb"), ".1f"),
            "sent MB": number(_several(row, "sent_mb"), ".2f"),
            "across": number(_several(row, "across_mb") or math.nan, ".2f"),
            "exposed %": _with_spread(row["exposed"], row["exposed_spread"]),
            "hidden %": number(row["hidden"] * 100, ".0f"),
        }
        for row, best in [*contests, *((row, math.nan) for _, row in others.iterrows())]
    ]


def _with_spread(share: float, spread: float) -> str:
    """A share and how far it may be off, in percent."""
    if math.isnan(share):
        return ""
    return f"{share * 100:.0f}" if math.isnan(spread) else f"{share * 100:.0f}±{spread * 100:.0f}"


def _several(row: Any, column: str) -> float:
    """A figure that means something with several ranks only."""
    return float(row[column]) if row["world_size"] > 1 else math.nan


def blocks(family: Family, rate: Rate, marks: dict[str, str]) -> list[tuple[str, list[Row]]]:
    """The methods of a family over its draws, with what to say above them: those that compete,
    over the draws that all of them completed, then each over its own where these are others."""
    drawn = f"{counted(len(family.draws), 'draw')} ({seeds(family.draws)})"
    first, found = f"{drawn}{_density(family.density)}", []
    if family.compared:
        if family.common < len(family.draws) and len(family.compared) > 1:
            first += f"; compared on {family.common}{_density(family.common_density)}"
        rows = [_spread(spread, family, rate, marks) for spread in family.compared]
        if len(rows) > 1:
            for row, spread in zip(rows, family.compared, strict=True):
                row["vs best"] = f"{spread.ratio(family.compared[0]):.2f}x"
                row["fastest on"] = str(family.fastest_on(spread))
        found.append((first, rows))
    elif any(len(spread.rows) for spread in family.own):
        first += "; nothing is compared, for no draw was completed by all"
    if family.apart:
        own = "Each over all draws that it was timed on, not to be compared:"
        rows = [_spread(spread, family, rate, marks) for spread in family.apart]
        found.append((own if found else first, rows))
    return found


def costs(family: Family) -> list[Row]:
    """Memory, balance and traffic of every method that is spread over ranks."""
    if family.question["world_size"] == 1:
        return []
    return [
        {
            "method": spread.method,
            "draws": _share(spread, family),
            "peak MB": _both(spread, "peak_mb", ".1f"),
            "imbalance": _both(spread, "imbalance", ".2f"),
            "sent MB": _both(spread, "sent_mb", ".2f"),
            "exposed ms": _both(spread, "exposed_ms", ".3g"),
        }
        for spread in family.methods
    ]


def missing(family: Family) -> list[str]:
    """Which methods did not complete every draw, and why."""
    competing = {spread.method for spread in family.compared}
    lines = []
    for name, why in family.lacking.items():
        asked, lacking = len(family.draws), sum(why.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in why.most_common())
        few = family.compared and lacking < asked and name not in competing
        lines.append(
            f"Missing: {name} completed {asked - lacking} of {counted(asked, 'draw')} ({reasons})"
            f"{': too few to compete' if few else ''}."
        )
    return lines


def _spread(spread: Spread, family: Family, rate: Rate, marks: dict[str, str]) -> Row:
    flags = {flag for row in spread.rows.values() for flag in row["flags"].split()}
    middle, least = rate(spread.median("tflops_per_rank")), rate(spread.least("tflops_per_rank"))
    single = family.question["world_size"] == 1
    return {
        "method": spread.method,
        "draws": _share(spread, family),
        "ms": significant(spread.median("time_ms")),
        "p95": significant(spread.p95("time_ms")),
        "worst": significant(spread.most("time_ms")),
        "": "".join(mark for flag, mark in marks.items() if flag in flags),
        "vs best": "",
        "fastest on": "",
        rate.unit: f"{middle} / {least}" if middle else "",
        "peak MB": _both(spread, "peak_mb", ".1f") if single else "",
    }


def _share(spread: Spread, family: Family) -> str:
    return f"{len(spread.rows)} of {len(family.draws)}"


def _both(spread: Spread, column: str, form: str) -> str:
    """The median over draws and the largest."""
    middle, most = (number(x, form) for x in (spread.median(column), spread.most(column)))
    return f"{middle} / {most}" if middle else ""


def _density(ends: tuple[float, float] | None) -> str:
    return f", density {significant(ends[0])} to {significant(ends[1])}" if ends else ""


def refusals(table: pd.DataFrame) -> list[dict[str, Any]]:
    """What was refused, how often and why."""
    refused = table[table["status"] == "unsupported"]
    counts = Counter((method(row), str(row["reason"])) for _, row in refused.iterrows())
    return [
        {"method": name, "cases": count, "reason": reason}
        for (name, reason), count in sorted(counts.items())
    ]


def constant(table: pd.DataFrame, fact: str) -> bool:
    """Whether a fact is the same in every row."""
    columns = FACT_COLUMNS.get(fact, (fact,))
    return len(table[list(columns)].drop_duplicates()) == 1


def failures(table: pd.DataFrame) -> list[tuple[str, str, str, list[str]]]:
    """Status, case, reason and logs of every case that is oom, wrong, crash or timeout; draws of
    one family that failed alike are told together."""
    alike: dict[tuple[str, str, str], list[Any]] = {}
    failed = table[~table["status"].isin(["ok", "unsupported"])]
    for row in failed.to_dict("records"):
        drawn = f"{method(row)}, {sentence({**row, 'mask': row['mask_family']}, FACTS)}"
        reason = " ".join(str(row["reason"]).split())
        case = row["id"] if row["draw"] is None else drawn
        alike.setdefault((row["status"], case, reason), []).append(row)
    found = []
    for (status, case, reason), rows in alike.items():
        if len(rows) == 1:
            case = f"{method(rows[0])}, {sentence(rows[0], FACTS)}"
        else:
            case += f": {counted(len(rows), 'draw')} ({seeds([row['draw'] for row in rows])})"
        logs = dict.fromkeys(str(Path(row["run"]) / row["log"]) for row in rows if row["log"])
        found.append((status, case, reason, list(logs)))
    return found
