"""Figures of needles for a page, as pictures: they compare inputs, which its filters keep apart."""

from __future__ import annotations

import base64
import contextlib
import io
import tempfile
from pathlib import Path

from cpbench.reports.collection import Collection
from cpbench.reports.figures import draw, needles

TITLES = {
    "needles": "Found by depth and length",
    "needle_counts": "All found, by the number of keys, values and hops",
}


def needle_figures(collection: Collection) -> list[tuple[str, str, str]]:
    """Title, note and picture (a data URI) of each figure that there are needles for."""
    if not needles.has_found(collection.table).any():
        return []
    figures = []
    for kind, title in TITLES.items():
        with tempfile.TemporaryDirectory() as folder:
            path, note = Path(folder) / "figure.png", io.StringIO()
            try:
                with contextlib.redirect_stderr(note):
                    draw.draw(collection, kind, path, [])
            except ValueError:  # no number of needles varies
                continue
            picture = base64.b64encode(path.read_bytes()).decode()
        notes = [
            line.removeprefix("cpbench: ").removeprefix("several problems match; ")
            for line in note.getvalue().splitlines()
        ]
        figures.append((title, "; ".join(notes), f"data:image/png;base64,{picture}"))
    return figures
