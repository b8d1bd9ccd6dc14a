"""The kinds of figures: what each draws of rows of the tidy table with a column ``method``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import Spec, format_size
from cpbench.reports.figures.sheet import (
    BAD,
    DIM,
    LETTER,
    PAGE,
    SMALL,
    Group,
    Sheet,
    crosses,
    decades,
    dots,
    fixed,
    lines,
    literal,
    multiline,
    powers_of_two,
)
from cpbench.reports.labels import Rate, significant
from cpbench.reports.tables.fastest_grids import Best, winners
from cpbench.reports.tables.mask_seeds import split
from cpbench.reports.tables.summary import answers
from cpbench.reports.tables.terminal import wrapped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

NO_SCALING = "no mask was timed on two numbers of ranks, at one length or at one length a rank"
STATUS = {"ok": "", "unsupported": "refused"} | dict.fromkeys(
    ("wrong", "crash", "timeout", "oom"), "failed"
)
# No dots: one such pattern is 250 KB of SVG.  As many hatches as colours would always go together.
HATCHES = ("", "////", "\\\\\\\\", "----", "||||", "++++")
HATCHED = {"tie": ("////", "tie"), "open": ("----", "open: too few draws to tell")}
MARKS = {"contended": "v", "throttled": "*"}
PIXELS, HATCHED_PIXELS = 1200, 4  # of a lane; of a bar that shows a hatch
LANE, LANES = 0.26, 9.0  # inches: of one, of all at most
CELL = 0.4, 0.62  # inches, at least


def throughput(table: pd.DataFrame, sheet: Sheet) -> None:
    """Rate of a rank by length; a failure is a cross on the baseline."""
    table = table[table["tflops_per_rank"].notna() | (table["status"].map(STATUS) == "failed")]
    unit, scale = _unit(table["tflops_per_rank"])
    rate = table["tflops_per_rank"] * scale
    # A rate is inverse to its time: the ends of the interval change places.
    table = table.assign(
        rate=rate,
        rate_low=rate * table["time_ms"] / table["high_ms"],
        rate_high=rate * table["time_ms"] / table["low_ms"],
    )
    masks = by_mask(table)
    panels = sheet.panels(Group(list(masks), "tokens", f"{unit} of a rank"))
    top = 0.0
    for axes, rows in zip(panels, masks.values(), strict=True):
        top = max(top, lines(sheet, axes, rows, "seq_len", "rate", "rate_low", "rate_high"))
        crosses(sheet, axes, _failed(rows), "seq_len", 0.0, "failed")
    powers_of_two(panels[0], table["seq_len"], sizes=True)
    panels[0].set_ylim(0, top * 1.06)


def memory(table: pd.DataFrame, sheet: Sheet) -> None:
    """Peak beside the inputs by length, below the device's limit; out of memory is a cross on it,
    or on the largest peak where no limit is known."""
    fine = (table["status"] == "ok") & (table["peak_mb"] > 0)
    table = table[fine | (table["status"] == "oom")]
    masks = by_mask(table)
    panels = sheet.panels(Group(list(masks), "tokens", "peak MB of a rank"))
    known = table.loc[fine, "peak_mb"].tolist()
    limits = table["limit_mb"].dropna().tolist()
    top = min(limits) if limits else max(known, default=1.0)
    for axes, rows in zip(panels, masks.values(), strict=True):
        lines(sheet, axes, rows, "seq_len", "peak_mb")
        crosses(sheet, axes, rows[rows["status"] == "oom"], "seq_len", top, "out of memory", -1)
        if limits:
            axes.axhline(top, color=BAD, linestyle="--", linewidth=0.9)
            axes.annotate(
                f"device limit {significant(top / 1e3)} GB", (0.02, top), (0, 4),
                xycoords=("axes fraction", "data"), textcoords="offset points", color=BAD,
                fontsize=SMALL, va="bottom",
            )  # fmt: skip
    powers_of_two(panels[0], table["seq_len"], sizes=True)
    panels[0].set_yscale("log")
    lowest, highest = min([*known, top]), max([*known, top])
    low, high = decades(panels[0].yaxis, lowest, highest)
    panels[0].set_ylim(min(low, lowest / 1.3), max(high, highest * 1.3, 4 * top * bool(limits)))


def scaling(table: pd.DataFrame, sheet: Sheet) -> None:
    """Rate of a rank over that of one rank, or of the fewest, for the same problem (strong) and
    for as many tokens a rank (weak).

    Raises:
        ValueError: when nothing was timed on two numbers of ranks.
    """
    table = table.assign(share=table["seq_len"] / table["world_size"])
    strong = _spread(table, "seq_len", "{} tokens", most_ranks=False)
    weak = _spread(table, "share", "{} tokens a rank", most_ranks=True)
    groups = [
        Group(list(found), "ranks", f"{name} scaling\nefficiency, %")
        for name, found in (("strong", strong), ("weak", weak))
        if found
    ]
    if not groups:
        raise ValueError(NO_SCALING)
    panels, top = sheet.panels(*groups, height=1.8), 100.0
    for axes, rows in zip(panels, [*strong.values(), *weak.values()], strict=True):
        axes.axhline(100, color=DIM, linestyle=":", linewidth=1)
        top = max(top, lines(sheet, axes, rows, "world_size", "efficiency"))
        crosses(sheet, axes, _failed(rows), "world_size", 0.0, "failed")
    sizes = [n for rows in (*strong.values(), *weak.values()) for n in rows["world_size"]]
    powers_of_two(panels[0], sizes, sizes=False)
    panels[0].set_ylim(0, top * 1.1)


def heatmap(table: pd.DataFrame, sheet: Sheet) -> None:
    """The best method by length and ranks, and its lead; ties are hatched."""
    from matplotlib.patches import Patch

    singles, families = split(table)
    family = dict(zip(table["mask"], table["mask_family"], strict=True))
    masks: dict[str, list[Best]] = {}
    for best in winners(answers(singles), families):
        mask = str(best.question["mask"])
        masks.setdefault(family.get(mask, mask), []).append(best)
    lengths = sorted({best.question["seq_len"] for bests in masks.values() for best in bests})
    ranks = sorted({best.question["world_size"] for bests in masks.values() for best in bests})
    columns = max(1, min(3, int(PAGE / (len(ranks) * CELL[1] + 0.35))))
    panels = sheet.panels(
        Group(sorted(masks), "ranks", "tokens"), height=len(lengths) * CELL[0] + 0.55,
        columns=columns, width=len(ranks) * CELL[1] + 0.9,
    )  # fmt: skip
    across = min(columns, len(masks))
    letters = int((sheet.figure.get_figwidth() / across - 0.35) / len(ranks) * 72 / SMALL / LETTER)
    names = _short(table, {best.method for bests in masks.values() for best in bests})
    for axes, (_, bests) in zip(panels, sorted(masks.items()), strict=True):
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        empty = set(itertools.product(range(len(ranks)), range(len(lengths))))
        for best in bests:
            at = ranks.index(best.question["world_size"]), lengths.index(best.question["seq_len"])
            empty.discard(at)
            _cell(sheet, axes, at, best, names[best.method], letters)
        axes.vlines([i + 0.5 for i in range(len(ranks) - 1)], -0.5, len(lengths) - 0.5, "white")
        axes.hlines([i + 0.5 for i in range(len(lengths) - 1)], -0.5, len(ranks) - 0.5, "white")
        for at in sorted(empty):
            axes.text(*at, "–", ha="center", va="center", color=DIM, fontsize=SMALL)
    panels[0].set_xlim(-0.5, len(ranks) - 0.5)
    panels[0].set_ylim(len(lengths) - 0.5, -0.5)
    fixed(panels[0].xaxis, range(len(ranks)), [str(n) for n in ranks])
    fixed(panels[0].yaxis, range(len(lengths)), [format_size(n) for n in lengths])
    verdicts = {best.verdict for bests in masks.values() for best in bests}
    for verdict, (hatch, text) in HATCHED.items():
        if verdict in verdicts:
            sheet.key(text, Patch(facecolor="white", edgecolor=DIM, hatch=hatch, linewidth=0.5))


def roofline(table: pd.DataFrame, sheet: Sheet) -> None:
    """Rate by intensity (medians over draws), below the peaks of matrix products and copies."""
    columns = ["tflops_per_rank", "intensity", "gemm_tflops", "copy_gb_s"]
    rows = table[(table["status"] == "ok") & table[columns].notna().all(axis=1)]
    unit, scale = _unit([*rows["tflops_per_rank"], *rows["gemm_tflops"]])
    peak, copies = float(rows["gemm_tflops"].median()) * scale, float(rows["copy_gb_s"].median())
    slope = copies / 1e3 * scale
    xs, ys = rows["intensity"], rows["tflops_per_rank"] * scale
    left = min(*xs, peak / slope) / 2
    right = max(*xs, peak / slope) * 2
    masks = by_mask(rows)
    labels = "FLOPs for each byte\nof inputs and results", f"{unit} of a rank"
    panels = sheet.panels(Group(list(masks), *labels), height=2.2)
    panels[0].set_xscale("log")
    panels[0].set_yscale("log")
    low, high = decades(panels[0].yaxis, min(*ys, left * slope), max(*ys, peak) * 2.5)
    decades(panels[0].xaxis, left, right)
    panels[0].set_xlim(left, right)
    panels[0].set_ylim(low, high)
    peaks = f"matrix products {significant(peak)} {unit}\ncopies {significant(copies)} GB/s"
    for axes, own in zip(panels, masks.values(), strict=True):
        axes.plot([left, peak / slope, right], [left * slope, peak, peak], color=DIM, linewidth=1.2)
        axes.annotate(peaks, (right, peak), (-2, 2), textcoords="offset points", fontsize=SMALL,
                      color=DIM, ha="right", va="bottom")  # fmt: skip
        middles = own.groupby(["method", "seq_len"])[["intensity", "tflops_per_rank"]].median()
        for name, some in middles.groupby("method", sort=True):
            dots(sheet, axes, str(name), some["intensity"], some["tflops_per_rank"] * scale)


def timeline(table: pd.DataFrame, sheet: Sheet) -> None:
    """How the run went: each case in the lane of the gang that measured it."""
    from matplotlib.patches import Patch

    table = table[(table["started"] > 0) & (table["seconds"] > 0)].sort_values("started")
    lanes = {str(writer): i for i, writer in enumerate(table["writer"].unique())}
    table = table.assign(
        minute=(table["started"] - table["started"].min()) / 60, minutes=table["seconds"] / 60,
        lane=table["writer"].map(lanes), how=table["status"].map(STATUS),
    )  # fmt: skip
    (axes,) = sheet.panels(
        Group([""], "minutes since the start", ""), width=PAGE,
        height=min(len(lanes) * LANE, LANES) + 0.6,
    )  # fmt: skip
    end = float((table["minute"] + table["minutes"]).max())
    pixel = end / PIXELS
    thin = table["minutes"] < pixel
    thinned = table[thin]
    thinned = thinned.assign(minute=thinned["minute"] // pixel * pixel, minutes=pixel)
    shown = [name for name in sheet.looks if name in set(table["method"])]
    bars: dict[tuple[str, str, int, bool], list[tuple[float, float]]] = {}
    # The first of those that began in one pixel stands for all.
    for rows in (table[~thin], thinned.drop_duplicates(["lane", "minute"])):
        columns = (
            rows[column].tolist() for column in ("method", "how", "lane", "minute", "minutes")
        )
        for name, how, lane, minute, minutes in zip(*columns, strict=True):
            wide = minutes > HATCHED_PIXELS * pixel
            bars.setdefault((name, how, lane, wide), []).append((minute, minutes))
    for (name, how, lane, wide), spans in sorted(bars.items()):
        style: dict[str, Any] = {
            "failed": {"facecolor": "white", "edgecolor": BAD, "hatch": "xxxxxx", "linewidth": 0.5},
            "refused": {"facecolor": "#bbbbbb", "linewidth": 0},
            "": {"facecolor": sheet.looks[name].colour, "edgecolor": "white", "linewidth": 0,
                 "hatch": HATCHES[shown.index(name) % len(HATCHES)]},
        }[how]  # fmt: skip
        sheet.key(how or name, Patch(**style))
        if not wide:
            colour = BAD if how == "failed" else style["facecolor"]
            style = {"facecolor": colour, "linewidth": 0}
        axes.broken_barh(spans, (lane - 0.36, 0.72), **style)
    for flag, marker in MARKS.items():
        some = table[table["flags"].str.split().map({flag}.issubset)]
        if len(some):
            (line,) = axes.plot(
                some["minute"] + some["minutes"] / 2, some["lane"] - 0.43, marker=marker,
                color="black", linestyle="", markersize=4.5, clip_on=False,
            )  # fmt: skip
            sheet.key(flag, line)
    axes.set_xlim(0, end * 1.01)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.grid(False, axis="y")
    size = min(SMALL, LANES * 72 / len(lanes))
    fixed(axes.yaxis, range(len(lanes)), [multiline(str(writer), 40) for writer in lanes])
    axes.tick_params(axis="y", labelsize=size, length=0)


def _unit(rates: Sequence[float] | pd.Series[float]) -> tuple[str, float]:
    """TFLOP/s, or GFLOP/s where all rates are below 1, and what to multiply them by."""
    unit = Rate(rates).unit
    return unit, 1.0 if unit == "TFLOP/s" else 1e3


def by_mask(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {str(mask): rows for mask, rows in table.groupby("mask_family", sort=True)}


def _failed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["status"].map(STATUS) == "failed"]


def _spread(
    table: pd.DataFrame, column: str, words: str, most_ranks: bool
) -> dict[str, pd.DataFrame]:
    """For each mask, by its title, the rows of the largest size on two numbers of ranks or more
    (of those on the most numbers, if so asked), with their ``efficiency`` in %; without what runs
    on one rank only, which is what others are measured by."""
    found = {}
    timed = table[(table["status"] == "ok") & table["tflops_per_rank"].notna()]
    for mask, rows in by_mask(table).items():
        own = timed[timed["mask_family"] == mask]
        ranks: dict[float, set[int]] = {}
        for size, count in zip(own[column].tolist(), own["world_size"].tolist(), strict=True):
            ranks.setdefault(float(size), set()).add(count)
        sizes = [size for size in ranks if len(ranks[size]) > 1]
        if not sizes:
            continue
        size = max(sizes, key=lambda size: (len(ranks[size]) if most_ranks else 0, size))
        rows, own = rows[rows[column] == size], own[own[column] == size]
        rows = rows.assign(efficiency=_efficiency(own))
        several = set(rows.loc[rows["world_size"] > 1, "method"])
        whole = format_size(int(size)) if size.is_integer() else f"{size:g}"
        found[f"{mask}\n{words.format(whole)}"] = rows[rows["method"].isin(several)]
    return found


def _efficiency(timed: pd.DataFrame) -> pd.Series[float]:
    """Rate of a rank over that of one rank with the same operator, else over that of the same
    method on the fewest ranks; %, of the same draw."""
    ones = timed[timed["world_size"] == 1]
    ones = ones.sort_values("strategy", key=lambda names: names != "single", kind="stable")
    fewest = timed.sort_values("world_size", kind="stable")
    alone, own = _rates(ones, "operator"), _rates(fewest, "method")
    keys = zip(timed["mask"], timed["operator"], timed["method"], strict=True)
    base = [alone.get((mask, op), own[mask, name]) for mask, op, name in keys]
    return timed["tflops_per_rank"] / base * 100


def _rates(rows: pd.DataFrame, column: str) -> dict[tuple[str, str], float]:
    """The first by mask and another column."""
    first = rows.drop_duplicates(["mask", column])
    keys = zip(first["mask"], first[column], strict=True)
    return dict(zip(keys, first["tflops_per_rank"].tolist(), strict=True))


def _short(table: pd.DataFrame, names: set[str]) -> dict[str, str]:
    """For each method as few words as tell it from the others: its strategy (its operator, where
    it runs alone), with the layout, with the operator too, or all."""
    told = {}
    for _, row in table.drop_duplicates("method").iterrows():
        name = str(row["method"])
        operator, strategy, layout = (
            _bare(str(row[column])) for column in ("operator", "strategy", "layout")
        )
        if name == row["operator"]:
            told[name] = (operator, operator, operator, name)
        else:
            told[name] = (strategy, f"{strategy}/{layout}", f"{strategy}/{layout} {operator}", name)
    found = {}
    for name in names:
        others = [told[other] for other in names if other != name]
        found[name] = next(
            text
            for level, text in enumerate(told[name])
            if all(text != other[level] for other in others) or level == 3
        )
    return found


def _bare(text: str) -> str:
    try:
        return Spec.parse(text).name.rpartition("/")[2]
    except ValueError:
        return text


def _cell(
    sheet: Sheet, axes: Axes, at: tuple[int, int], best: Best, name: str, letters: int
) -> None:
    """Who won, by how much, in a cell of the method's colour."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch, Rectangle

    colour = sheet.looks[best.method].colour
    red, green, blue = to_rgb(colour)
    pale = (1 + red) / 2, (1 + green) / 2, (1 + blue) / 2
    hatch = HATCHED.get(best.verdict, ("",))[0]
    axes.add_patch(
        Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, facecolor=pale, edgecolor=colour, hatch=hatch,
                  linewidth=0)
    )  # fmt: skip
    lead = f"{best.lead:.2f}x" if best.verdict == "won" else best.verdict
    shown = [*wrapped(literal(name), max(letters, 6))[:2], lead]
    axes.text(
        *at, "\n".join(shown), ha="center", va="center", fontsize=SMALL - 0.5, linespacing=1.0,
        bbox={"facecolor": pale, "linewidth": 0, "pad": 0.6} if hatch else None,
    )  # fmt: skip
    sheet.key(best.method, Patch(facecolor=pale, edgecolor="white"))
