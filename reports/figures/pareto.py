"""Figures of trade-offs with a Pareto front: memory and attention recall against time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cpbench.core.spec import format_size
from cpbench.reports.figures.kinds import by_mask
from cpbench.reports.figures.sheet import GREY, PanelGroup, Sheet, plot_markers, set_log10_ticks
from cpbench.reports.metrics import Metric
from cpbench.reports.tables.summary import has_result, is_approximate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Point = tuple[float, float]
MAX_LABEL = 12  # characters of a metric with the length on the same line


def pareto(table: pd.DataFrame, sheet: Sheet, axes: tuple[Metric, Metric]) -> None:
    """Draw one metric against another at the longest length that the most methods completed; no
    competing method is better in both than one on the front."""
    columns = [metric.column for metric in axes]
    both = table[(table["status"] == "ok") & table[columns].notna().all(axis=1)]
    both, length = _longest_common_length(both)
    masks = by_mask(both)
    separator = " " if len(axes[0].heading) < MAX_LABEL else "\n"
    labels = f"{axes[0].heading}{separator}at {format_size(length)} tokens", axes[1].heading
    panels = sheet.panels(PanelGroup(list(masks), *labels), share=False)
    for panel, rows in zip(panels, masks.values(), strict=True):
        medians = rows.groupby("method")[columns].median() * [metric.factor for metric in axes]
        competing = medians.loc[rows.loc[rows["competes"], "method"].unique()]
        right, top = (max(medians[column].max() * 1.12, 1e-9) for column in columns)
        signs = [-1 if metric.higher_is_better else 1 for metric in axes]
        front = [
            (signs[0] * x, signs[1] * y)
            for x, y in _pareto_front(
                (signs[0] * x, signs[1] * y) for x, y in competing.itertuples(index=False)
            )
        ]
        if front:
            start = (front[0][0], 0.0 if axes[1].higher_is_better else top)
            end = (0.0 if axes[0].higher_is_better else right, front[-1][1])
            _plot_front(panel, [start, *front, end])
        for name, x, y in medians.itertuples():
            plot_markers(sheet, panel, str(name), [x], [y])
        panel.set_xlim(0, right)
        panel.set_ylim(0, top)
        panel.locator_params(nbins=5)
    _add_front_to_legend(sheet)


def has_recall(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows have an attention recall: timed selectors, and exact methods (all of it)."""
    return has_result(table) & (~is_approximate(table) | table["recovered"].notna())


def quality(table: pd.DataFrame, sheet: Sheet) -> None:
    """Draw time against attention recall (100 % for exact methods) at the longest length that the
    most methods completed; no method is both faster and has a higher recall than one on the front.

    Raises:
        ValueError: when no selector was timed.
    """
    table = table[has_recall(table)]
    if not is_approximate(table).any():
        raise ValueError("no selector (operator that selects what to attend to) was timed")
    table, length = _longest_common_length(table)
    table = table.assign(recall=table["recovered"].where(is_approximate(table), 1.0) * 100)
    masks = by_mask(table)
    labels = f"ms at {format_size(length)} tokens", "attention recall, %"
    panels = sheet.panels(PanelGroup(list(masks), *labels), height=2.4)
    panels[0].set_xscale("log")
    times = table["time_ms"]
    low, high = set_log10_ticks(panels[0].xaxis, times.min() / 1.5, times.max() * 1.5)
    for axes, rows in zip(panels, masks.values(), strict=True):
        medians = rows.groupby("method")[["time_ms", "recall"]].median()
        pairs = zip(medians["time_ms"], medians["recall"], strict=True)
        front = [(ms, -loss) for ms, loss in _pareto_front((ms, -recall) for ms, recall in pairs)]
        _plot_front(axes, [(front[0][0], 0.0), *front, (high, front[-1][1])])
        for name, ms, recall in medians.itertuples():
            plot_markers(sheet, axes, str(name), [ms], [recall])
    panels[0].set_xlim(low, high)
    panels[0].set_ylim(0, 106)
    _add_front_to_legend(sheet)


def _longest_common_length(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The longest of the lengths that the most methods completed, and its rows."""
    lengths = table.drop_duplicates(["mask_family", "method", "seq_len"])["seq_len"].tolist()
    length = max(set(lengths), key=lambda n: (lengths.count(n), n))
    return table[table["seq_len"] == length], int(length)


def _pareto_front(points: Iterable[Point]) -> list[Point]:
    """Points without another below and left of them, from left to right."""
    front: list[Point] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _plot_front(axes: Axes, points: list[Point]) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], drawstyle="steps-post", color=GREY,
              linestyle=":", linewidth=1)  # fmt: skip


def _add_front_to_legend(sheet: Sheet) -> None:
    from matplotlib.lines import Line2D

    line = Line2D([], [], color=GREY, linestyle=":", linewidth=1)
    sheet.add_legend_entry("Pareto front", line)
