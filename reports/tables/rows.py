"""Rows of the report's tables: fastest methods, cases, methods across mask seeds, failures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.labels import (
    FACT_COLUMNS,
    FACTS,
    RateFormat,
    describe,
    fact_values,
    format_megabytes,
    format_number,
    format_seeds,
    if_multi_rank,
    pluralize,
    three_digits,
)
from cpbench.reports.tables.mask_seeds import MIN_SEEDS_P95, SeedGroup, SeedSpread
from cpbench.reports.tables.summary import PROBLEM_KEYS, MethodRanking, method_label, method_name

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, str]
UNCONTESTED = "uncontested"


def fastest_rows(
    rankings: Sequence[MethodRanking],
    varying_facts: Sequence[str],
    rate: RateFormat,
    marks: Mapping[str, str],
) -> list[Row]:
    """The fastest method of each problem, with the marks of its caveats, and its lead over the
    runner-up."""
    rows = []
    for ranking in rankings:
        first = ranking.rows.iloc[0]
        contested = len(ranking.rows) > 1
        won = ranking.verdict == "won"
        rows.append(
            {
                **fact_values(first, varying_facts),
                "seeds": "",
                "fastest": method_name(first),
                "ms": three_digits(first["time_ms"]),
                "": _marks_of(first["flags"], marks),
                rate.unit: rate(first["tflops_per_rank"]),
                "lead": f"{ranking.lead:.2f}x" if won else ranking.verdict if contested else "",
                "runner-up": method_name(ranking.rows.iloc[1]) if contested else UNCONTESTED,
                "at p95": "",
                "at worst": "",
            }
        )
    return rows


def fastest_rows_across_seeds(
    seed_groups: Sequence[SeedGroup],
    varying_facts: Sequence[str],
    rate: RateFormat,
    marks: Mapping[str, str],
) -> list[Row]:
    """The same for seed groups: the fastest method in the median, and in the tail."""
    rows = []
    for group in seed_groups:
        if not group.compared:
            continue
        fastest, *others = group.compared
        tail = (group.fastest_in_tail or "tie") if others else ""
        tail = "same" if tail == fastest.method else tail
        if group.verdict == "won":
            lead = f"{others[0].time_ratio(fastest):.2f}x"
        else:
            lead = group.verdict if others else ""
        rows.append(
            {
                **fact_values(group.problem, varying_facts),
                "seeds": _seed_count(fastest, group),
                "fastest": fastest.method,
                "ms": three_digits(fastest.median("time_ms")),
                "": _marks_of(" ".join(row["flags"] for row in fastest.rows.values()), marks),
                rate.unit: rate(fastest.median("tflops_per_rank")),
                "lead": lead,
                "runner-up": others[0].method if others else UNCONTESTED,
                "at p95": tail if group.num_common_seeds >= MIN_SEEDS_P95 else "",
                "at worst": tail if group.num_common_seeds < MIN_SEEDS_P95 else "",
            }
        )
    return rows


def fastest_summary(rankings: Sequence[MethodRanking], seed_groups: Sequence[SeedGroup]) -> str:
    """The answer in a sentence: on how many problems each method is the fastest, and by how much;
    and how many are open, and why."""
    problems = [(method_name(r.rows.iloc[0]), r.verdict, r.lead, "") for r in rankings]
    for group in seed_groups:
        if group.compared:
            fastest, *others = group.compared
            lead = others[0].time_ratio(fastest) if others else None
            problems.append((fastest.method, group.verdict, lead, "mask seeds"))
    if not problems:
        return "Nothing to compare: no case was exact, timed and checked."
    if all(verdict == UNCONTESTED for _, verdict, _, _ in problems):
        return f"Nothing to compare: {pluralize(len(problems), 'problem')}, one method each."
    won = Counter(name for name, verdict, _, _ in problems if verdict == "won")
    parts: list[str] = []
    for name, count in won.most_common():
        leads = [
            lead for one, verdict, lead, _ in problems if (one, verdict) == (name, "won") and lead
        ]
        total = pluralize(len(problems), "problem")
        verb = f"is fastest on {count} of {total}" if not parts else f"on {count}"
        parts.append(f"{name} {verb}, by {'up to ' if count > 1 else ''}{max(leads):.2f}x")
    verdicts = Counter(verdict for _, verdict, _, _ in problems)
    total = "" if parts else f" of {pluralize(len(problems), 'problem')}"
    if ties := verdicts["tie"]:
        parts.append(f"{ties}{total} {'is a tie' if ties == 1 else 'are ties'}")
        total = ""
    if count := verdicts["inconclusive"]:
        units = [r.contest.shortage.unit for r in rankings
                 if r.verdict == "inconclusive" and r.contest.shortage]  # fmt: skip
        units += [unit for _, verdict, _, unit in problems if verdict == "inconclusive" and unit]
        lacking = " or ".join(dict.fromkeys(_plural(unit) for unit in units))
        verb = "is" if count == 1 else "are"
        parts.append(f"{count}{total} {verb} inconclusive: too few {lacking}")
        total = ""
    if count := verdicts[UNCONTESTED]:
        parts.append(f"{count}{total} {'is' if count == 1 else 'are'} uncontested")
    return f"{'; '.join(parts)}."


def _plural(unit: str) -> str:
    return unit if unit.endswith("s") else pluralize(2, unit).partition(" ")[2]


def _marks_of(flags: str, marks: Mapping[str, str]) -> str:
    """The marks of flags in a text."""
    return "".join(mark for flag, mark in marks.items() if flag in flags.split())


def case_rows(
    rankings: Sequence[MethodRanking],
    ok_rows: pd.DataFrame,
    varying_facts: Sequence[str],
    rate: RateFormat,
    marks: dict[str, str],
) -> list[Row]:
    """Every ok case, by problem: its noise, memory and traffic."""
    ranked = [
        (row, float(ranking.rows["time_ms"].iloc[0]))
        for ranking in rankings
        for _, row in ranking.rows.iterrows()
    ]
    ranked_ids = {row["id"] for row, _ in ranked}
    unranked = ok_rows[~ok_rows["id"].isin(ranked_ids)]  # not timed, or not checked
    return [
        {
            **fact_values(row, varying_facts),
            "method": method_name(row),
            "ms": three_digits(row["time_ms"]),
            "±%": format_number(row["noise"] * 100, ".1f"),
            "": _marks_of(row["flags"], marks),
            "vs best": format_number(row["time_ms"] / best, ".2f", "x"),
            rate.unit: rate(row["tflops_per_rank"]),
            "peak MB": format_number(row["peak_mb"], ".1f"),
            "predicted": format_number(if_multi_rank(row, "predicted_peak_mb"), ".1f"),
            "sent MB": format_megabytes(if_multi_rank(row, "sent_mb")),
            "across": format_megabytes(if_multi_rank(row, "across_mb") or math.nan),
            "exposed %": _percent_with_spread(row["exposed"], row["exposed_spread"]),
            "hidden %": format_number(row["hidden"] * 100, ".0f"),
        }
        for row, best in [*ranked, *((row, math.nan) for _, row in unranked.iterrows())]
    ]


def decoding_rows(table: pd.DataFrame, varying_facts: Sequence[str]) -> list[Row]:
    """Cases of decoding, by problem, fastest first: time by token, and how fast keys and values are
    read, beside what a large copy reaches."""
    rows = table[table["token_us"].notna()].sort_values("time_ms", kind="stable")
    return [
        {
            **fact_values(row, varying_facts),
            "method": method_label(row),
            "µs a token": three_digits(row["token_us"]),
            "GB/s of KV": three_digits(row["kv_gb_s"]),
            "% of copy": format_number(row["stream_share"] * 100, ".0f"),
        }
        for _, group in rows.groupby(list(PROBLEM_KEYS), sort=True)
        for _, row in group.iterrows()
    ]


def _percent_with_spread(share: float, spread: float) -> str:
    """A share with the half-width of its interval, in percent."""
    if math.isnan(share):
        return ""
    return f"{share * 100:.0f}" if math.isnan(spread) else f"{share * 100:.0f}±{spread * 100:.0f}"


def seed_blocks(
    group: SeedGroup, rate: RateFormat, marks: dict[str, str]
) -> list[tuple[str, list[Row]]]:
    """Rows of a seed group, with a line above them: compared methods over their common mask seeds,
    then methods timed on other mask seeds, each over its own."""
    seeds = f"{pluralize(len(group.mask_seeds), 'mask seed')} ({format_seeds(group.mask_seeds)})"
    heading, blocks = f"{seeds}{_density_text(group.density_range)}", []
    if group.compared:
        if group.num_common_seeds < len(group.mask_seeds) and len(group.compared) > 1:
            density = _density_text(group.common_density_range)
            heading += f"; compared on {group.num_common_seeds}{density}"
        rows = [_seed_row(spread, group, rate, marks) for spread in group.compared]
        if len(rows) > 1:
            for row, spread in zip(rows, group.compared, strict=True):
                row["vs best"] = f"{spread.time_ratio(group.compared[0]):.2f}x"
                row["fastest on"] = str(group.count_fastest(spread))
        blocks.append((heading, rows))
    elif any(len(spread.rows) for spread in group.timed):
        heading += "; not compared: no mask seed was completed by all methods"
    if group.not_compared:
        own_seeds = "Each method over all mask seeds on which it was timed (not comparable):"
        rows = [_seed_row(spread, group, rate, marks) for spread in group.not_compared]
        blocks.append((own_seeds if blocks else heading, rows))
    return blocks


def rank_cost_rows(group: SeedGroup) -> list[Row]:
    """Memory, load imbalance and traffic per rank of every method; none on one rank."""
    if group.problem["world_size"] == 1:
        return []
    return [
        {
            "method": spread.method,
            "seeds": _seed_count(spread, group),
            "peak MB": _median_and_max(spread, "peak_mb", ".1f"),
            "imbalance": _median_and_max(spread, "imbalance", ".2f"),
            "sent MB": _median_and_max(spread, "sent_mb", format_megabytes),
            "exposed ms": _median_and_max(spread, "exposed_ms", ".3g"),
        }
        for spread in group.methods
    ]


def missing_seed_lines(group: SeedGroup) -> list[str]:
    """Methods that did not complete every mask seed, and why."""
    compared = {spread.method for spread in group.compared}
    lines = []
    for name, reasons in group.missing.items():
        total, missing = len(group.mask_seeds), sum(reasons.values())
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        few = group.compared and missing < total and name not in compared
        end = ": too few to be compared." if few else "."
        seeds = pluralize(total, "mask seed")
        lines.append(f"Missing: {name} completed {total - missing} of {seeds} ({why}){end}")
    return lines


def _seed_row(spread: SeedSpread, group: SeedGroup, rate: RateFormat, marks: dict[str, str]) -> Row:
    flags = {flag for row in spread.rows.values() for flag in row["flags"].split()}
    median, lowest = rate(spread.median("tflops_per_rank")), rate(spread.min("tflops_per_rank"))
    single_rank = group.problem["world_size"] == 1
    return {
        "method": spread.method,
        "seeds": _seed_count(spread, group),
        "ms": three_digits(spread.median("time_ms")),
        "p95": three_digits(spread.p95("time_ms")),
        "worst": three_digits(spread.max("time_ms")),
        "": "".join(mark for flag, mark in marks.items() if flag in flags),
        "vs best": "",
        "fastest on": "",
        rate.unit: f"{median} / {lowest}" if median else "",
        "peak MB": _median_and_max(spread, "peak_mb", ".1f") if single_rank else "",
    }


def _seed_count(spread: SeedSpread, group: SeedGroup) -> str:
    return f"{len(spread.rows)} of {len(group.mask_seeds)}"


def _median_and_max(spread: SeedSpread, column: str, form: str | Callable[[float], str]) -> str:
    """Median and maximum across mask seeds."""
    values = spread.median(column), spread.max(column)
    median, largest = (
        format_number(value, form) if isinstance(form, str) else form(value) for value in values
    )
    return f"{median} / {largest}" if median else ""


def _density_text(ends: tuple[float, float] | None) -> str:
    return f", density {three_digits(ends[0])} to {three_digits(ends[1])}" if ends else ""


def unsupported_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Unsupported cases, counted by method and reason."""
    unsupported = table[table["status"] == "unsupported"]
    counts = Counter((method_name(row), str(row["reason"])) for _, row in unsupported.iterrows())
    return [
        {"method": name, "cases": count, "reason": reason}
        for (name, reason), count in sorted(counts.items())
    ]


def is_constant(table: pd.DataFrame, fact: str) -> bool:
    """Whether a fact is the same in every row."""
    columns = FACT_COLUMNS.get(fact, (fact,))
    return len(table[list(columns)].drop_duplicates()) == 1


def failed_cases(table: pd.DataFrame) -> list[tuple[str, str, str, list[str]]]:
    """Status, case, reason and logs of every case that is oom, wrong, crash or timeout; mask seeds
    that failed with the same status and reason are one entry."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    failed = table[~table["status"].isin(["ok", "unsupported"])]
    for row in failed.to_dict("records"):
        any_seed = f"{method_name(row)}, {describe({**row, 'mask': row['mask_family']}, FACTS)}"
        reason = " ".join(str(row["reason"]).split())
        case = row["id"] if row["draw"] is None else any_seed
        groups.setdefault((row["status"], case, reason), []).append(row)
    failures = []
    for (status, case, reason), rows in groups.items():
        if len(rows) == 1:
            case = f"{method_name(rows[0])}, {describe(rows[0], FACTS)}"
        else:
            seeds = format_seeds([row["draw"] for row in rows])
            case += f": {pluralize(len(rows), 'mask seed')} ({seeds})"
        logs = dict.fromkeys(str(Path(row["run"]) / row["log"]) for row in rows if row["log"])
        failures.append((status, case, reason, list(logs)))
    return failures
