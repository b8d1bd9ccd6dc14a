"""Comparisons as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports import assets
from cpbench.reports.page import filled

if TYPE_CHECKING:
    from cpbench.reports.versus import Contrast


def page(found: Sequence[Contrast]) -> str:
    """The page: for each comparison its verdicts, a chart of ratios, a table."""
    from cpbench.reports.versus import reading

    tables_js, tables_css = assets.data_tables()
    source = assets.script("loader.js", "compare.js")
    contrasts = [
        {"headline": one.headline, "notes": one.notes, "reading": reading(one)} for one in found
    ]
    return filled(
        "compare.html.j2",
        title=f"Against {Path(found[0].base).name}",
        contrasts=contrasts,
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


def _data(one: Contrast) -> dict[str, Any]:
    from cpbench.reports.versus import ranked, shown

    rows = shown(one)
    ratios = [
        {key: row[key] for key in ("case", "verdict", "ratio", "low", "high")}
        for row in ranked(one)
        if not math.isnan(row["low"])
    ]
    return {
        "floor": one.floor,
        "columns": list(rows[0]) if rows else [],
        "rows": [list(row.values()) for row in rows],
        "ratios": ratios,
    }
