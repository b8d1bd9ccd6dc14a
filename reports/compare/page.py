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
    rows_by_urgency,
)
from cpbench.reports.page import assets
from cpbench.reports.page.write import filled


def page(found: Sequence[Comparison]) -> str:
    """The page: for each comparison its verdicts, a chart of ratios, a table."""

    tables_js, tables_css = assets.data_tables()
    source = assets.script("loader.js", "compare.js")
    comparisons = [
        {"headline": one.headline, "notes": one.notes, "reading": explanations(one)}
        for one in found
    ]
    return filled(
        "compare.html.j2",
        title=f"Against {Path(found[0].base).name}",
        comparisons=comparisons,
        tables_css=tables_css,
        css=assets.script("page.css"),
        script=source,
        policy=assets.policy(source, beside=False),
        blobs={
            "plotly": assets.plotly(),
            "datatables": tables_js,
            "data": assets.packed_json([_data(one) for one in found]),
        },
    )


def _data(one: Comparison) -> dict[str, Any]:
    rows = display_rows(one)
    ratios = [
        {key: row[key] for key in ("case", "verdict", "ratio", "low", "high")}
        for row in rows_by_urgency(one)
        if not math.isnan(row["low"])
    ]
    return {
        "floor": one.floor,
        "columns": list(rows[0]) if rows else [],
        "rows": [list(row.values()) for row in rows],
        "ratios": ratios,
    }
