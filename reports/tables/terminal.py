"""Rows as a table for a terminal, cells wrapped to its width."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

NARROWEST = 14  # a column is not wrapped below this
_NUMBER = re.compile(r"(?:<= )?[\d.,]+(?:e[+-]?\d+)?[kmx]?(?: (?:of|/) [\d.,]+)?|tie|open|")
_PIECE = re.compile(r"[^\s,:/]*(?:[,:/]+\s?|\s|$)")


def row_lines(
    rows: Sequence[Mapping[str, Any]], width: int | None = None, whole_names: bool = False
) -> list[list[str]]:
    """The lines of the head, then those of each row, for a terminal.

    Args:
        width: of the terminal; its own, or 100 where there is none, unless given.
        whole_names: do not wrap the first column.
    """
    columns, align = plain_rows(rows)
    widths = {key: max(map(len, [key, *cells])) for key, cells in columns.items()}
    limit = width or _terminal()
    while sum(widths.values()) + 2 * (len(widths) - 1) > limit:
        shrinking = list(widths)[1:] if whole_names else list(widths)
        widest = max(shrinking, key=lambda key: widths[key])
        if widths[widest] <= max(NARROWEST, len(widest)):
            break  # rather too wide than unreadable
        widths[widest] -= 1

    def laid_out(cells: Mapping[str, str]) -> list[str]:
        wraps = {key: wrapped(text, widths[key]) for key, text in cells.items()}
        lines = []
        for i in range(max(map(len, wraps.values()))):
            parts = [(wrap[i] if i < len(wrap) else "", key) for key, wrap in wraps.items()]
            line = "  ".join(
                text.rjust(widths[key]) if align[key] else text.ljust(widths[key])
                for text, key in parts
            )
            lines.append(line.rstrip())
        return lines

    head = [*laid_out({key: key for key in columns}), "  ".join("-" * n for n in widths.values())]
    return [head, *(laid_out({key: columns[key][i] for key in columns}) for i in range(len(rows)))]


def listing(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for a terminal in which the ``summary`` of a row, where there is one beside several
    columns, is a line below it: there is no room for a sentence beside them."""
    below = "summary" if len(rows[0]) > 2 else ""
    left_out = (below, "source")  # programs get the source too
    shown = [{k: v for k, v in row.items() if k not in left_out} for row in rows]
    head, *bodies = row_lines(shown, whole_names=len(shown[0]) > 1)
    lines = list(head)
    for row, body in zip(rows, bodies, strict=True):
        lines += [*body, *([f"    {row[below]}"] if below in row else [])]
    return "\n".join(lines)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width``, broken after spaces and punctuation where that is possible."""
    lines = [""]
    for piece in _PIECE.findall(text):
        if len((lines[-1] + piece).rstrip()) > width and lines[-1]:
            lines.append("")
        while len(piece.rstrip()) > width:
            cut = piece.rfind("_", 0, width) + 1 or width
            lines[-1:] = [piece[:cut], ""]
            piece = piece[cut:]
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def fitted(text: str) -> list[str]:
    """A sentence as lines of a terminal."""
    return textwrap.wrap(text, _terminal(), break_long_words=False, break_on_hyphens=False)


def _terminal() -> int:
    """Characters of a line."""
    return shutil.get_terminal_size((100, 24)).columns


def _plain(value: Any) -> str:
    words = value if isinstance(value, list | tuple) else str(value).split()
    return " ".join(map(str, words))


def plain_rows(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, list[str]], dict[str, bool]]:
    """The columns that have something in them, as texts, and whether each holds numbers."""
    columns = {key: [_plain(row[key]) for row in rows] for key in rows[0]}
    columns = {key: cells for key, cells in columns.items() if any(cells)}
    return columns, {key: all(map(_NUMBER.fullmatch, c)) for key, c in columns.items()}


def print_rows(rows: Sequence[Mapping[str, Any]], as_json: bool = False) -> None:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print(listing(rows))
