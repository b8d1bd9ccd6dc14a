"""Figures of what is traded for what: on the line nothing is better in both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cpbench.core.spec import format_size
from cpbench.reports.figures.kinds import by_mask
from cpbench.reports.figures.sheet import DIM, Group, Sheet, decades, dots
from cpbench.reports.tables.summary import approximate, competing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Point = tuple[float, float]


def pareto(table: pd.DataFrame, sheet: Sheet) -> None:
    """Time against memory at the longest length that the most methods completed; on the line
    nothing is both faster and smaller."""
    both = table[(table["status"] == "ok") & table[["time_ms", "peak_mb"]].notna().all(axis=1)]
    both, length = _longest(both)
    masks = by_mask(both)
    labels = f"ms at {format_size(length)} tokens", "peak MB of a rank"
    panels = sheet.panels(Group(list(masks), *labels), share=False)
    for axes, rows in zip(panels, masks.values(), strict=True):
        middles = rows.groupby("method")[["time_ms", "peak_mb"]].median()
        points = list(zip(middles["time_ms"], middles["peak_mb"], strict=True))
        right, top = middles["time_ms"].max() * 1.12, middles["peak_mb"].max() * 1.12
        front = _front(points)
        _steps(axes, [(front[0][0], top), *front, (right, front[-1][1])])
        for name, ms, mb in middles.itertuples():
            dots(sheet, axes, str(name), [ms], [mb])
        axes.set_xlim(0, right)
        axes.set_ylim(0, top)
        axes.locator_params(nbins=5)
    _key(sheet)


def recoverable(table: pd.DataFrame) -> pd.Series[bool]:
    """Timed rows of operators that choose, and exact ones."""
    chosen = approximate(table) & (table["status"] == "ok") & table["recovered"].notna()
    return competing(table) | (chosen & table["time_ms"].notna())


def quality(table: pd.DataFrame, sheet: Sheet) -> None:
    """Time against the share of full attention that a choice recovers (all of it, of an exact
    method), at the longest length that the most methods completed; on the line nothing both is
    faster and recovers more.

    Raises:
        ValueError: when no operator chose anything.
    """
    table = table[recoverable(table)]
    if not approximate(table).any():
        raise ValueError("no operator that chooses what to attend to was timed")
    table, length = _longest(table)
    table = table.assign(share=table["recovered"].where(approximate(table), 1.0) * 100)
    masks = by_mask(table)
    labels = f"ms at {format_size(length)} tokens", "recovered attention, %"
    panels = sheet.panels(Group(list(masks), *labels), height=2.4)
    panels[0].set_xscale("log")
    low, high = decades(panels[0].xaxis, table["time_ms"].min() / 1.5, table["time_ms"].max() * 1.5)
    for axes, rows in zip(panels, masks.values(), strict=True):
        middles = rows.groupby("method")[["time_ms", "share"]].median()
        points = [
            (ms, -share) for ms, share in zip(middles["time_ms"], middles["share"], strict=True)
        ]
        front = [(ms, -less) for ms, less in _front(points)]
        _steps(axes, [(front[0][0], 0.0), *front, (high, front[-1][1])])
        for name, ms, share in middles.itertuples():
            dots(sheet, axes, str(name), [ms], [share])
    panels[0].set_xlim(low, high)
    panels[0].set_ylim(0, 106)
    _key(sheet)


def _longest(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The rows of the longest length that the most methods completed."""
    kept = table.drop_duplicates(["mask_family", "method", "seq_len"])["seq_len"].tolist()
    length = max(set(kept), key=lambda n: (kept.count(n), n))
    return table[table["seq_len"] == length], int(length)


def _front(points: Iterable[Point]) -> list[Point]:
    """Those that none is below and left of, from left to right."""
    found: list[Point] = []
    for x, y in sorted(points):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def _steps(axes: Axes, ends: list[Point]) -> None:
    axes.plot([x for x, _ in ends], [y for _, y in ends], drawstyle="steps-post", color=DIM,
              linestyle=":", linewidth=1)  # fmt: skip


def _key(sheet: Sheet) -> None:
    from matplotlib.lines import Line2D

    sheet.key("front", Line2D([], [], color=DIM, linestyle=":", linewidth=1))
