"""One figure of all cases as tables: one fact down, another across (``report --pivot``)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from cpbench.core.spec import format_size
from cpbench.reports.collection import Collection
from cpbench.reports.labels import RateFormat, three_digits
from cpbench.reports.metrics import parse_metric
from cpbench.reports.tables.markup import MARKS, MARKUPS, data_text
from cpbench.reports.tables.summary import method_names
from cpbench.reports.tables.terminal import fit_table

if TYPE_CHECKING:
    import pandas as pd

# Facts of a case by which tables can be made: their column of the tidy table.
FACTS = {
    "mask": "mask_family", "method": "method", "operator": "operator", "strategy": "strategy",
    "layout": "layout", "placement": "placement", "seq_len": "seq_len", "queries": "queries",
    "phase": "phase",
    "key_lens": "key_lens", "page_size": "page_size",
    "world_size": "world_size", "ranks_per_node": "ranks_per_node", "direction": "direction",
    "dtype": "dtype", "batch": "batch", "num_heads_q": "num_heads_q",
    "num_heads_kv": "num_heads_kv", "head_dim": "head_dim", "head_dim_v": "head_dim_v",
    "inputs": "inputs", "rope": "rope", "seed": "seed", "machine": "machine",
}  # fmt: skip


class Cell(NamedTuple):
    """A figure of a case.

    Attributes:
        value: nan where there is none.
        text: of the value, or the status of a case without one.
        marks: of reasons why the value does not count.
    """

    value: float
    text: str
    marks: str = ""

    @property
    def shown(self) -> str:
        return self.text + self.marks


Block = Mapping[str, Mapping[str, Cell]]  # by value down and value across
_NO_CELL = Cell(math.nan, "")


@dataclass(frozen=True)
class Pivot:
    """Tables of one figure.

    Attributes:
        heading: of the figure, with its unit.
        down, across: keys of ``FACTS``.
        blocks: by what else differs between cases, in words; a cell is a figure or a status.
        notes: what the marks in the tables mean.
    """

    heading: str
    down: str
    across: str
    blocks: Mapping[str, Block]
    notes: list[str]


def make_pivot(collection: Collection, pivot: str, metric: str, baseline: str) -> Pivot:
    """Tables of a metric.

    Cases that differ only in the mask seed are one: their median.  Cases without a value show their
    status; times that do not count (``Record.disqualifications``) are marked.

    Args:
        pivot: ``"down,across"``, two of ``FACTS``.
        metric: see :func:`parse_metric`.
        baseline: a value of either fact: figures are divided by that one's; "" for none.

    Raises:
        ValueError: for anything else.
    """
    down, across = _parse(pivot)
    figure = parse_metric("--metric", metric)
    heading, factor = figure.heading, figure.factor
    if figure.column.endswith("tflops_per_rank"):
        rate = RateFormat(collection.table[figure.column])
        heading = heading.replace("TFLOP/s", rate.unit)
        factor = 1.0 if rate.unit == "TFLOP/s" else 1e3
    table = collection.table.assign(method=method_names(collection.table))
    others = [fact for fact in _other_facts(down, across) if table[FACTS[fact]].nunique() > 1]
    marks: dict[str, str] = {}
    blocks: dict[str, dict[str, dict[str, Cell]]] = {}
    keys = [FACTS[fact] for fact in (*others, down, across)]
    for values, rows in table.groupby(keys, sort=True, dropna=False):
        *rest, row_value, column_value = values
        title = ", ".join(_fact_text(fact, v) for fact, v in zip(others, rest, strict=True))
        cell = _cell(rows, figure.column, factor, marks, figure.timed)
        block = blocks.setdefault(title, {})
        block.setdefault(_value_text(down, row_value), {})[_value_text(across, column_value)] = cell
    cells = [cell for block in blocks.values() for row in block.values() for cell in row.values()]
    if all(math.isnan(cell.value) for cell in cells):
        raise ValueError(f"no case has {heading}")
    if baseline:
        heading = f"{heading}, over {baseline}"
        blocks = {title: _ratios(block, baseline) for title, block in blocks.items()}
        if not any(blocks.values()):
            raise ValueError(f"--baseline {baseline}: {_known_values(table, down, across)}")
    notes = [f"{mark} {reason}" for reason, mark in marks.items()]
    seeds = table.groupby(keys, dropna=False)["draw"].nunique().max()
    if seeds > 1:
        notes.append(f"Medians over up to {seeds} mask seeds.")
    return Pivot(heading, down, across, {t: b for t, b in blocks.items() if b}, notes)


def render(pivot: Pivot, title: str, form: str) -> str:
    """Render tables as ``short``, ``table``, ``md``, ``latex``, ``csv`` or ``json``."""
    if form in ("csv", "json"):
        listed = [
            {"block": block, pivot.down: down, pivot.across: across, "metric": pivot.heading,
             "value": None if math.isnan(cell.value) else cell.value,
             "text": cell.shown}
            for block, cells in pivot.blocks.items()
            for down, by_column in cells.items()
            for across, cell in by_column.items()
        ]  # fmt: skip
        return data_text(listed, form)
    markup = MARKUPS[form]
    lines = markup.title(f"{title}: {pivot.heading}")
    tables = {
        block: _rows(cells, pivot.down, pivot.across) for block, cells in pivot.blocks.items()
    }
    if form in ("short", "table") and not all(fit_table(rows).fits for rows in tables.values()):
        tables = {
            block: _rows(_transposed(cells), pivot.across, pivot.down)
            for block, cells in pivot.blocks.items()
        }
    for block, table in tables.items():
        lines += markup.section(block) if block else []
        lines += markup.table(table)
    return markup.document([*lines, *markup.notes(pivot.notes)])


def _rows(cells: Block, down: str, across: str) -> list[dict[str, str]]:
    """Rows of a table, sizes in order."""
    columns = sorted({column for row in cells.values() for column in row}, key=_number)
    result = []
    for value, row in sorted(cells.items(), key=lambda item: _number(item[0])):
        in_order = {column: row.get(column, _NO_CELL) for column in columns}
        texts = {column: cell.shown for column, cell in in_order.items()}
        result.append({f"{down} \\ {across}": value} | texts)
    return result


def _transposed(cells: Block) -> Block:
    """A block with rows as columns, for a terminal that is too narrow for it."""
    result: dict[str, dict[str, Cell]] = {}
    for down, row in cells.items():
        for across, cell in row.items():
            result.setdefault(across, {})[down] = cell
    return result


def _parse(pivot: str) -> tuple[str, str]:
    parts = [part.strip() for part in pivot.split(",")]
    if len(parts) != 2 or parts[0] == parts[1] or not set(parts) <= set(FACTS):
        raise ValueError(
            f"--pivot {pivot!r}: give two of {', '.join(FACTS)}, e.g. seq_len,operator"
        )
    return parts[0], parts[1]


def _other_facts(down: str, across: str) -> list[str]:
    """Facts that tell tables apart: what a method consists of, unless that is a fact itself."""
    shown = {down, across}
    parts = ("operator", "strategy", "layout", "placement") if "method" in shown else ()
    return [fact for fact in FACTS if fact not in (*shown, "method", *parts)]


def _cell(
    rows: pd.DataFrame, column: str, factor: float, marks: dict[str, str], times: bool
) -> Cell:
    """Text and value of a cell from the rows of its mask seeds."""
    values = rows.loc[rows["status"] == "ok", column].dropna()
    if values.empty:
        statuses = rows["status"].value_counts()
        return Cell(math.nan, str(statuses.index[0]) if (rows["status"] != "ok").any() else "")
    value = statistics.median(values) * factor
    text = f"{value:.1e}" if 0 < abs(value) < 1e-3 else three_digits(value)
    texts = rows.loc[rows["status"] == "ok", "disqualified"].dropna() if times else ()
    reasons = sorted({reason for text in texts for reason in str(text).split()})
    for reason in reasons:
        marks.setdefault(reason, MARKS[len(marks) % len(MARKS)])
    return Cell(value, text, "".join(marks[reason] for reason in reasons))


def _ratios(block: Block, baseline: str) -> dict[str, dict[str, Cell]]:
    """A block divided by the row or the column of the baseline; empty where it has neither.  A
    figure that does not count is no baseline."""
    result: dict[str, dict[str, Cell]] = {}
    for down, row in block.items():
        for across, cell in row.items():
            base = row.get(baseline) or block.get(baseline, {}).get(across)
            if base is not None:
                result.setdefault(down, {})[across] = _ratio(cell, base)
    return result


def _ratio(cell: Cell, base: Cell) -> Cell:
    if math.isnan(cell.value):
        return cell
    if base.marks or not base.value or math.isnan(base.value):
        return _NO_CELL
    ratio = cell.value / base.value
    return Cell(ratio, f"{ratio:.2f}x", cell.marks)


def _known_values(table: pd.DataFrame, down: str, across: str) -> str:
    texts = [
        f"{fact} is one of {', '.join(_value_text(fact, v) for v in table[FACTS[fact]].unique())}"
        for fact in (down, across)
    ]
    return "; ".join(texts)


def _value_text(fact: str, value: Any) -> str:
    if fact in ("seq_len", "queries"):
        return format_size(int(value))
    return "" if value is None or value != value else str(value)


def _fact_text(fact: str, value: Any) -> str:
    text = _value_text(fact, value)
    return (
        text if fact in ("mask", "operator", "direction", "dtype") else f"{fact} {text or 'none'}"
    )


def _number(text: str) -> tuple[float, str]:
    """A key by which sizes are in order, and texts after them."""
    digits, unit = (text[:-1], text[-1]) if text[-1:] in "km" else (text, "")
    if digits.isdigit():
        return float(digits) * {"": 1, "k": 1 << 10, "m": 1 << 20}[unit], ""
    return math.inf, text
