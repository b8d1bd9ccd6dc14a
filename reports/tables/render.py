"""Reports as text: tables for a terminal, Markdown or LaTeX, or the data as CSV or JSON."""

from __future__ import annotations

import itertools
import json
from collections import Counter
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
from cpbench.reports.tables import rows as tables
from cpbench.reports.tables.markup import MARKUPS, Markup
from cpbench.reports.tables.mask_seeds import (
    MIN_SEEDS_P95,
    MIN_SEEDS_SIGN_TEST,
    SeedGroup,
    split_seed_groups,
)
from cpbench.reports.tables.selection import break_even_rows, recall_rows
from cpbench.reports.tables.summary import (
    MethodRanking,
    is_approximate,
    is_checked,
    rank_methods,
)
from cpbench.reports.tables.terminal import fit_table, wrap
from cpbench.results.contest import MIN_LAUNCHES, turns_needed
from cpbench.results.record import APPROXIMATE, LAUNCHES_DIFFER, UNCHECKED, UNFINISHED

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("short", "table", "md", "latex", "csv", "json")

_NEVER_CONSTANT = ("mask", "tokens")
_MAX_FAILURES_SHORT = 10
_MARKS = "*†‡§"
FLAG_MEANINGS = {
    "contended": "other processes took processor time: times too high",
    "oversubscribed": "more threads than cores, ranks shared cores: times too high",
    "throttled": "clocks were throttled: times too high",
    "power-capped": "the power limit reduced clocks",
    "nvml-missing": "NVML is missing: throttling is unknown",
    APPROXIMATE: "computes part of attention: not ranked",
    "changed-state": "changed what operators share in a process, see notes in the records",
    "more-threads": "ran more threads than allowed: times too low",
    LAUNCHES_DIFFER: "its launches returned different results for the same inputs: not ranked",
    "async": "its work went on after the call: times too low",
    "memory-gap": "used memory that torch did not allocate: peak too low",
    "untracked-traffic": "sent more than its communicator counted",
    "error-grows": "errors at size are well above those of the small check",
    UNCHECKED: "not checked against float64: not ranked",
    UNFINISHED: "interrupted between its turns; repeat the command to resume",
}
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
        return f"{self.collection.title}: {status_counts(self.collection.table)}"

    @property
    def common_facts(self) -> str:
        """Facts common to all cases, in words; "" for none."""
        first = self.collection.table.iloc[0]
        return describe(first, self.constant_facts) if self.constant_facts else ""

    @property
    def summary(self) -> str:
        return tables.fastest_summary(self.rankings, self.seed_groups)

    @property
    def notes(self) -> list[str]:
        """Explanations, checks, caveats and origins."""
        return [
            *contest_notes(self.rankings),
            *seed_notes(self.seed_groups),
            *check_notes(self.ok_rows),
            *caveat_notes(self.ok_rows, self.marks),
            *origin_notes(self.collection),
        ]


def render(collection: Collection, form: str) -> str:
    """Render a report in one of ``FORMATS``.

    ``csv`` and ``json`` are the tidy table (see ``COLUMNS``).  The others are for people: the
    fastest method per problem, selectors, methods across mask seeds, all other cases, unsupported
    and failed cases, caveats and environments.  ``short`` leaves out the tables of cases.
    """
    table = collection.table
    if form == "csv":
        return str(table.to_csv(index=False))
    if form == "json":
        return json.dumps(json_rows(table), indent=1) + "\n"
    markup, contents = MARKUPS[form], ReportContents.from_collection(collection)
    facts, rate = contents.varying_facts, contents.rate
    lines = markup.title(contents.headline)
    lines += [*markup.paragraph(contents.summary), ""]
    if contents.common_facts:
        lines += [*markup.paragraph(f"Common to all cases: {contents.common_facts}."), ""]
    marks = contents.marks
    fastest = tables.fastest_rows(contents.rankings, facts, rate, marks)
    fastest += tables.fastest_rows_across_seeds(contents.seed_groups, facts, rate, marks)
    lines += _fitting_section("Fastest method per problem", fastest, markup, form)
    lines += _selection_sections(contents, markup, form)
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
    notes = contents.notes
    if form == "short":
        count = sum(row["cases"] for row in unsupported)
        notes += [f"Unsupported: {pluralize(count, 'case')}."] if count else []
        notes.append("All cases: --format table; a page with charts: -o report.html")
    return markup.document([*lines, *markup.notes(notes)])


def contest_notes(rankings: Sequence[MethodRanking]) -> list[str]:
    """Explanations of ties, and of contests with too little evidence."""
    lines, verdicts = [], {ranking.verdict for ranking in rankings}
    if "tie" in verdicts:
        lines.append(
            "tie: no method is faster than all others at the 5 % level, over launches or turns."
        )
    shortages = Counter(
        str(ranking.contest.shortage) for ranking in rankings if ranking.verdict == "inconclusive"
    )
    for shortage, count in shortages.most_common():
        lines.append(f"inconclusive: {pluralize(count, 'problem')} with {shortage}.")
    if shortages:
        lines.append(
            f"More evidence: cpbench run SWEEP --launches {MIN_LAUNCHES}, which adds launches; or "
            f"measured again in turn within one launch, --interleave {turns_needed(2)} --remeasure."
        )
    return lines


def seed_notes(seed_groups: Sequence[SeedGroup]) -> list[str]:
    """Explanations of the tables across mask seeds."""
    if not seed_groups:
        return []
    verdicts = {group.verdict for group in seed_groups if group.compared}
    few = any(group.num_common_seeds < MIN_SEEDS_P95 for group in seed_groups)
    lines = [
        "Across mask seeds: ms is the median, worst the slowest seed; a / b is median / worst."
        + (f" p95 needs {MIN_SEEDS_P95} mask seeds." if few else "")
    ]
    if verdicts - {"uncontested"}:
        lines += [
            "vs best, lead: geometric mean over mask seeds of the ratio of times on the same seed.",
            "at p95, at worst: method with the lowest 95th percentile, or maximum (few seeds).",
        ]
    if "tie" in verdicts:
        lines.append(
            "tie across mask seeds: not significant in a sign test at 5 %, or the geometric mean "
            "disagrees."
        )
    if "inconclusive" in verdicts:
        lines.append(
            f"inconclusive across mask seeds: the sign test needs at least {MIN_SEEDS_SIGN_TEST}."
        )
    return lines


def check_notes(ok_rows: pd.DataFrame) -> list[str]:
    """How many ok cases were checked, their largest error, and what is per rank."""
    lines, errors = [], ok_rows.loc[is_checked(ok_rows), "worst_error"].dropna()
    if len(ok_rows):
        largest = f"; largest relative L2 error {errors.max():.1e}" if len(errors) else ""
        lines.append(
            f"Checked against float64: {len(errors)} of {len(ok_rows)} cases that are ok{largest}."
        )
    if ok_rows["time_ms"].notna().any() and ok_rows["world_size"].max() > 1:
        lines.append("FLOP/s are per rank; ms, peak MB and sent MB are max per rank.")
    return lines


def caveat_notes(ok_rows: pd.DataFrame, marks: dict[str, str]) -> list[str]:
    """Flags of timed cases, counted and explained."""
    counts = Counter(flag for flags in ok_rows["flags"] for flag in flags.split())
    return [
        f"Caveat{' ' + marks[flag] if flag in marks else ''}: {count} of {len(ok_rows)} timed "
        f"cases {'is' if count == 1 else 'are'} {flag} "
        f"({FLAG_MEANINGS.get(flag, 'see the documentation')})."
        for flag, count in counts.most_common()
    ]


def origin_notes(collection: Collection) -> list[str]:
    """Warnings, environments and paths of the records."""
    lines = [f"Warning: {warning}" for warning in collection.warnings]
    ids_by_text: dict[str, list[str]] = {}  # environments of gangs differ in transient facts
    for environment in collection.environments.values():
        device = environment.get("device", {})
        packages = environment.get("packages", {})
        hosts = {str(rank.get("host")) for rank in environment.get("ranks", [])}
        text = (
            f"{', '.join(sorted(hosts)) or environment.get('host')}; "
            f"{device.get('name') or environment.get('processor')}, {environment.get('cores')} "
            f"cores, torch {packages.get('torch')}, cpbench {environment.get('commit') or ''}"
        )
        ids_by_text.setdefault(text, []).append(environment["id"])
    for text, ids in ids_by_text.items():
        more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
        lines.append(f"Environment {ids[0]}{more}: {text}")
    folders = ", ".join(f"{run}/records" for run in collection.runs)
    lines.append(f"Records: {folders}, one JSON per line; columns: cpbench report --columns")
    return lines


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
    """Attention recall and time of selectors, and their break-even lengths."""
    table = contents.collection.table
    recall = recall_rows(table, contents.varying_facts)
    lines = _section_by_problem("Sparse selection, highest recall first", recall, markup, form)
    lengths = break_even_rows(table, contents.varying_facts)
    title = "Sparse selection: break-even length against exact attention"
    return lines + _section_by_problem(title, lengths, markup, form)


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
    table = fit_table([row for _, rows, _ in blocks for row in rows])
    lines, remaining = [*lines, *table.head], iter(table.bodies)
    for above, rows, below in blocks:
        lines += ["", *itertools.chain.from_iterable(map(wrap, above))]
        lines += itertools.chain.from_iterable(itertools.islice(remaining, len(rows)))
        lines += itertools.chain.from_iterable(map(wrap, below))
    return [*lines, *(["", *table.legend_lines] if table.legend else []), ""]


def _caveat_marks(ok_rows: pd.DataFrame) -> dict[str, str]:
    """A mark for each flag that some rows have and others have not."""
    flags_by_row = ok_rows["flags"].str.split()
    flags = sorted({flag for row_flags in flags_by_row for flag in row_flags})
    partial = [flag for flag in flags if not all(flag in row_flags for row_flags in flags_by_row)]
    return dict(zip(partial, _MARKS, strict=False))


def status_counts(table: pd.DataFrame) -> str:
    """Number of cases, in all and by status, in words."""
    counts = table["status"].value_counts()
    return f"{pluralize(len(table), 'case')}, " + ", ".join(f"{n} {s}" for s, n in counts.items())


def json_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, with null for nan and infinity."""
    import numpy as np

    known = table.astype(object).where(table.notna(), None).replace([np.inf, -np.inf], None)
    return [{str(key): value for key, value in row.items()} for row in known.to_dict("records")]
