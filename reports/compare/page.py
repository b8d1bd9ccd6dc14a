"""Comparisons as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpbench.reports.compare.comparison import (
    Comparison,
    display_rows,
    explanations,
    rows_by_severity,
)
from cpbench.reports.page import assets
from cpbench.reports.page.write import render_template


def render_page(comparisons: Sequence[Comparison]) -> str:
    """The page: verdicts, a chart of ratios and a table for each comparison."""

    tables_js, tables_css = assets.packed_data_tables()
    source = assets.read_web("loader.js", "compare.js")
    return render_template(
        "compare.html.j2",
        title=f"Compared with {Path(comparisons[0].base).name}",
        comparisons=[
            {
                "headline": c.headline,
                "common": c.common,
                "notes": c.notes,
                "explanations": explanations(c),
            }
            for c in comparisons
        ],
        tables_css=tables_css,
        css=assets.read_web("page.css"),
        script=source,
        policy=assets.security_policy(source, external_samples=False),
        blobs={
            "plotly": assets.packed_plotly(),
            "datatables": tables_js,
            "data": assets.pack_json([_page_data(c) for c in comparisons]),
        },
    )


def _page_data(comparison: Comparison) -> dict[str, Any]:
    rows = display_rows(comparison)
    ratios = [
        {key: row[key] for key in ("case", "verdict", "ratio", "low", "high")}
        for row in rows_by_severity(comparison)
        if not math.isnan(row["low"])
    ]
    return {
        "floor": comparison.floor,
        "columns": list(rows[0]) if rows else [],
        "rows": [list(row.values()) for row in rows],
        "ratios": ratios,
    }
