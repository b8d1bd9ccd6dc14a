"""Tables for a terminal: aligned columns, headings and cells wrapped to its width."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

MIN_WIDTH = 14  # a column of texts is not wrapped below this, unless all pieces are shorter
_NUMBER = re.compile(r"(?:<= )?[\d.,]+(?:e[+-]?\d+)?[kmx]?(?: (?:of|/) [\d.,]+)?|tie|inconclusive|")
_PIECE = re.compile(r"[^\s,:/]*(?:[,:/]+\s?|\s|$)")
_BREAKS = "_="  # where a piece that is too long is broken


def row_lines(
    rows: Sequence[Mapping[str, Any]], width: int | None = None, whole_names: bool = False
) -> list[list[str]]:
    """Lines of the head, then lines of each row.

    Args:
        width: characters per line; by default those of the terminal, or 100 without one.
        whole_names: do not wrap the first column.
    """
    columns, numeric = text_columns(rows)
    widths = {key: max(map(len, [key, *cells])) for key, cells in columns.items()}
    limit = (width or _terminal_width()) - 2 * (len(widths) - 1)
    if sum(widths.values()) > limit:  # headings are wrapped first, then texts
        widths = {key: max(_heading_width(key), *map(len, columns[key])) for key in columns}
    least = {
        key: widths[key] if numeric[key] else max(_heading_width(key), _min_width(cells))
        for key, cells in columns.items()
    }
    shrinkable = list(columns)[1:] if whole_names else list(columns)
    while sum(widths.values()) > limit:
        shrinkable = [key for key in shrinkable if widths[key] > least[key]]
        if not shrinkable:
            break  # too wide is more readable than broken words
        widths[max(shrinkable, key=lambda key: widths[key])] -= 1

    def layout(cells: Mapping[str, str]) -> list[str]:
        wraps = {key: wrap_text(text, widths[key]) for key, text in cells.items()}
        lines = []
        for i in range(max(map(len, wraps.values()))):
            parts = [(wrap[i] if i < len(wrap) else "", key) for key, wrap in wraps.items()]
            line = "  ".join(
                text.rjust(widths[key]) if numeric[key] else text.ljust(widths[key])
                for text, key in parts
            )
            lines.append(line.rstrip())
        return lines

    head = [*layout({key: key for key in columns}), "  ".join("-" * n for n in widths.values())]
    return [head, *(layout({key: columns[key][i] for key in columns}) for i in range(len(rows)))]


def _heading_width(heading: str) -> int:
    """Characters of the longest word."""
    return max(map(len, heading.split()), default=0)


def _min_width(cells: Sequence[str]) -> int:
    """Characters below which a column of texts is not wrapped."""
    pieces = [piece.rstrip() for cell in cells for piece in _PIECE.findall(cell)]
    parts = [part for piece in pieces for part in re.split(f"(?<=[{_BREAKS}])", piece)]
    return min(MIN_WIDTH, max(map(len, parts)))


def listing(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for a terminal; with more than two columns, the ``summary`` of a row is a line below
    it, since a sentence does not fit beside the other columns."""
    below = "summary" if len(rows[0]) > 2 else ""
    hidden = (below, "source")  # JSON has the source too
    visible = [{k: v for k, v in row.items() if k not in hidden} for row in rows]
    head, *bodies = row_lines(visible, whole_names=len(visible[0]) > 1)
    lines = list(head)
    for row, body in zip(rows, bodies, strict=True):
        lines += [*body, *([f"    {row[below]}"] if below in row else [])]
    return "\n".join(lines)


def wrap_text(text: str, width: int) -> list[str]:
    """Lines of at most ``width``, broken after spaces and punctuation where possible."""
    lines = [""]
    for piece in _PIECE.findall(text):
        if len((lines[-1] + piece).rstrip()) > width and lines[-1]:
            lines.append("")
        while len(piece.rstrip()) > width:
            cut = max(piece.rfind(letter, 0, width) for letter in _BREAKS) + 1 or width
            lines[-1:] = [piece[:cut], ""]
            piece = piece[cut:]
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def wrap_sentence(text: str) -> list[str]:
    """A sentence wrapped to the width of the terminal, words kept whole."""
    return textwrap.wrap(text, _terminal_width(), break_long_words=False, break_on_hyphens=False)


def _terminal_width() -> int:
    """Characters per line."""
    return shutil.get_terminal_size((100, 24)).columns


def _cell_text(value: Any) -> str:
    words = value if isinstance(value, list | tuple) else str(value).split()
    return " ".join(map(str, words))


def text_columns(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, list[str]], dict[str, bool]]:
    """The columns that are not empty, as texts, and whether each holds numbers."""
    columns = {key: [_cell_text(row[key]) for row in rows] for key in rows[0]}
    columns = {key: cells for key, cells in columns.items() if any(cells)}
    return columns, {key: all(map(_NUMBER.fullmatch, c)) for key, c in columns.items()}


def print_rows(rows: Sequence[Mapping[str, Any]], as_json: bool = False) -> None:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print(listing(rows))
