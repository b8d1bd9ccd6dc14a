"""Reports as text: tables for a terminal, Markdown or LaTeX, or the data as CSV or JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.reports.collection import Collection
from cpbench.reports.columns import COLUMNS
from cpbench.reports.labels import (
    FACTS,
    RateFormat,
    describe,
    describe_values,
    fact_values,
    group_by_problem,
    pluralize,
)
from cpbench.reports.mixers import beside
from cpbench.reports.predicted.rows import predicted_rows, prediction_notes
from cpbench.reports.tables import rows as tables
from cpbench.reports.tables.markup import MARKS, MARKUPS, Markup
from cpbench.reports.tables.mask_seeds import (
    SeedGroup,
    split_seed_groups,
)
from cpbench.reports.tables.notes import (
    caveat_notes,
    check_notes,
    contest_notes,
    origin_notes,
    seed_notes,
)
from cpbench.reports.tables.selection import break_even_rows, needle_rows, recall_rows
from cpbench.reports.tables.summary import (
    MethodRanking,
    is_approximate,
    rank_methods,
)
from cpbench.reports.tables.terminal import fit_table, fit_tables, wrap

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("short", "table", "md", "latex", "csv", "json")

_NEVER_CONSTANT = ("mask", "tokens")
_MAX_FAILURES_SHORT = 10
_ALWAYS_MARKED = ("contended", "oversubscribed")
# Lines above the rows, the rows, and lines below them.
Block = tuple[list[str], list[tables.Row], list[str]]


@dataclass(frozen=True)
class ReportContents:
    """Everything that a report shows of a collection.

    Attributes:
        rankings: methods ranked per problem, outside of seed groups.
        seed_groups: methods compared across mask seeds.
        single_mask_rows: ok rows of exact operators outside of seed groups.
        constant_facts, varying_facts: headings of facts that are the same in all cases, and of the
            others.
        ok_rows: rows that are ok.
        marks: marks of caveats, by flag.
        rate: format of rates.
    """

    collection: Collection
    rankings: list[MethodRanking]
    single_mask_rows: pd.DataFrame
    seed_groups: list[SeedGroup]
    constant_facts: list[str]
    varying_facts: list[str]
    ok_rows: pd.DataFrame
    marks: dict[str, str]
    rate: RateFormat

    @classmethod
    def from_collection(cls, collection: Collection) -> ReportContents:
        table = collection.table
        constant_facts = [
            fact
            for fact in FACTS
            if fact not in _NEVER_CONSTANT and tables.is_constant(table, fact)
        ]
        ungrouped, seed_groups = split_seed_groups(table)
        ok_rows = table[table["status"] == "ok"]
        return cls(
            collection=collection,
            rankings=rank_methods(ungrouped),
            single_mask_rows=ungrouped[(ungrouped["status"] == "ok") & ~is_approximate(ungrouped)],
            seed_groups=seed_groups,
            constant_facts=constant_facts,
            varying_facts=[fact for fact in FACTS if fact not in constant_facts],
            ok_rows=ok_rows,
            marks=_caveat_marks(ok_rows),
            rate=RateFormat(ok_rows["tflops_per_rank"]),
        )

    @property
    def headline(self) -> str:
        return f"{self.collection.title}: {self.counts}"

    @property
    def counts(self) -> str:
        """Number of cases by status, and of predictions."""
        counts = [status_counts(self.collection.table)] if len(self.collection.table) else []
        if predicted := len(self.collection.predicted):
            counts.append(f"{pluralize(predicted, 'case')} predicted")
        return "; ".join(counts)

    @property
    def common_facts(self) -> str:
        """Facts common to all cases, in words; "" for none."""
        if not self.constant_facts:
            return ""
        return describe(self.collection.table.iloc[0], self.constant_facts)

    @property
    def summary(self) -> str:
        return tables.fastest_summary(self.rankings, self.seed_groups)

    def notes(self, cases: bool) -> list[str]:
        """Explanations, checks, caveats and origins.

        Args:
            cases: whether the tables of cases are shown.
        """
        return [
            *prediction_notes(self.collection.predicted),
            *contest_notes(self.rankings),
            *seed_notes(self.seed_groups, cases),
            *check_notes(self.ok_rows, cases),
            *caveat_notes(self.ok_rows, self.marks),
            *origin_notes(self.collection),
        ]


def render(collection: Collection, form: str) -> str:
    """Render a report in one of ``FORMATS``.

    ``csv`` and ``json`` are the tidy table (see ``COLUMNS``).  The others are for people: the
    fastest method per problem, selectors, methods across mask seeds, all other cases, unsupported
    and failed cases, caveats and environments.  ``short`` leaves out the tables of cases.
    """
    if form == "csv":
        return str(collection.whole.to_csv(index=False))
    if form == "json":
        return json.dumps(json_rows(collection.whole), indent=1) + "\n"
    table = collection.table
    markup, contents = MARKUPS[form], ReportContents.from_collection(collection)
    facts, rate = contents.varying_facts, contents.rate
    lines = markup.title(contents.headline)
    if len(table):
        lines += [*markup.paragraph(contents.summary), ""]
    lines += markup.common(contents.common_facts)
    marks = contents.marks
    fastest = tables.fastest_rows(contents.rankings, facts, rate, marks)
    fastest += tables.fastest_rows_across_seeds(contents.seed_groups, facts, rate, marks)
    lines += _fitting_section("Fastest method per problem", fastest, markup, form)
    decoding = tables.decoding_rows(table, facts)
    lines += _section_by_problem("Decoding: keys and values read", decoding, markup, form)
    lines += _selection_sections(contents, markup, form)
    predicted = predicted_rows(collection.predicted)
    lines += _section_by_problem("Predicted, fastest first", predicted, markup, form)
    unsupported = tables.unsupported_rows(table)
    if form != "short":
        lines += _seed_sections(contents, markup, form)
        lines += _case_section(contents, markup, form)
        lines += _section("Unsupported", unsupported, markup)
    failures = tables.failed_cases(table)
    if failures:
        lines += markup.section("Failed")
        listed = failures[:_MAX_FAILURES_SHORT] if form == "short" else failures
        for status, case, reason, logs in listed:
            more = f" and {len(logs) - 1} more" if len(logs) > 1 else ""
            lines += markup.failure(status, case, reason, logs[0] if logs else "", more)
        if len(failures) > len(listed):
            lines.append(f"and {len(failures) - len(listed)} more")
        lines.append("")
    notes = contents.notes(form != "short")
    if form == "short":
        count = sum(row["cases"] for row in unsupported)
        notes += [f"Unsupported: {pluralize(count, 'case')}."] if count else []
        if len(table):
            notes.append("All cases: --format table; a page with charts: -o report.html")
    return markup.document([*lines, *markup.notes(notes)])


def explain_columns() -> str:
    """The columns of the tidy table with their meaning, one per line."""
    width = max(map(len, COLUMNS))
    return "\n".join(f"{name:{width}}  {meaning}" for name, meaning in COLUMNS.items()) + "\n"


def _section(title: str, rows: list[dict[str, Any]], markup: Markup) -> list[str]:
    return [*markup.section(title), *markup.table(rows)] if rows else []


def _seed_sections(contents: ReportContents, markup: Markup, form: str) -> list[str]:
    """Times of every method across mask seeds, missing seeds, and costs per rank."""
    times: list[Block] = []
    costs: list[Block] = []
    for group in contents.seed_groups:
        problem = describe_values(fact_values(group.problem, contents.varying_facts))
        above = [problem]
        for heading, rows in tables.seed_blocks(group, contents.rate, contents.marks):
            times.append(([*above, heading], rows, []))
            above = []
        if missing := tables.missing_seed_lines(group):
            times[-1][2].extend(missing)
        if rows := tables.rank_cost_rows(group):
            costs.append(([problem], rows, []))
    lines = _block_section("Across mask seeds, lowest median first", times, markup, form)
    title = "Across mask seeds: memory, load imbalance and traffic per rank"
    return lines + _block_section(title, costs, markup, form)


def _case_section(contents: ReportContents, markup: Markup, form: str) -> list[str]:
    rows = tables.case_rows(
        contents.rankings,
        contents.single_mask_rows,
        contents.varying_facts,
        contents.rate,
        contents.marks,
    )
    title = f"{'Remaining' if contents.seed_groups else 'All'} cases, fastest first"
    return _section_by_problem(title, rows, markup, form)


def _selection_sections(contents: ReportContents, markup: Markup, form: str) -> list[str]:
    """Attention recall and time of selectors, and their break-even lengths; needles found; sequence
    mixers beside attention."""
    table = contents.collection.table
    recall = recall_rows(table, contents.varying_facts)
    lines = _section_by_problem("Sparse selection, highest recall first", recall, markup, form)
    lengths = break_even_rows(table, contents.varying_facts)
    title = "Sparse selection: break-even length against exact attention"
    lines += _section_by_problem(title, lengths, markup, form)
    needles = needle_rows(table, contents.varying_facts)
    lines += _section_by_problem("Needles, most found first", needles, markup, form)
    for title, rows in beside.sections(table, contents.varying_facts):
        lines += _section_by_problem(f"Sequence mixers: {title}", rows, markup, form)
    return lines


def _fitting_section(title: str, rows: list[tables.Row], markup: Markup, form: str) -> list[str]:
    """A table; in a terminal that is too narrow for it, the problem is on a line above its row."""
    if rows and form in ("table", "short") and not fit_table(rows).fits:
        return _section_by_problem(title, rows, markup, form)
    return _section(title, rows, markup)


def _section_by_problem(title: str, rows: list[tables.Row], markup: Markup, form: str) -> list[str]:
    """A table; in a terminal the problem is on a line of its own, for its mask may be long."""
    if form not in ("table", "short"):
        return _section(title, rows, markup)
    blocks: list[Block] = [
        ([problem] if problem else [], cells, []) for problem, cells in group_by_problem(rows)
    ]
    return _block_section(title, blocks, markup, "table")


def _block_section(title: str, blocks: Sequence[Block], markup: Markup, form: str) -> list[str]:
    """Blocks of rows; in a terminal they share one head."""
    if not blocks:
        return []
    lines = markup.section(title)
    if form != "table":
        for above, rows, below in blocks:
            lines += [*itertools.chain.from_iterable((markup.text(line), "") for line in above)]
            lines += markup.table(rows)
            lines += [*markup.notes(below), *([""] if below else [])]
        return lines
    for table in fit_tables([row for _, rows, _ in blocks for row in rows]):
        lines, remaining = [*lines, *table.head], iter(table.bodies)
        for above, rows, below in blocks:
            lines += ["", *itertools.chain.from_iterable(map(wrap, above))]
            lines += itertools.chain.from_iterable(itertools.islice(remaining, len(rows)))
            lines += itertools.chain.from_iterable(map(wrap, below))
        lines += ["", *table.legend_lines, ""] if table.legend else [""]
    return lines


def _caveat_marks(ok_rows: pd.DataFrame) -> dict[str, str]:
    """A mark for each flag that some rows have and others have not, and for times that are too
    high."""
    flags_by_row = ok_rows["flags"].str.split()
    flags = sorted({flag for row_flags in flags_by_row for flag in row_flags})
    marked = [
        flag
        for flag in flags
        if flag in _ALWAYS_MARKED or not all(flag in row_flags for row_flags in flags_by_row)
    ]
    return dict(zip(marked, MARKS, strict=False))


def status_counts(table: pd.DataFrame) -> str:
    """Number of cases, in all and by status, in words."""
    counts = table["status"].value_counts()
    return f"{pluralize(len(table), 'case')}, " + ", ".join(f"{n} {s}" for s, n in counts.items())


def json_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, with null for nan and infinity."""
    import numpy as np

    known = table.astype(object).where(table.notna(), None).replace([np.inf, -np.inf], None)
    return [{str(key): value for key, value in row.items()} for row in known.to_dict("records")]
