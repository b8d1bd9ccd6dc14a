"""Runs as text: tables for a terminal, Markdown or LaTeX, or the data as CSV or JSON."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.reports.collection import Collection
from cpbench.reports.columns import COLUMNS
from cpbench.reports.labels import FACTS, Rate, apart, counted, phrase, sentence, told
from cpbench.reports.tables import rows as tables
from cpbench.reports.tables import selection as choices
from cpbench.reports.tables.markup import MARKUPS, Markup
from cpbench.reports.tables.mask_seeds import FEWEST_P95, FEWEST_TOLD, Family, split
from cpbench.reports.tables.summary import Answer, answers, approximate
from cpbench.reports.tables.terminal import fitted, row_lines

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("short", "table", "md", "latex", "csv", "json")

_ALWAYS = ("mask", "tokens")
_FAILED_SHORT = 10
_MARKS = "*†‡§"
_MEANING = {
    "contended": "other work took processor time: too slow",
    "oversubscribed": "more threads than cores, ranks took turns: too slow",
    "throttled": "the clock was held down: too slow",
    "power-capped": "the power limit held the clock down",
    "nvml-missing": "nobody could tell whether the clock was held down",
    "approximate": "a part of attention alone: no winner among them",
    "unchecked": "not held against float64: no winner among them",
}


@dataclass(frozen=True)
class Contents:
    """What there is to say of a collection.

    Attributes:
        singles, families: answers to single problems, and to problems drawn several times.
        constant, varying: headings of facts that hold throughout, and of the others.
        timed: the rows that are ok.
        marks: of caveats; rate: the unit of rates.
    """

    collection: Collection
    singles: list[Answer]
    alone: pd.DataFrame
    families: list[Family]
    constant: list[str]
    varying: list[str]
    timed: pd.DataFrame
    marks: dict[str, str]
    rate: Rate

    @classmethod
    def of(cls, collection: Collection) -> Contents:
        table = collection.table
        constant = [fact for fact in FACTS if fact not in _ALWAYS and tables.constant(table, fact)]
        singles, families = split(table)
        timed = table[table["status"] == "ok"]
        return cls(
            collection=collection,
            singles=answers(singles),
            alone=singles[(singles["status"] == "ok") & ~approximate(singles)],
            families=families,
            constant=constant,
            varying=[fact for fact in FACTS if fact not in constant],
            timed=timed,
            marks=_marks(timed),
            rate=Rate(timed["tflops_per_rank"]),
        )

    @property
    def headline(self) -> str:
        return f"{self.collection.title}: {counts(self.collection.table)}"

    @property
    def throughout(self) -> str:
        """What holds of all cases, in words; "" for nothing."""
        return sentence(self.collection.table.iloc[0], self.constant) if self.constant else ""

    @property
    def score(self) -> str:
        return tables.score(self.singles, self.families)

    @property
    def notes(self) -> list[str]:
        """How to read it, what was checked, what to keep in mind, where it comes from."""
        return [
            *readings(self.families),
            *checks(self.timed),
            *caveats(self.timed, self.marks),
            *origins(self.collection),
        ]


def render(collection: Collection, form: str) -> str:
    """The report of some runs in one of ``FORMATS``.

    ``csv`` and ``json`` are the tidy table (see ``COLUMNS``); the others are for people: winners,
    methods over draws, every other case, what could not run and why, caveats, environments.
    ``short`` is winners, failures and caveats.
    """
    table = collection.table
    if form == "csv":
        return str(table.to_csv(index=False))
    if form == "json":
        return json.dumps(plain(table), indent=1) + "\n"
    markup, told_of = MARKUPS[form], Contents.of(collection)
    lines = markup.title(told_of.headline)
    if told_of.throughout:
        lines += [markup.text(f"Throughout: {told_of.throughout}."), ""]
    won = tables.winners(told_of.singles, told_of.varying, told_of.rate)
    won += tables.winners_over_draws(told_of.families, told_of.varying, told_of.rate)
    lines += _section("Winners", won, markup)
    lines += [markup.text(told_of.score), ""]
    lines += _choices(told_of, markup, form)
    refused = tables.refusals(table)
    if form != "short":
        lines += _over_draws(told_of, markup, form)
        lines += _all_cases(told_of, markup, form)
        lines += _section("Refused", refused, markup)
    failed = tables.failures(table)
    if failed:
        lines += markup.section("Failed")
        for status, case, reason, logs in failed[:_FAILED_SHORT] if form == "short" else failed:
            more = f" and {len(logs) - 1} more" if len(logs) > 1 else ""
            lines += markup.failure(status, case, reason, logs[0] if logs else "", more)
        if form == "short" and len(failed) > _FAILED_SHORT:
            lines.append(f"and {len(failed) - _FAILED_SHORT} more")
        lines.append("")
    notes = told_of.notes
    if form == "short":
        cases = sum(row["cases"] for row in refused)
        notes += [f"Refused: {counted(cases, 'case')}."] if cases else []
        notes.append("All cases: --format table; a page with charts: -o report.html")
    return markup.document([*lines, *markup.notes(notes)])


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


def origins(collection: Collection) -> list[str]:
    """Warnings, environments and where the files are."""
    lines = [f"Warning: {warning}" for warning in collection.warnings]
    alike: dict[str, list[str]] = {}  # gangs differ in what changes by the minute
    for environment in collection.environments.values():
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
    where = ", ".join(f"{out}/records" for out in collection.runs)
    lines.append(f"Records: {where}, one JSON a line; columns: cpbench report --columns")
    return lines


def columns() -> str:
    """What the columns of the data mean."""
    width = max(map(len, COLUMNS))
    return "\n".join(f"{name:{width}}  {meaning}" for name, meaning in COLUMNS.items()) + "\n"


def _section(title: str, rows: list[dict[str, Any]], markup: Markup) -> list[str]:
    return [*markup.section(title), *markup.table(rows)] if rows else []


def _over_draws(told_of: Contents, markup: Markup, form: str) -> list[str]:
    """Every family: what was drawn, every method over it, which draws are missing."""
    times, costs = [], []
    for family in told_of.families:
        problem = phrase(told(family.question, told_of.varying))
        above = [problem]
        for drawn, rows in tables.blocks(family, told_of.rate, told_of.marks):
            times.append(([*above, drawn], rows, list[str]()))
            above = []
        if missing := tables.missing(family):
            times[-1][2].extend(missing)
        if rows := tables.costs(family):
            costs.append(([problem], rows, list[str]()))
    lines = _blocks("Over draws, fastest in the median first", times, markup, form)
    return lines + _blocks("Over draws: what ranks hold, compute and send", costs, markup, form)


def _all_cases(told_of: Contents, markup: Markup, form: str) -> list[str]:
    rows = tables.every_case(
        told_of.singles, told_of.alone, told_of.varying, told_of.rate, told_of.marks
    )
    return _grouped(
        f"All {'other ' if told_of.families else ''}cases, fastest first", rows, markup, form
    )


def _choices(told_of: Contents, markup: Markup, form: str) -> list[str]:
    """What operators that choose recover, what it costs, and from which length it pays."""
    table = told_of.collection.table
    rows = choices.worth(table, told_of.varying)
    lines = _grouped("Sparse choices, the best recovery first", rows, markup, form)
    paid = choices.overtakes(table, told_of.varying)
    return lines + _grouped("Sparse choices: from which length they pay", paid, markup, form)


def _grouped(title: str, rows: list[tables.Row], markup: Markup, form: str) -> list[str]:
    """In a terminal each problem is a line of its own: its mask may be long."""
    if form not in ("table", "short"):
        return _section(title, rows, markup)
    blocks = [([problem] if problem else [], cells, list[str]()) for problem, cells in apart(rows)]
    return _blocks(title, blocks, markup, "table")


def _blocks(
    title: str,
    blocks: Sequence[tuple[list[str], list[tables.Row], list[str]]],
    markup: Markup,
    form: str,
) -> list[str]:
    """Rows in blocks, with lines above and below them: in a terminal under one head."""
    if not blocks:
        return []
    lines = markup.section(title)
    if form != "table":
        for above, rows, below in blocks:
            lines += [*itertools.chain.from_iterable((markup.text(line), "") for line in above)]
            lines += markup.table(rows)
            lines += [*markup.notes(below), *([""] if below else [])]
        return lines
    head, *bodies = row_lines([row for _, rows, _ in blocks for row in rows])
    lines, left = [*lines, *head], iter(bodies)
    for above, rows, below in blocks:
        lines += ["", *itertools.chain.from_iterable(map(fitted, above))]
        lines += itertools.chain.from_iterable(itertools.islice(left, len(rows)))
        lines += itertools.chain.from_iterable(map(fitted, below))
    return [*lines, ""]


def _marks(timed: pd.DataFrame) -> dict[str, str]:
    """A mark for each caveat that holds for some rows only; one for all needs none."""
    flags = timed["flags"].str.split()
    there = sorted({flag for row in flags for flag in row})
    some = [flag for flag in there if not all(flag in row for row in flags)]
    return dict(zip(some, _MARKS, strict=False))


def counts(table: pd.DataFrame) -> str:
    """Cases, and of which status, in words."""
    found = table["status"].value_counts()
    return f"{counted(len(table), 'case')}, " + ", ".join(f"{n} {s}" for s, n in found.items())


def plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, which has neither nan nor infinity."""
    import numpy as np

    known = table.astype(object).where(table.notna(), None).replace([np.inf, -np.inf], None)
    return [{str(key): value for key, value in row.items()} for row in known.to_dict("records")]
