"""A history as text, data or a page."""

from __future__ import annotations

import json

from cpbench.reports.history.history import History, data_rows, rows
from cpbench.reports.history.page import render_page
from cpbench.reports.history.series import METRICS
from cpbench.reports.tables.markup import MARKUPS


def render(history: History, form: str) -> str:
    """Render a history as ``table``, ``md``, ``latex``, ``html``, ``csv`` or ``json``."""
    if form == "html":
        return render_page(history)
    if form == "json":
        return json.dumps(data_rows(history), indent=1) + "\n"
    if form == "csv":
        import pandas as pd

        return str(pd.DataFrame(data_rows(history)).to_csv(index=False))
    markup = MARKUPS[form]
    ends = f"{history.names[0]} to {history.names[-1]}"
    title = f"History of {METRICS[history.metric]}: {ends}"
    lines = [*markup.title(title), *markup.paragraph(history.answer), ""]
    if history.common:
        lines += [*markup.paragraph(f"Common to all cases: {history.common}."), ""]
    lines += markup.table(rows(history))
    return markup.document([*lines, *markup.notes(history.notes)])
