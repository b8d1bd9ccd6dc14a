"""A history as text, data or a page."""

from __future__ import annotations

from cpbench.reports.history.history import History, data_rows, rows
from cpbench.reports.history.page import render_page
from cpbench.reports.history.series import METRICS
from cpbench.reports.tables.markup import MARKUPS, data_text


def render(history: History, form: str) -> str:
    """Render a history as ``table``, ``md``, ``latex``, ``html``, ``csv`` or ``json``."""
    if form == "html":
        return render_page(history)
    if form in ("csv", "json"):
        return data_text(data_rows(history), form)
    markup = MARKUPS[form]
    ends = f"{history.names[0]} to {history.names[-1]}"
    title = f"History of {METRICS[history.metric]}: {ends}"
    lines = [*markup.title(title), *markup.paragraph(history.answer), ""]
    lines += markup.common(history.common)
    lines += markup.table(rows(history))
    return markup.document([*lines, *markup.notes(history.notes)])
