"""A history as one self-contained HTML page: a chart for each case."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cpbench.reports.history.history import History, rows
from cpbench.reports.history.series import METRICS
from cpbench.reports.labels import signed_percent
from cpbench.reports.page import assets
from cpbench.reports.page.write import render_template

if TYPE_CHECKING:
    from cpbench.reports.history.series import Series


def render_page(history: History) -> str:
    """The page: the answer, the table of steps, and the series, those with steps first."""
    source = assets.read_web("loader.js", "history.js")
    return render_template(
        "history.html.j2",
        title=f"History of {METRICS[history.metric]}",
        answer=history.answer,
        common=history.common,
        notes=history.notes,
        rows=rows(history),
        css=assets.read_web("page.css"),
        tables_css="",
        script=source,
        policy=assets.security_policy(source, external_samples=False),
        blobs={"plotly": assets.packed_plotly(), "data": assets.pack_json(_page_data(history))},
    )


def _page_data(history: History) -> dict[str, Any]:
    return {
        "metric": METRICS[history.metric],
        "versions": history.names,
        "series": [_series_data(series) for series in history.series],
    }


def _series_data(series: Series) -> dict[str, Any]:
    known = [point if point and point.launches else None for point in series.points]
    return {
        "case": series.case,
        "medians": [point.median if point else None for point in known],
        "lows": [min(point.launches) if point else None for point in known],
        "highs": [max(point.launches) if point else None for point in known],
        "launches": [len(point.launches) if point else 0 for point in known],
        "statuses": [point.status if point else "missing" for point in series.points],
        "steps": [
            {
                "at": step.index,
                "text": signed_percent(step.test.ratio - 1),
                "slower": step.test.ratio > 1,
            }
            for step in series.steps
            if not math.isnan(step.test.ratio)
        ],
    }
