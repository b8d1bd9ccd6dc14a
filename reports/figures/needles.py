"""Figures of needles: what operators find by depth and length, and by how many there are."""

from __future__ import annotations

import itertools
import math
import sys
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import Spec, format_size
from cpbench.reports.figures.kinds import by_mask
from cpbench.reports.figures.sheet import (
    SMALL_FONT,
    PanelGroup,
    Sheet,
    plot_lines,
    set_log2_axis,
    set_ticks,
)

if TYPE_CHECKING:
    import pandas as pd

COUNTS = {"keys": "keys", "values": "values of a key", "hops": "hops of a chain"}
KIND = "haystack"
DEFAULTS = {"depth": 0.5, "keys": 1, "values": 1, "hops": 1}
COLOURS = "RdYlBu"  # red: missed; for colour-blind readers, and its ends differ in every print
CELL_HEIGHT, MIN_CELL_WIDTH = 0.21, 0.36  # inches
PALE = 25, 80  # per cent between which a cell is pale and its text dark


def has_found(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows say how many needles were found."""
    return (table["status"] == "ok") & table["found"].notna()


def with_facts(table: pd.DataFrame) -> pd.DataFrame:
    """The table with ``depth``, ``keys``, ``values`` and ``hops`` of the inputs of each row, and
    without them in ``inputs``: what rows of one chart may differ in."""
    specs = [Spec.parse(text) for text in table["inputs"]]
    facts: dict[str, Any] = {
        name: [spec.kwargs.get(name, default) if spec.name == KIND else default for spec in specs]
        for name, default in DEFAULTS.items()
    }
    rest = [
        str(Spec.of(spec.name, **{k: v for k, v in spec.kwargs.items() if k not in DEFAULTS}))
        if spec.name == KIND
        else str(spec)
        for spec in specs
    ]
    return table.assign(**facts, inputs=rest)


def _with_needles(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the methods that have found or missed needles, by mask; a line on stderr says
    which have not, and why."""
    several = table["mask_family"].nunique() > 1
    names = table["method"] + (" on " + table["mask_family"] if several else "")
    shown = names.isin(names[has_found(table)])
    statuses = table[~shown].groupby(names[~shown], sort=True)["status"].unique()
    if len(statuses):
        listed = ", ".join(f"{name} ({', '.join(sorted(of))})" for name, of in statuses.items())
        print(f"cpbench: not drawn, since no case is ok: {listed}", file=sys.stderr)
    return table[shown]


def depths(table: pd.DataFrame, sheet: Sheet) -> None:
    """Draw the share of needles found by length and depth, a panel for each method and mask: of
    single needles, if there are some; means over what else differs."""
    single = (table[list(COUNTS)] == 1).all(axis=1)
    table = _with_needles(table[single] if (single & has_found(table)).any() else table)
    several = table["mask_family"].nunique() > 1
    present = set(zip(table["method"], table["mask_family"], strict=True))
    pairs = [
        (method, mask)
        for mask in sorted(set(table["mask_family"]))
        for method in sheet.styles
        if (method, mask) in present
    ]
    titles = [f"{method}\n{mask}" if several else method for method, mask in pairs]
    lengths, rows = sorted(set(table["seq_len"])), sorted(set(table["depth"]))
    columns = max(1, min(3, int(7.0 / (len(lengths) * MIN_CELL_WIDTH + 0.6))))
    panels = sheet.panels(
        PanelGroup(titles, "tokens", "depth, %"),
        height=len(rows) * CELL_HEIGHT + 0.75 + 0.15 * several, columns=columns,
    )  # fmt: skip
    found = table.groupby(["method", "mask_family", "seq_len", "depth"])["found"].mean() * 100
    image = None
    for axes, pair in zip(panels, pairs, strict=True):
        cells = [
            [float(found.get((*pair, n, depth), float("nan"))) for n in lengths] for depth in rows
        ]
        image = axes.imshow(cells, cmap=COLOURS, vmin=0, vmax=100, aspect="auto")
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                text = "–" if math.isnan(value) else f"{value:.0f}"
                dark = math.isnan(value) or PALE[0] <= value <= PALE[1]
                axes.text(x, y, text, ha="center", va="center", fontsize=SMALL_FONT,
                          color="black" if dark else "white")  # fmt: skip
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    set_ticks(panels[0].xaxis, range(len(lengths)), [format_size(int(n)) for n in lengths])
    set_ticks(panels[0].yaxis, range(len(rows)), [f"{depth * 100:.3g}" for depth in rows])
    assert image is not None
    bar = sheet.figure.colorbar(image, ax=panels, fraction=0.03, pad=0.02, aspect=30)
    bar.set_label("needles found, %")
    bar.outline.set_visible(False)


def counts(table: pd.DataFrame, sheet: Sheet) -> None:
    """Draw the share of queries that find all they ask for, by the number of keys, of values and of
    hops: a panel for each and each mask, at the longest length that has the most numbers; means
    over the depths that do.

    Raises:
        ValueError: when no number varies.
    """
    panels_rows, table = {}, _with_needles(table)
    for (mask, of_mask), (name, label) in itertools.product(by_mask(table).items(), COUNTS.items()):
        others = [other for other in COUNTS if other != name]
        alone = of_mask[(of_mask[others] == 1).all(axis=1)]
        numbers = alone.groupby("seq_len")[name].nunique()
        if (numbers > 1).any():
            length = numbers[numbers == numbers.max()].index.max()
            rows = alone[alone["seq_len"] == length]
            per_depth = rows.groupby("depth")[name].nunique()
            common = per_depth.index[per_depth == per_depth.max()]
            title = f"{mask}\n{label}, {format_size(int(length))} tokens"
            panels_rows[title] = name, rows[rows["depth"].isin(common)]
    if not panels_rows:
        raise ValueError("no keys, values or hops of needles were counted at one length")
    panels = sheet.panels(
        PanelGroup(list(panels_rows), "number of them", "all found, % of queries"), height=2.1
    )
    for axes, (name, rows) in zip(panels, panels_rows.values(), strict=True):
        mean = rows.groupby(["method", name], as_index=False)["solved"].mean()
        mean = mean.assign(solved=mean["solved"] * 100, status="ok", draw="")
        plot_lines(sheet, axes, mean, name, "solved")
    most = [n for name, rows in panels_rows.values() for n in rows[name]]
    set_log2_axis(panels[0], most, sizes=False)
    panels[0].set_ylim(0, 106)
