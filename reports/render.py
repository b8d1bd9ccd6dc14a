"""A run as text: tables for a terminal or Markdown, or the data as CSV or JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.answer import Answer, answers, method
from cpbench.reports.frame import COLUMNS, frame
from cpbench.reports.text import escaped, row_lines, tabulated
from cpbench.spec import format_size
from cpbench.store import Run

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("table", "md", "csv", "json")

# What a problem is: column by heading, from a row of the tidy table, and how a sentence says it.
_FACTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "mask": (itemgetter("mask"), "{}"),
    "tokens": (lambda row: format_size(int(row["seq_len"])), "{} tokens"),
    "ranks": (itemgetter("world_size"), "world size {}"),
    "direction": (itemgetter("direction"), "{}"),
    "dtype": (itemgetter("dtype"), "{}"),
    "batch": (itemgetter("batch"), "batch {}"),
    "heads": (lambda row: f"{row['num_heads_q']}:{row['num_heads_kv']}", "{} heads"),
    "head_dim": (itemgetter("head_dim"), "head_dim {}"),
    "seed": (itemgetter("seed"), "seed {}"),
    "files": (itemgetter("content"), "files {}"),
    "machine": (itemgetter("machine"), "on {}"),
}
_UNSAID = ("none", "unknown")  # not worth a word where they hold throughout
_ALWAYS = ("mask", "tokens")
_MARKS = "*†‡§"
_MEANING = {
    "contended": "other work took processor time: too slow",
    "oversubscribed": "more threads than cores, ranks took turns: too slow",
    "throttled": "the clock was held down: too slow",
    "power-capped": "the power limit held the clock down",
    "nvml-missing": "nobody could tell whether the clock was held down",
    "unchecked": "not held against float64: no winner among them",
}


def render(run: Run, out: Path, form: str) -> str:
    """The report of a run in one of ``FORMATS``.

    ``csv`` and ``json`` are the tidy table (see ``COLUMNS``); ``table`` and ``md`` are for people:
    winners, every case, what could not run and why, caveats, environments.
    """
    table = frame(run.records.values(), run.environments)
    if form == "csv":
        return str(table.to_csv(index=False))
    if form == "json":
        return json.dumps(_plain(table), indent=1) + "\n"
    text: Callable[[str], str] = escaped if form == "md" else str
    timed, found = table[table["status"] == "ok"], answers(table)
    constant = [
        fact
        for fact in _FACTS
        if fact not in _ALWAYS and len({_FACTS[fact][0](row) for _, row in table.iterrows()}) == 1
    ]
    varying = [fact for fact in _FACTS if fact not in constant]
    marks = _marks(timed)
    lines = [f"# {text(out.name)}: {_counts(table)}", ""]
    lines += [text(f"Throughout: {_sentence(table.iloc[0], constant)}."), ""] if constant else []
    lines += _section("Winners", winners(found, varying), form)
    lines += (
        [text(_score(found)), ""]
        if found
        else ["No case competes: none was both timed and checked.", ""]
    )
    lines += _all_cases(every_case(found, timed, varying, marks), form)
    lines += _section("Refused", refusals(table), form)
    failed = failures(table, out)
    if failed:
        lines += ["## Failed", "", *_listed(failed, form), ""]
    notes = [*checks(timed), *caveats(timed, marks), *origins(run, out)]
    lines += [f"- {text(note)}" if form == "md" else note for note in notes]
    return "\n".join(lines) + "\n"


def winners(found: list[Answer], varying: list[str]) -> list[dict[str, str]]:
    """The fastest method of each problem, and how far ahead of which other it is."""
    rows = []
    for answer in found:
        first = answer.ranking.iloc[0]
        second = method(answer.ranking.iloc[1]) if len(answer.ranking) > 1 else "no other"
        lead = "tie" if answer.tie else f"{answer.lead:.2f}x" if answer.lead else ""
        rows.append(
            {
                **_told(first, varying),
                "fastest": method(first),
                "ms": _significant(first["time_ms"]),
                _unit(found): _rate(first["tflops_per_rank"], found),
                "lead": lead,
                "over": second,
            }
        )
    return rows


def every_case(
    found: list[Answer], timed: pd.DataFrame, varying: list[str], marks: dict[str, str]
) -> list[dict[str, str]]:
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
            **_told(row, varying),
            "method": method(row),
            "ms": _significant(row["time_ms"]),
            "±%": _number(row["noise"] * 100, ".1f"),
            "": "".join(mark for flag, mark in marks.items() if flag in row["flags"].split()),
            "vs best": _number(row["time_ms"] / best, ".2f", "x"),
            _unit(found): _rate(row["tflops_per_rank"], found),
            "peak MB": _number(row["peak_mb"], ".1f"),
            "sent MB": _number(row["sent_mb"] if row["world_size"] > 1 else math.nan, ".2f"),
        }
        for row, best in [*contests, *((row, math.nan) for _, row in others.iterrows())]
    ]


def refusals(table: pd.DataFrame) -> list[dict[str, Any]]:
    """What was refused, how often and why."""
    refused = table[table["status"] == "unsupported"]
    counts = Counter((method(row), str(row["reason"])) for _, row in refused.iterrows())
    return [
        {"method": name, "cases": count, "reason": reason}
        for (name, reason), count in sorted(counts.items())
    ]


def failures(table: pd.DataFrame, out: Path) -> list[tuple[str, str, str, str]]:
    """Status, case, reason and log of every case that is oom, wrong, crash or timeout."""
    failed = table[~table["status"].isin(["ok", "unsupported"])]
    return [
        (
            row["status"],
            f"{method(row)}, {_sentence(row, _FACTS)}",
            " ".join(str(row["reason"]).split()),
            str(out / row["log"]) if row["log"] else "",
        )
        for _, row in failed.iterrows()
    ]


def checks(timed: pd.DataFrame) -> list[str]:
    """That what is ok was found right, and how nearly."""
    errors = timed["worst_error"].dropna()
    lines = (
        [
            f"Checked against float64: {len(errors)} of {len(timed)} cases that are ok; largest "
            f"relative L2 error {errors.max():.1e}."
        ]
        if len(errors)
        else []
    )
    if timed["time_ms"].notna().any() and timed["world_size"].max() > 1:
        lines.append(
            "FLOP/s are for each rank; ms, peak and sent are those of the slowest or largest rank."
        )
    return lines


def caveats(timed: pd.DataFrame, marks: dict[str, str]) -> list[str]:
    """What to keep in mind about the times."""
    counts = Counter(flag for flags in timed["flags"] for flag in flags.split())
    return [
        f"Caveat{' ' + marks[flag] if flag in marks else ''}: {count} of {len(timed)} timed cases "
        f"{'is' if count == 1 else 'are'} {flag} ({_MEANING.get(flag, 'see the documentation')})."
        for flag, count in counts.most_common()
    ]


def origins(run: Run, out: Path) -> list[str]:
    """Warnings, environments and where the files are."""
    lines = [f"Warning: {warning}" for warning in run.warnings]
    for environment in run.environments.values():
        device = environment.get("device", {})
        packages = environment.get("packages", {})
        lines.append(
            f"Environment {environment['id']}: {environment.get('host')}, "
            f"{device.get('name') or environment.get('processor')}, {environment.get('cores')} "
            f"cores, torch {packages.get('torch')}, cpbench {environment.get('commit') or ''}"
        )
    lines.append(f"Records: {out}/records, one JSON a line; columns: cpbench report --columns")
    return lines


def columns() -> str:
    """What the columns of the data mean."""
    width = max(map(len, COLUMNS))
    return "\n".join(f"{name:{width}}  {meaning}" for name, meaning in COLUMNS.items()) + "\n"


def _section(title: str, rows: list[dict[str, Any]], form: str) -> list[str]:
    return [f"## {title}", "", tabulated(rows, form), ""] if rows else []


def _all_cases(rows: list[dict[str, str]], form: str) -> list[str]:
    title = "All cases, fastest first"
    if form != "table" or not rows:
        return _section(title, rows, form)
    # In a terminal each problem is a line of its own: its mask may be long.
    head, *bodies = row_lines([{k: v for k, v in r.items() if k not in _FACTS} for r in rows])
    lines, above = [f"## {title}", "", *head], None
    for row, body in zip(rows, bodies, strict=True):
        problem = ", ".join(_FACTS[key][1].format(row[key]) for key in _FACTS if key in row)
        lines += [*([] if problem == above else ["", problem]), *body]
        above = problem
    return [*lines, ""]


def _listed(failed: list[tuple[str, str, str, str]], form: str) -> list[str]:
    lines = []
    for status, case, reason, log in failed:
        if form == "md":
            lines.append(
                f"- **{status}** {escaped(case)}: {escaped(reason)}"
                + (f" (log: `{log}`)" if log else "")
            )
        else:
            lines += [f"{status:8} {case}", f"{'':8} {reason}"]
            lines += [f"{'':8} log: {log}"] if log else []
    return lines


def _score(found: list[Answer]) -> str:
    """How often each method was the fastest."""
    won = Counter(method(a.ranking.iloc[0]) for a in found if not a.tie and a.lead is not None)
    parts = [f"{name} {count}" for name, count in won.most_common()]
    others = {
        "ties": sum(a.tie for a in found),
        "without a rival": sum(a.lead is None for a in found),
    }
    parts += [f"{name} {count}" for name, count in others.items() if count]
    return f"Of {_counted(len(found), 'problem')}: {', '.join(parts)}."


def _marks(timed: pd.DataFrame) -> dict[str, str]:
    """A mark for each caveat that holds for some rows only; one for all needs none."""
    flags = timed["flags"].str.split()
    there = sorted({flag for row in flags for flag in row})
    some = [flag for flag in there if not all(flag in row for row in flags)]
    return dict(zip(some, _MARKS, strict=False))


def _told(row: Any, facts: Iterable[str]) -> dict[str, str]:
    return {fact: str(_FACTS[fact][0](row)) for fact in facts}


def _sentence(row: Any, facts: Iterable[str]) -> str:
    values = ((_FACTS[fact][1], _FACTS[fact][0](row)) for fact in facts)
    return ", ".join(words.format(value) for words, value in values if value not in _UNSAID)


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _counts(table: pd.DataFrame) -> str:
    counts = table["status"].value_counts()
    return f"{_counted(len(table), 'case')}, " + ", ".join(f"{n} {s}" for s, n in counts.items())


def _unit(found: list[Answer]) -> str:
    return "TFLOP/s" if _peak(found) >= 1 else "GFLOP/s"


def _peak(found: list[Answer]) -> float:
    return max((float(answer.ranking["tflops_per_rank"].max()) for answer in found), default=0.0)


def _rate(tflops: float, found: list[Answer]) -> str:
    return _significant(tflops if _peak(found) >= 1 else tflops * 1e3)


def _significant(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    if math.isnan(value):
        return ""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.{digits}f}"


def _number(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else format(value, form) + unit


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, which has neither nan nor infinity."""
    import numpy as np

    known = table.astype(object).where(table.notna(), None).replace([np.inf, -np.inf], None)
    return [{str(key): value for key, value in row.items()} for row in known.to_dict("records")]
