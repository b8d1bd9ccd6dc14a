"""The figure of predictions: predicted times with their intervals beside measured ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.core.spec import format_size
from cpbench.reports.figures.sheet import PanelGroup, Sheet, set_log2_axis, set_log10_ticks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MEASURED = "measured (filled)"


def predicted(table: pd.DataFrame, sheet: Sheet) -> None:
    """Draw the predicted time of each method by ranks (by length, on one number of ranks), hollow
    with its interval, and the measured time, filled; over mask seeds, medians and the range."""
    by_ranks = table["world_size"].nunique() > 1
    x, other = ("world_size", "seq_len") if by_ranks else ("seq_len", "world_size")
    panels_rows = {}
    for (mask, _), rows in table.groupby(["mask_family", other], sort=True):
        size = rows[other].iloc[0]
        text = f"{format_size(int(size))} tokens" if by_ranks else f"{size} ranks"
        panels_rows[f"{mask}\n{text}"] = rows
    group = PanelGroup(list(panels_rows), "ranks" if by_ranks else "tokens", "ms")
    panels = sheet.panels(group)
    for axes, rows in zip(panels, panels_rows.values(), strict=True):
        for name, points in rows.groupby("method", sort=True):
            _draw_method(sheet, axes, str(name), points, x)
    set_log2_axis(panels[0], table[x], sizes=not by_ranks)
    panels[0].set_yscale("log")
    measured = table["time_ms"].dropna().tolist()
    low, high = (
        min([*table["predicted_low_ms"], *measured]),
        max([*table["predicted_high_ms"], *measured]),
    )
    bottom, top = set_log10_ticks(panels[0].yaxis, low, high)
    panels[0].set_ylim(min(bottom, low / 1.1), max(top, high * 1.1))


def _draw_method(sheet: Sheet, axes: Axes, name: str, points: pd.DataFrame, x: str) -> None:
    style = sheet.styles[name]
    by_x = points.groupby(x)
    predicted_ms = by_x["predicted_ms"].median()
    below = predicted_ms - by_x["predicted_low_ms"].min()
    above = by_x["predicted_high_ms"].max() - predicted_ms
    line: dict[str, Any] = {"color": style.colour, "marker": style.marker, "markersize": 4}
    container = axes.errorbar(
        predicted_ms.index, predicted_ms, yerr=[below, above], linestyle=style.dash,
        linewidth=1.0, elinewidth=0.7, capsize=1.8, capthick=0.7, markerfacecolor="white", **line,
    )  # fmt: skip
    sheet.add_legend_entry(name, container[0])
    measured = points[points["competes"].to_numpy(dtype=bool)]
    if len(measured):
        times = measured.groupby(x)["time_ms"].median()
        axes.plot(times.index, times, linestyle="", **line)
        from matplotlib.lines import Line2D

        sheet.add_legend_entry(
            MEASURED, Line2D([], [], color="black", marker="o", linestyle="", markersize=4)
        )
