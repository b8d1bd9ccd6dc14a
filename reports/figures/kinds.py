"""Kinds of figures: each draws rows of the tidy table, with a column ``method``, on a sheet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import Spec, format_size
from cpbench.reports.figures.sheet import (
    CHAR_WIDTH,
    GREY,
    PAGE_WIDTH,
    RED,
    SMALL_FONT,
    PanelGroup,
    Sheet,
    plot_failures,
    plot_lines,
    plot_markers,
    printable,
    set_log2_axis,
    set_log10_ticks,
    set_ticks,
    wrap_label,
)
from cpbench.reports.labels import RateFormat, three_digits, wrap_name
from cpbench.reports.tables.fastest_grids import FastestMethod, fastest_methods
from cpbench.reports.tables.mask_seeds import split_seed_groups
from cpbench.reports.tables.summary import rank_methods

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

NO_SCALING = "no mask was timed on two numbers of ranks, at one length or one length per rank"
STATUS_LABELS = {"ok": "", "unsupported": "unsupported"} | dict.fromkeys(
    ("wrong", "crash", "timeout", "oom"), "failed"
)
# No dots: one such pattern is 250 KB of SVG.  Fewer hatches than colours, so that pairs vary.
HATCHES = ("", "////", "\\\\\\\\", "----", "||||", "++++")
VERDICT_HATCHES = {
    "tie": ("////", "tie"),
    "inconclusive": ("----", "inconclusive: too few launches, turns or mask seeds"),
}  # fmt: skip
FLAG_MARKERS = {"contended": "v", "throttled": "*"}
LANE_PIXELS, MIN_HATCHED_PIXELS = 1200, 4  # width of a lane; of a bar that shows a hatch
LANE_HEIGHT, MAX_LANES_HEIGHT = 0.26, 9.0  # inches
MIN_CELL = 0.4, 0.62  # inches, height and width


def throughput(table: pd.DataFrame, sheet: Sheet) -> None:
    """Draw the rate per rank by length; a failure is a cross on the baseline."""
    failed = table["status"].map(STATUS_LABELS) == "failed"
    table = table[table["tflops_per_rank"].notna() | failed]
    unit, scale = _rate_unit(table["tflops_per_rank"])
    rate = table["tflops_per_rank"] * scale
    # A rate is inverse to its time: the ends of the interval change places.
    table = table.assign(
        rate=rate,
        rate_low=rate * table["time_ms"] / table["high_ms"],
        rate_high=rate * table["time_ms"] / table["low_ms"],
    )
    masks = by_mask(table)
    panels = sheet.panels(PanelGroup(list(masks), "tokens", f"{unit} per rank"))
    top = 0.0
    for axes, rows in zip(panels, masks.values(), strict=True):
        top = max(top, plot_lines(sheet, axes, rows, "seq_len", "rate", "rate_low", "rate_high"))
        plot_failures(sheet, axes, _failed(rows), "seq_len", 0.0, "failed")
    set_log2_axis(panels[0], table["seq_len"], sizes=True)
    panels[0].set_ylim(0, top * 1.06)


def memory(table: pd.DataFrame, sheet: Sheet) -> None:
    """Draw the peak excluding the inputs by length, and the device limit; out of memory is a cross
    on the limit, or on the largest peak where no limit is known."""
    measured = (table["status"] == "ok") & (table["peak_mb"] > 0)
    table = table[measured | (table["status"] == "oom")]
    masks = by_mask(table)
    panels = sheet.panels(PanelGroup(list(masks), "tokens", "peak MB, max per rank"))
    peaks = table.loc[measured, "peak_mb"].tolist()
    limits = table["limit_mb"].dropna().tolist()
    top = min(limits) if limits else max(peaks, default=1.0)
    for axes, rows in zip(panels, masks.values(), strict=True):
        plot_lines(sheet, axes, rows, "seq_len", "peak_mb")
        oom = rows[rows["status"] == "oom"]
        plot_failures(sheet, axes, oom, "seq_len", top, "out of memory", -1)
        if limits:
            axes.axhline(top, color=RED, linestyle="--", linewidth=0.9)
            axes.annotate(
                f"device limit {three_digits(top / 1e3)} GB", (0.02, top), (0, 4),
                xycoords=("axes fraction", "data"), textcoords="offset points", color=RED,
                fontsize=SMALL_FONT, va="bottom",
            )  # fmt: skip
    set_log2_axis(panels[0], table["seq_len"], sizes=True)
    panels[0].set_yscale("log")
    lowest, highest = min([*peaks, top]), max([*peaks, top])
    low, high = set_log10_ticks(panels[0].yaxis, lowest, highest)
    panels[0].set_ylim(min(low, lowest / 1.3), max(high, highest * 1.3, 4 * top * bool(limits)))


def scaling(table: pd.DataFrame, sheet: Sheet) -> None:
    """Draw the rate per rank over that of one rank, or of the fewest, for the same problem (strong)
    and for the same number of tokens per rank (weak).

    Raises:
        ValueError: when nothing was timed on two numbers of ranks.
    """
    table = table.assign(tokens_per_rank=table["seq_len"] / table["world_size"])
    strong = _scaling_rows(table, "seq_len", "{} tokens", most_ranks=False)
    weak = _scaling_rows(table, "tokens_per_rank", "{} tokens per rank", most_ranks=True)
    groups = [
        PanelGroup(list(rows_by_title), "ranks", f"{name} scaling\nefficiency, %")
        for name, rows_by_title in (("strong", strong), ("weak", weak))
        if rows_by_title
    ]
    if not groups:
        raise ValueError(NO_SCALING)
    panels, top = sheet.panels(*groups, height=1.8), 100.0
    for axes, rows in zip(panels, [*strong.values(), *weak.values()], strict=True):
        axes.axhline(100, color=GREY, linestyle=":", linewidth=1)
        top = max(top, plot_lines(sheet, axes, rows, "world_size", "efficiency"))
        plot_failures(sheet, axes, _failed(rows), "world_size", 0.0, "failed")
    sizes = [n for rows in (*strong.values(), *weak.values()) for n in rows["world_size"]]
    set_log2_axis(panels[0], sizes, sizes=False)
    panels[0].set_ylim(0, top * 1.1)


def heatmap(table: pd.DataFrame, sheet: Sheet) -> None:
    """Draw the fastest method by length and ranks, with its lead; ties are hatched."""
    from matplotlib.patches import Patch

    ungrouped, seed_groups = split_seed_groups(table)
    family = dict(zip(table["mask"], table["mask_family"], strict=True))
    masks: dict[str, list[FastestMethod]] = {}
    for fastest in fastest_methods(rank_methods(ungrouped), seed_groups):
        mask = str(fastest.problem["mask"])
        masks.setdefault(family.get(mask, mask), []).append(fastest)
    cells = [fastest for mask_cells in masks.values() for fastest in mask_cells]
    lengths = sorted({fastest.problem["seq_len"] for fastest in cells})
    ranks = sorted({fastest.problem["world_size"] for fastest in cells})
    columns = max(1, min(3, int(PAGE_WIDTH / (len(ranks) * MIN_CELL[1] + 0.35))))
    panels = sheet.panels(
        PanelGroup(sorted(masks), "ranks", "tokens"), height=len(lengths) * MIN_CELL[0] + 0.55,
        columns=columns, width=len(ranks) * MIN_CELL[1] + 0.9,
    )  # fmt: skip
    panel_inches = sheet.figure.get_figwidth() / min(columns, len(masks)) - 0.35
    cell_chars = int(panel_inches / len(ranks) * 72 / SMALL_FONT / CHAR_WIDTH)
    names = _short_names(table, {fastest.method for fastest in cells})
    for axes, (_, mask_cells) in zip(panels, sorted(masks.items()), strict=True):
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        empty = set(itertools.product(range(len(ranks)), range(len(lengths))))
        for fastest in mask_cells:
            column = ranks.index(fastest.problem["world_size"])
            position = column, lengths.index(fastest.problem["seq_len"])
            empty.discard(position)
            _draw_cell(sheet, axes, position, fastest, names[fastest.method], cell_chars)
        axes.vlines([i + 0.5 for i in range(len(ranks) - 1)], -0.5, len(lengths) - 0.5, "white")
        axes.hlines([i + 0.5 for i in range(len(lengths) - 1)], -0.5, len(ranks) - 0.5, "white")
        for position in sorted(empty):
            axes.text(*position, "–", ha="center", va="center", color=GREY, fontsize=SMALL_FONT)
    panels[0].set_xlim(-0.5, len(ranks) - 0.5)
    panels[0].set_ylim(len(lengths) - 0.5, -0.5)
    set_ticks(panels[0].xaxis, range(len(ranks)), [str(n) for n in ranks])
    set_ticks(panels[0].yaxis, range(len(lengths)), [format_size(n) for n in lengths])
    verdicts = {fastest.verdict for fastest in cells}
    for verdict, (hatch, label) in VERDICT_HATCHES.items():
        if verdict in verdicts:
            patch = Patch(facecolor="white", edgecolor=GREY, hatch=hatch, linewidth=0.5)
            sheet.add_legend_entry(label, patch)


def roofline(table: pd.DataFrame, sheet: Sheet) -> None:
    """Draw the rate by intensity (medians over mask seeds) and the measured roofs."""
    columns = ["tflops_per_rank", "intensity", "gemm_tflops", "copy_gb_s"]
    rows = table[(table["status"] == "ok") & table[columns].notna().all(axis=1)]
    unit, scale = _rate_unit([*rows["tflops_per_rank"], *rows["gemm_tflops"]])
    peak, copy = float(rows["gemm_tflops"].median()) * scale, float(rows["copy_gb_s"].median())
    slope = copy / 1e3 * scale
    xs, ys = rows["intensity"], rows["tflops_per_rank"] * scale
    left = min(*xs, peak / slope) / 2
    right = max(*xs, peak / slope) * 2
    masks = by_mask(rows)
    labels = "FLOPs per byte\nof inputs and results", f"{unit} per rank"
    panels = sheet.panels(PanelGroup(list(masks), *labels), height=2.2)
    panels[0].set_xscale("log")
    panels[0].set_yscale("log")
    low, high = set_log10_ticks(panels[0].yaxis, min(*ys, left * slope), max(*ys, peak) * 2.5)
    set_log10_ticks(panels[0].xaxis, left, right)
    panels[0].set_xlim(left, right)
    panels[0].set_ylim(low, high)
    roofs = f"matrix product {three_digits(peak)} {unit}\ncopy {three_digits(copy)} GB/s"
    for axes, mask_rows in zip(panels, masks.values(), strict=True):
        ridge = peak / slope
        axes.plot([left, ridge, right], [left * slope, peak, peak], color=GREY, linewidth=1.2)
        axes.annotate(roofs, (right, peak), (-2, 2), textcoords="offset points",
                      fontsize=SMALL_FONT, color=GREY, ha="right", va="bottom")  # fmt: skip
        by_length = mask_rows.groupby(["method", "seq_len"])[["intensity", "tflops_per_rank"]]
        for name, points in by_length.median().groupby("method", sort=True):
            rates = points["tflops_per_rank"] * scale
            plot_markers(sheet, axes, str(name), points["intensity"], rates)


def timeline(table: pd.DataFrame, sheet: Sheet) -> None:
    """Draw the run over time: each case as a bar in the lane of the gang that measured it."""
    from matplotlib.patches import Patch

    table = table[(table["started"] > 0) & (table["seconds"] > 0)].sort_values("started")
    lanes = {str(writer): i for i, writer in enumerate(table["writer"].unique())}
    table = table.assign(
        minute=(table["started"] - table["started"].min()) / 60, minutes=table["seconds"] / 60,
        lane=table["writer"].map(lanes), label=table["status"].map(STATUS_LABELS),
    )  # fmt: skip
    (axes,) = sheet.panels(
        PanelGroup([""], "minutes since the start", ""), width=PAGE_WIDTH,
        height=min(len(lanes) * LANE_HEIGHT, MAX_LANES_HEIGHT) + 0.6,
    )  # fmt: skip
    end = float((table["minute"] + table["minutes"]).max())
    pixel = end / LANE_PIXELS
    thin = table["minutes"] < pixel
    thin_rows = table[thin]
    thin_rows = thin_rows.assign(minute=thin_rows["minute"] // pixel * pixel, minutes=pixel)
    methods = [name for name in sheet.styles if name in set(table["method"])]
    bars: dict[tuple[str, str, int, bool], list[tuple[float, float]]] = {}
    # Of the cases that began within one pixel, the first is drawn.
    for rows in (table[~thin], thin_rows.drop_duplicates(["lane", "minute"])):
        columns = (
            rows[column].tolist() for column in ("method", "label", "lane", "minute", "minutes")
        )
        for name, label, lane, minute, minutes in zip(*columns, strict=True):
            wide = minutes > MIN_HATCHED_PIXELS * pixel
            bars.setdefault((name, label, lane, wide), []).append((minute, minutes))
    for (name, label, lane, wide), spans in sorted(bars.items()):
        patch: dict[str, Any] = {
            "failed": {"facecolor": "white", "edgecolor": RED, "hatch": "xxxxxx", "linewidth": 0.5},
            "unsupported": {"facecolor": "#bbbbbb", "linewidth": 0},
            "": {"facecolor": sheet.styles[name].colour, "edgecolor": "white", "linewidth": 0,
                 "hatch": HATCHES[methods.index(name) % len(HATCHES)]},
        }[label]  # fmt: skip
        sheet.add_legend_entry(label or name, Patch(**patch))
        if not wide:
            colour = RED if label == "failed" else patch["facecolor"]
            patch = {"facecolor": colour, "linewidth": 0}
        axes.broken_barh(spans, (lane - 0.36, 0.72), **patch)
    for flag, marker in FLAG_MARKERS.items():
        flagged = table[table["flags"].str.split().map({flag}.issubset)]
        if len(flagged):
            (line,) = axes.plot(
                flagged["minute"] + flagged["minutes"] / 2, flagged["lane"] - 0.43, marker=marker,
                color="black", linestyle="", markersize=4.5, clip_on=False,
            )  # fmt: skip
            sheet.add_legend_entry(flag, line)
    axes.set_xlim(0, end * 1.01)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.grid(False, axis="y")
    size = min(SMALL_FONT, MAX_LANES_HEIGHT * 72 / len(lanes))
    set_ticks(axes.yaxis, range(len(lanes)), [wrap_label(str(writer), 40) for writer in lanes])
    axes.tick_params(axis="y", labelsize=size, length=0)


def _rate_unit(rates: Sequence[float] | pd.Series[float]) -> tuple[str, float]:
    """TFLOP/s, or GFLOP/s where all rates are below 1, and its factor."""
    unit = RateFormat(rates).unit
    return unit, 1.0 if unit == "TFLOP/s" else 1e3


def by_mask(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows by mask without its seed."""
    return {str(mask): rows for mask, rows in table.groupby("mask_family", sort=True)}


def _failed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["status"].map(STATUS_LABELS) == "failed"]


def _scaling_rows(
    table: pd.DataFrame, column: str, title: str, most_ranks: bool
) -> dict[str, pd.DataFrame]:
    """For each mask, by panel title, the rows of one size with their ``efficiency`` in %: the
    largest size timed on two numbers of ranks or more (``most_ranks``: on the most numbers).
    Methods that run on one rank only are left out; they are the baseline."""
    rows_by_title = {}
    timed = table[(table["status"] == "ok") & table["tflops_per_rank"].notna()]
    for mask, rows in by_mask(table).items():
        mask_timed = timed[timed["mask_family"] == mask]
        pairs = zip(mask_timed[column].tolist(), mask_timed["world_size"].tolist(), strict=True)
        ranks_by_size: dict[float, set[int]] = {}
        for size, world_size in pairs:
            ranks_by_size.setdefault(float(size), set()).add(world_size)
        sizes = [size for size, ranks in ranks_by_size.items() if len(ranks) > 1]
        if not sizes:
            continue
        size = max(sizes, key=lambda size: (len(ranks_by_size[size]) if most_ranks else 0, size))
        rows, mask_timed = rows[rows[column] == size], mask_timed[mask_timed[column] == size]
        rows = rows.assign(efficiency=_efficiency(mask_timed))
        multi_rank = set(rows.loc[rows["world_size"] > 1, "method"])
        size_text = format_size(int(size)) if size.is_integer() else f"{size:g}"
        panel_title = f"{mask}\n{title.format(size_text)}"
        rows_by_title[panel_title] = rows[rows["method"].isin(multi_rank)]
    return rows_by_title


def _efficiency(timed: pd.DataFrame) -> pd.Series[float]:
    """Rate per rank, in % of that of one rank with the same operator, if that competes, else of
    that of the same method on the fewest ranks; with the same mask seed."""
    one_rank = timed[(timed["world_size"] == 1) & timed["competes"]]
    one_rank = one_rank.sort_values("strategy", key=lambda x: x != "single", kind="stable")
    fewest_ranks = timed.sort_values("world_size", kind="stable")
    of_operator = _first_rates(one_rank, "operator")
    of_method = _first_rates(fewest_ranks, "method")
    keys = zip(timed["mask"], timed["operator"], timed["method"], strict=True)
    baseline = [of_operator.get((mask, op), of_method[mask, name]) for mask, op, name in keys]
    return timed["tflops_per_rank"] / baseline * 100


def _first_rates(rows: pd.DataFrame, column: str) -> dict[tuple[str, str], float]:
    """Rate of the first row by mask and another column."""
    first = rows.drop_duplicates(["mask", column])
    keys = zip(first["mask"], first[column], strict=True)
    return dict(zip(keys, first["tflops_per_rank"].tolist(), strict=True))


def _short_names(table: pd.DataFrame, names: set[str]) -> dict[str, str]:
    """The shortest unambiguous name of each method: its strategy (its operator, on one rank), with
    the layout, with the operator too, or the full name."""
    candidates = {}
    for _, row in table.drop_duplicates("method").iterrows():
        name = str(row["method"])
        operator, strategy, layout = (
            _base_name(str(row[column])) for column in ("operator", "strategy", "layout")
        )
        if name == row["operator"]:
            candidates[name] = (operator, operator, operator, name)
        else:
            with_layout = f"{strategy}/{layout}"
            candidates[name] = (strategy, with_layout, f"{with_layout} {operator}", name)
    short = {}
    for name in names:
        others = [candidates[other] for other in names if other != name]
        short[name] = next(
            text
            for level, text in enumerate(candidates[name])
            if all(text != other[level] for other in others) or level == 3
        )
    return short


def _base_name(text: str) -> str:
    try:
        return Spec.parse(text).name.rpartition("/")[2]
    except ValueError:
        return text


def _draw_cell(
    sheet: Sheet, axes: Axes, position: tuple[int, int], fastest: FastestMethod, name: str,
    chars: int,
) -> None:  # fmt: skip
    """Draw the name of the fastest method and its lead in a cell of the method's colour."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch, Rectangle

    x, y = position
    colour = sheet.styles[fastest.method].colour
    red, green, blue = to_rgb(colour)
    pale = (1 + red) / 2, (1 + green) / 2, (1 + blue) / 2
    hatch = VERDICT_HATCHES.get(fastest.verdict, ("",))[0]
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=pale, edgecolor=colour, hatch=hatch,
                  linewidth=0)
    )  # fmt: skip
    lead = f"{fastest.lead:.2f}x" if fastest.verdict == "won" else fastest.verdict
    lines = [*wrap_name(printable(name), max(chars, 6))[:2], lead]
    axes.text(
        x, y, "\n".join(lines), ha="center", va="center", fontsize=SMALL_FONT - 0.5,
        linespacing=1.0, bbox={"facecolor": pale, "linewidth": 0, "pad": 0.6} if hatch else None,
    )  # fmt: skip
    sheet.add_legend_entry(fastest.method, Patch(facecolor=pale, edgecolor="white"))
