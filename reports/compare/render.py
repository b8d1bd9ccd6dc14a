"""Comparisons as text, data or a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpbench.reports.compare.comparison import Comparison, display_rows, explanations
from cpbench.reports.compare.page import page
from cpbench.reports.compare.verdicts import COLUMNS
from cpbench.reports.tables.markup import MARKUPS

if TYPE_CHECKING:
    import pandas as pd


def render(comparisons: Sequence[Comparison], form: str) -> str:
    """Comparisons as ``table``, ``md``, ``latex``, ``html``, ``csv`` or ``json``."""
    if form == "html":
        return page(comparisons)
    if form in ("csv", "json"):
        import pandas as pd

        whole = pd.concat(
            [one.table.assign(base=one.base, new=one.new) for one in comparisons], ignore_index=True
        )[["base", "new", *COLUMNS]]
        if form == "csv":
            return str(whole.to_csv(index=False))
        known: pd.DataFrame = whole.astype(object).where(whole.notna(), None)
        return json.dumps(known.to_dict("records"), indent=1) + "\n"
    markup, lines = MARKUPS[form], list[str]()
    for one in comparisons:
        lines += markup.title(one.headline)
        rows = display_rows(one)
        lines += markup.table(rows) if rows else []
        lines += [*markup.notes([*one.notes, *explanations(one)]), ""]
    return markup.document(lines[:-1])
