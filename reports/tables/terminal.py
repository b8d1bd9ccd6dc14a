"""Tables and sentences for a terminal, no wider than it.

Cells are wrapped between words, headings first.  Where that is not enough, names with parameters
get a short label (``causal_document#1``), which is explained below the table; then words may be
broken after a slash, too.  Where there is no other form (:func:`fit_tables`), they are also broken
inside names, after a dot or an underscore, and columns that do not fit even so follow in further
tables.
"""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

DEFAULT_WIDTH = 100  # without a terminal
_NUMBER = re.compile(r"(?:<= )?[\d.,]+(?:e[+-]?\d+)?[kmx]?(?: (?:of|/) [\d.,]+)?|tie|inconclusive|")
_SAVING = 4  # characters that a short label saves at least
# Where cells are broken, in further places where a table is too wide.
_BREAKS = (r"(?<=\s)", r"(?<=[\s/])", r"(?<=[\s/])|(?<=[a-z][._])(?=[a-z])")

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
    width = width or terminal_width()
    columns, numeric = text_columns(rows)
    legend: dict[str, str] = {}
    if _total(_least_widths(columns, numeric, _BREAKS[0])) > width:
        columns, numeric, legend = _shorten(columns, numeric)
    return _lay_out(columns, numeric, legend, width, _BREAKS[:2])


def fit_tables(rows: Rows, width: int | None = None) -> list[FittedTable]:
    """The table of rows with equal keys; where it does not fit, with names broken inside, or
    several tables with the first column and some of the others each, in order, and the legend below
    the last."""
    if (table := fit_table(rows, width)).fits:
        return [table]
    width = width or terminal_width()
    columns, numeric, legend = _shorten(*text_columns(rows))
    if (table := _lay_out(columns, numeric, legend, width, _BREAKS)).fits:
        return [table]
    least = _least_widths(columns, numeric, _BREAKS[1])  # names stay whole where they can
    first, *others = columns
    parts = [[first]]
    for key in others:
        if _total({name: least[name] for name in (*parts[-1], key)}) > width and parts[-1][1:]:
            parts.append([first])
        parts[-1].append(key)
    tables = [
        _lay_out({key: columns[key] for key in part}, numeric, legend, width, _BREAKS)
        for part in parts
    ]
    shown = {label for table in tables for label in table.legend}
    legend = {label: name for label, name in legend.items() if label in shown}
    tables = [replace(table, legend={}) for table in tables]
    return [*tables[:-1], replace(tables[-1], legend=legend)]


def table_lines(rows: Rows) -> list[str]:
    """The lines of :func:`fit_tables`, with blank ones between tables."""
    first, *others = fit_tables(rows)
    return [*first.lines, *(line for table in others for line in ("", *table.lines))]


def _total(widths: Mapping[str, int]) -> int:
    """Characters of a line."""
    return sum(widths.values()) + 2 * (len(widths) - 1)


def _lay_out(
    columns: Mapping[str, list[str]],
    numeric: Mapping[str, bool],
    legend: dict[str, str],
    width: int,
    allowed: Sequence[str],
) -> FittedTable:
    """The table of columns, broken where that is allowed; of the legend what they show."""
    for breaks in allowed:
        least = _least_widths(columns, numeric, breaks)
        if _total(least) <= width:
            break
    widths = {key: max(map(len, [key, *cells])) for key, cells in columns.items()}
    if _total(widths) > width:  # headings are wrapped first, then texts
        widths = {key: max(_longest_word(key), *map(len, columns[key])) for key in columns}
    while _total(widths) > width:
        shrinkable = [key for key in columns if widths[key] > least[key]]
        if not shrinkable:
            break
        widths[max(shrinkable, key=lambda key: widths[key])] -= 1

    def layout(cells: Mapping[str, str]) -> list[str]:
        wraps = {key: _wrap_cell(text, widths[key], breaks) for key, text in cells.items()}
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
    cells_of_rows = zip(*columns.values(), strict=True)
    bodies = [layout(dict(zip(columns, cells, strict=True))) for cells in cells_of_rows]
    texts = [*columns, *(cell for cells in columns.values() for cell in cells)]
    shown = {part for text in texts for part in re.split(r"[\s/]", text)}
    legend = {label: name for label, name in legend.items() if label in shown}
    return FittedTable(head, bodies, legend, _total(widths) <= width)


def _least_widths(
    columns: Mapping[str, Sequence[str]], numeric: Mapping[str, bool], breaks: str
) -> dict[str, int]:
    """Characters below which a column is not wrapped: numbers stay whole, and so do words."""
    return {
        key: max(
            _longest_word(key),
            *(len(cell) if numeric[key] else _longest_word(cell, breaks) for cell in cells),
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


def _longest_word(text: str, breaks: str = _BREAKS[0]) -> int:
    return max(len(piece.rstrip()) for piece in re.split(breaks, text))


def _wrap_cell(text: str, width: int, breaks: str) -> list[str]:
    lines = [""]
    for piece in re.split(breaks, text):
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
    table, *others = fit_tables([{k: v for k, v in row.items() if k not in hidden} for row in rows])
    lines = list(table.head)
    for row, body in zip(rows, table.bodies, strict=True):
        lines += body
        if row.get(below):
            lines += wrap(f"    {row[below]}", "    ")
    lines += ["", *table.legend_lines] if table.legend else []
    return "\n".join([*lines, *(line for other in others for line in ("", *other.lines))])


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
