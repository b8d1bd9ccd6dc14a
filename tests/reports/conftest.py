"""The figure of a collection, drawn but not written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from cpbench.reports.collection import Collection
from cpbench.reports.figures import draw as figures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Figure]:
    """Draws a figure and returns it instead of writing it."""

    def draw(kind: str, cases: Collection, *where: str) -> Figure:
        saved: list[Figure] = []
        monkeypatch.setattr(figures, "save", lambda figure, path: saved.append(figure))
        figures.draw(cases, kind, Path("x.svg"), where)
        monkeypatch.undo()
        return saved[0]

    return draw
