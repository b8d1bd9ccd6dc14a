"""Tables and sentences for a terminal, no wider than it.

Cells are wrapped between words, headings first.  Where that is not enough, names with parameters
get a short label (``causal_document#1``), which is explained below the table; then words may be
broken after a slash, too.
"""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEFAULT_WIDTH = 100  # without a terminal
_NUMBER = re.compile(r"(?:<= )?[\d.,]+(?:e[+-]?\d+)?[kmx]?(?: (?:of|/) [\d.,]+)?|tie|inconclusive|")
_SAVING = 4  # characters that a short label saves at least

Rows = Sequence[Mapping[str, Any]]


def terminal_width() -> int:
    """Characters per line."""
    return shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns


@dataclass(frozen=True)
class FittedTable:
    """A table in lines.

    Attributes:
        head: lines of the headings and the rule below them.
        bodies: lines of each row.
        legend: short labels and what they stand for.
        fits: whether it is no wider than requested.
    """

    head: list[str]
    bodies: list[list[str]]
    legend: dict[str, str] = field(default_factory=dict)
    fits: bool = True

    @property
    def lines(self) -> list[str]:
        """All lines, with the legend below a blank one."""
        rows = [line for body in self.bodies for line in body]
        return [*self.head, *rows, *(["", *self.legend_lines] if self.legend else [])]

    @property
    def legend_lines(self) -> list[str]:
        return [
            line for label, name in self.legend.items() for line in wrap(f"{label}: {name}", "  ")
        ]


def fit_table(rows: Rows, width: int | None = None) -> FittedTable:
    """The table of rows with equal keys; empty columns are left out.

    Args:
        width: characters per line; by default those of the terminal.
    """
    columns, numeric = text_columns(rows)
    limit = (width or terminal_width()) - 2 * (len(columns) - 1)
    least = _least_widths(columns, numeric, slashes=False)
    legend: dict[str, str] = {}
    if sum(least.values()) > limit:
        columns, numeric, legend = _shorten(columns, numeric)
        least = _least_widths(columns, numeric, slashes=False)
    slashes = sum(least.values()) > limit
    if slashes:
        least = _least_widths(columns, numeric, slashes=True)
    widths = {key: max(map(len, [key, *cells])) for key, cells in columns.items()}
    if sum(widths.values()) > limit:  # headings are wrapped first, then texts
        widths = {key: max(_longest_word(key), *map(len, columns[key])) for key in columns}
    while sum(widths.values()) > limit:
        shrinkable = [key for key in columns if widths[key] > least[key]]
        if not shrinkable:
            break
        widths[max(shrinkable, key=lambda key: widths[key])] -= 1

    def layout(cells: Mapping[str, str]) -> list[str]:
        wraps = {key: _wrap_cell(text, widths[key], slashes) for key, text in cells.items()}
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
    bodies = [layout({key: columns[key][i] for key in columns}) for i in range(len(rows))]
    texts = [*columns, *(cell for cells in columns.values() for cell in cells)]
    shown = {part for text in texts for part in re.split(r"[\s/]", text)}
    legend = {label: name for label, name in legend.items() if label in shown}
    return FittedTable(head, bodies, legend, sum(widths.values()) <= limit)


def _least_widths(
    columns: Mapping[str, Sequence[str]], numeric: Mapping[str, bool], slashes: bool
) -> dict[str, int]:
    """Characters below which a column is not wrapped: numbers stay whole, and so do words."""
    return {
        key: max(
            _longest_word(key),
            *(len(cell) if numeric[key] else _longest_word(cell, slashes) for cell in cells),
        )
        for key, cells in columns.items()
    }


def _shorten(
    columns: Mapping[str, list[str]], numeric: Mapping[str, bool]
) -> tuple[dict[str, list[str]], dict[str, bool], dict[str, str]]:
    """The columns and headings with short labels for names with parameters, and the legend."""
    texts = [cell for key, cells in columns.items() if not numeric[key] for cell in cells]
    texts += columns
    parts = [part for text in texts for part in re.split(r"[\s/]", text)]
    names = dict.fromkeys(part for part in parts if ":" in part)
    by_base: dict[str, list[str]] = {}
    for name in names:
        by_base.setdefault(name.partition(":")[0], []).append(name)
    plain = set(parts)
    labels = {}
    for base, of_base in by_base.items():
        single = len(of_base) == 1 and base not in plain
        for number, name in enumerate(of_base, start=1):
            label = base if single else f"{base}#{number}"
            if base and len(label) + _SAVING <= len(name):
                labels[name] = label
    headings = {key: _relabel(key, labels) for key in columns}
    shortened = {
        headings[key]: list(cells) if numeric[key] else [_relabel(cell, labels) for cell in cells]
        for key, cells in columns.items()
    }
    numbers = {headings[key]: number for key, number in numeric.items()}
    return shortened, numbers, {label: name for name, label in labels.items()}


def _relabel(text: str, labels: Mapping[str, str]) -> str:
    return "".join(labels.get(part, part) for part in re.split(r"([\s/])", text))


def _pieces(text: str, slashes: bool) -> list[str]:
    """Words, and with ``slashes`` their parts up to a slash."""
    return re.findall(r"[^\s/]*(?:/|\s|$)" if slashes else r"\S*(?:\s|$)", text)


def _longest_word(text: str, slashes: bool = False) -> int:
    return max((len(piece.rstrip()) for piece in _pieces(text, slashes)), default=0)


def _wrap_cell(text: str, width: int, slashes: bool) -> list[str]:
    lines = [""]
    for piece in _pieces(text, slashes):
        if len((lines[-1] + piece).rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def wrap(text: str, indent: str = "") -> list[str]:
    """A sentence wrapped to the width of the terminal, words kept whole, lines after the first
    indented."""
    return textwrap.wrap(
        text, terminal_width(), subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def listing(rows: Rows) -> str:
    """A table for a terminal; with more than two columns, the ``summary`` of a row is below it,
    since a sentence does not fit beside the other columns."""
    below = "summary" if len(rows[0]) > 2 else ""
    hidden = (below, "source")  # JSON has the source too
    table = fit_table([{k: v for k, v in row.items() if k not in hidden} for row in rows])
    lines = list(table.head)
    for row, body in zip(rows, table.bodies, strict=True):
        lines += body
        if row.get(below):
            lines += wrap(f"    {row[below]}", "    ")
    return "\n".join([*lines, *(["", *table.legend_lines] if table.legend else [])])


def _cell_text(value: Any) -> str:
    words = value if isinstance(value, list | tuple) else str(value).split()
    return " ".join(map(str, words))


def text_columns(rows: Rows) -> tuple[dict[str, list[str]], dict[str, bool]]:
    """The columns that are not empty, as texts, and whether each holds numbers."""
    columns = {key: [_cell_text(row[key]) for row in rows] for key in rows[0]}
    columns = {key: cells for key, cells in columns.items() if any(cells)}
    return columns, {key: all(map(_NUMBER.fullmatch, c)) for key, c in columns.items()}


def print_rows(rows: Rows, as_json: bool = False) -> None:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print(listing(rows))
