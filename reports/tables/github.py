"""A report as a step summary of GitHub Actions: Markdown within the size that it takes."""

from __future__ import annotations

from collections.abc import Sequence

from cpbench.reports.collection import Collection
from cpbench.reports.labels import pluralize
from cpbench.reports.tables import rows as tables
from cpbench.reports.tables.markup import MARKUPS
from cpbench.reports.tables.render import ReportContents

MAX_BYTES = 60_000  # GitHub takes 1 MiB a step, and shows much less
_MAX_FAILURES = 20


def render_summary(collection: Collection, max_bytes: int = MAX_BYTES) -> str:
    """The answer, the fastest method per problem, failures and notes, the table cut to the size.

    Args:
        max_bytes: of UTF-8, at most.
    """
    contents = ReportContents.from_collection(collection)
    facts, rate, marks = contents.varying_facts, contents.rate, contents.marks
    fastest = tables.fastest_rows(contents.rankings, facts, rate, marks)
    fastest += tables.fastest_rows_across_seeds(contents.seed_groups, facts, rate, marks)
    shown = len(fastest)
    while True:
        text = _render(contents, fastest[:shown], len(fastest) - shown)
        if len(text.encode()) <= max_bytes:
            return text
        if not shown:
            return text.encode()[:max_bytes].decode(errors="ignore")
        shown = shown * 3 // 4


def _render(contents: ReportContents, fastest: Sequence[tables.Row], left_out: int) -> str:
    markup = MARKUPS["md"]
    lines = [*markup.title(contents.headline), f"**{markup.text(contents.summary)}**", ""]
    lines += markup.common(contents.common_facts)
    if fastest:
        lines += [*markup.section("Fastest method per problem"), *markup.table(fastest)]
    if left_out:
        lines += [f"and {pluralize(left_out, 'more problem')}.", ""]
    failures = tables.failed_cases(contents.collection.table)
    if failures:
        lines += markup.section("Failed")
        for status, case, reason, _ in failures[:_MAX_FAILURES]:
            lines += markup.failure(status, case, " ".join(reason.split())[:300], "", "")
        if len(failures) > _MAX_FAILURES:
            lines.append(f"- and {len(failures) - _MAX_FAILURES} more")
        lines.append("")
    lines += ["<details><summary>Notes</summary>", "", *markup.notes(contents.notes(False)), "",
              "</details>"]  # fmt: skip
    return markup.document(lines)
