"""A run as text: tables for a terminal or Markdown, or the data as CSV or JSON."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports import tables
from cpbench.reports.answer import answers
from cpbench.reports.draws import FEWEST_P95, FEWEST_TOLD, Family, split
from cpbench.reports.frame import COLUMNS, frame
from cpbench.reports.text import escaped, fitted, row_lines, tabulated
from cpbench.reports.wording import FACTS, Rate, counted, phrase, sentence, told
from cpbench.store import Run

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("table", "md", "csv", "json")

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
    winners, methods over draws, every other case, what could not run and why, caveats,
    environments.
    """
    table = frame(run.records.values(), run.environments)
    if form == "csv":
        return str(table.to_csv(index=False))
    if form == "json":
        return json.dumps(_plain(table), indent=1) + "\n"
    text: Callable[[str], str] = escaped if form == "md" else str
    constant = [
        fact
        for fact in FACTS
        if fact not in _ALWAYS and len({FACTS[fact][0](row) for _, row in table.iterrows()}) == 1
    ]
    varying = [fact for fact in FACTS if fact not in constant]
    singles, families = split(table)
    timed, found = table[table["status"] == "ok"], answers(singles)
    marks, rate = _marks(timed), Rate(timed["tflops_per_rank"])
    alone = singles[singles["status"] == "ok"]
    cases = tables.every_case(found, alone, varying, rate, marks)
    lines = [f"# {text(out.name)}: {_counts(table)}", ""]
    lines += [text(f"Throughout: {sentence(table.iloc[0], constant)}."), ""] if constant else []
    won = tables.winners(found, varying, rate)
    won += tables.winners_over_draws(families, varying, rate)
    lines += _section("Winners", won, form)
    lines += [text(tables.score(found, families)), ""]
    lines += _over_draws(families, varying, rate, marks, form)
    lines += _all_cases(cases, bool(families), form)
    lines += _section("Refused", tables.refusals(table), form)
    failed = tables.failures(table, out)
    if failed:
        lines += ["## Failed", "", *_listed(failed, form), ""]
    notes = [*readings(families), *checks(timed), *caveats(timed, marks), *origins(run, out)]
    lines += [f"- {text(note)}" if form == "md" else note for note in notes]
    return "\n".join(lines) + "\n"


def readings(families: Sequence[Family]) -> list[str]:
    """How to read what is told of draws."""
    if not families:
        return []
    verdicts = {family.verdict for family in families if family.compared}
    few = any(family.common < FEWEST_P95 for family in families)
    lines = [
        "Over draws: ms is the median, worst the slowest draw; a / b is median / worst."
        + (f" p95 takes {FEWEST_P95} draws." if few else "")
    ]
    if verdicts - {"alone"}:
        lines += [
            "vs best, lead: geometric mean over draws of time over the best's on the same draw.",
            "at p95, at worst: whose 95th percentile, or worst of few draws, is the least.",
        ]
    if "tie" in verdicts:
        lines.append("tie over draws: a sign test at 5 % cannot tell, or the mean says otherwise.")
    if "open" in verdicts:
        lines.append(f"open: under {FEWEST_TOLD} draws a sign test never can tell; sweep more.")
    return lines


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
    alike: dict[str, list[str]] = {}  # gangs differ in what changes by the minute
    for environment in run.environments.values():
        device = environment.get("device", {})
        packages = environment.get("packages", {})
        hosts = {str(rank.get("host")) for rank in environment.get("ranks", [])}
        text = (
            f"{', '.join(sorted(hosts)) or environment.get('host')}; "
            f"{device.get('name') or environment.get('processor')}, {environment.get('cores')} "
            f"cores, torch {packages.get('torch')}, cpbench {environment.get('commit') or ''}"
        )
        alike.setdefault(text, []).append(environment["id"])
    for text, ids in alike.items():
        more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
        lines.append(f"Environment {ids[0]}{more}: {text}")
    lines.append(f"Records: {out}/records, one JSON a line; columns: cpbench report --columns")
    return lines


def columns() -> str:
    """What the columns of the data mean."""
    width = max(map(len, COLUMNS))
    return "\n".join(f"{name:{width}}  {meaning}" for name, meaning in COLUMNS.items()) + "\n"


def _section(title: str, rows: list[dict[str, Any]], form: str) -> list[str]:
    return [f"## {title}", "", tabulated(rows, form), ""] if rows else []


def _over_draws(
    families: Sequence[Family],
    varying: Sequence[str],
    rate: Rate,
    marks: dict[str, str],
    form: str,
) -> list[str]:
    """Every family: what was drawn, every method over it, which draws are missing."""
    times, costs = [], []
    for family in families:
        problem = phrase(told(family.question, varying))
        above = [problem]
        for drawn, rows in tables.blocks(family, rate, marks):
            times.append(([*above, drawn], rows, list[str]()))
            above = []
        if missing := tables.missing(family):
            times[-1][2].extend(missing)
        if rows := tables.costs(family):
            costs.append(([problem], rows, list[str]()))
    lines = _blocks("Over draws, fastest in the median first", times, form)
    return lines + _blocks("Over draws: what ranks hold, compute and send", costs, form)


def _all_cases(rows: list[tables.Row], others: bool, form: str) -> list[str]:
    title = f"All {'other ' if others else ''}cases, fastest first"
    if form != "table":
        return _section(title, rows, form)
    # In a terminal each problem is a line of its own: its mask may be long.
    blocks = []
    for problem, group in itertools.groupby(rows, key=_problem):
        cells = [{key: row[key] for key in row if key not in FACTS} for row in group]
        blocks.append(([problem], cells, list[str]()))
    return _blocks(title, blocks, form)


def _problem(row: tables.Row) -> str:
    return phrase({key: row[key] for key in FACTS if key in row})


def _blocks(
    title: str, blocks: Sequence[tuple[list[str], list[tables.Row], list[str]]], form: str
) -> list[str]:
    """Rows in blocks, with lines above and below them: in a terminal under one head."""
    if not blocks:
        return []
    lines = [f"## {title}", ""]
    if form == "md":
        for above, rows, below in blocks:
            lines += [*itertools.chain.from_iterable((escaped(line), "") for line in above)]
            lines += [tabulated(rows, form), ""]
            lines += [*(f"- {escaped(line)}" for line in below), *([""] if below else [])]
        return lines
    head, *bodies = row_lines([row for _, rows, _ in blocks for row in rows])
    lines, left = [*lines, *head], iter(bodies)
    for above, rows, below in blocks:
        lines += ["", *itertools.chain.from_iterable(map(fitted, above))]
        lines += itertools.chain.from_iterable(itertools.islice(left, len(rows)))
        lines += itertools.chain.from_iterable(map(fitted, below))
    return [*lines, ""]


def _listed(failed: Sequence[tuple[str, str, str, list[str]]], form: str) -> list[str]:
    lines = []
    for status, case, reason, logs in failed:
        more = f" and {len(logs) - 1} more" if len(logs) > 1 else ""
        if form == "md":
            log = f" (log: `{logs[0]}`{more})" if logs else ""
            lines.append(f"- **{status}** {escaped(case)}: {escaped(reason)}{log}")
        else:
            lines += [f"{status:8} {case}", f"{'':8} {reason}"]
            lines += [f"{'':8} log: {logs[0]}{more}"] if logs else []
    return lines


def _marks(timed: pd.DataFrame) -> dict[str, str]:
    """A mark for each caveat that holds for some rows only; one for all needs none."""
    flags = timed["flags"].str.split()
    there = sorted({flag for row in flags for flag in row})
    some = [flag for flag in there if not all(flag in row for row in flags)]
    return dict(zip(some, _MARKS, strict=False))


def _counts(table: pd.DataFrame) -> str:
    counts = table["status"].value_counts()
    return f"{counted(len(table), 'case')}, " + ", ".join(f"{n} {s}" for s, n in counts.items())


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, which has neither nan nor infinity."""
    import numpy as np

    known = table.astype(object).where(table.notna(), None).replace([np.inf, -np.inf], None)
    return [{str(key): value for key, value in row.items()} for row in known.to_dict("records")]
