"""Comparisons as text, data or a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpbench.reports.compare.comparison import Comparison, display_rows, explanations
from cpbench.reports.compare.page import render_page
from cpbench.reports.compare.verdicts import COLUMNS
from cpbench.reports.tables.markup import MARKUPS

if TYPE_CHECKING:
    import pandas as pd


def render(comparisons: Sequence[Comparison], form: str) -> str:
    """Render comparisons as ``table``, ``md``, ``latex``, ``html``, ``csv`` or ``json``."""
    if form == "html":
        return render_page(comparisons)
    if form in ("csv", "json"):
        import pandas as pd

        table = pd.concat(
            [c.table.assign(base=c.base, new=c.new) for c in comparisons], ignore_index=True
        )[["base", "new", *COLUMNS]]
        if form == "csv":
            return str(table.to_csv(index=False))
        nullable: pd.DataFrame = table.astype(object).where(table.notna(), None)
        return json.dumps(nullable.to_dict("records"), indent=1) + "\n"
    markup, lines = MARKUPS[form], list[str]()
    for comparison in comparisons:
        lines += markup.title(comparison.headline)
        lines += markup.common(comparison.common)
        rows = display_rows(comparison)
        lines += markup.table(rows) if rows else []
        lines += [*markup.notes([*comparison.notes, *explanations(comparison)]), ""]
    return markup.document(lines[:-1])
