"""Files of a recommendation: a page or a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpbench.reports.figures.draw import SUFFIXES
from cpbench.results.store import write_atomically

PAGES = (".html", ".htm")


def check(path: Path) -> None:
    """Check the suffix of an output file.

    Raises:
        ValueError: for one that is not written.
    """
    if path.suffix.lower() not in (*PAGES, *SUFFIXES):
        raise ValueError(
            f"-o {path}: a recommendation is written as {', '.join((PAGES[0], *SUFFIXES))}"
        )


def write(result: dict[str, Any], path: Path) -> None:
    """Write a recommendation to a file, in the form of its suffix.

    Raises:
        ValueError: see :func:`check`; or when a library of the page is not installed.
        OSError: when the file cannot be written.
    """
    check(path)
    if path.suffix.lower() in PAGES:
        from cpbench.reports.recommendation.page import render_page

        write_atomically(path, render_page(result))
        return
    from cpbench.reports.recommendation.figure import draw

    draw(result, path)
