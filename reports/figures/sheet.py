"""Building blocks of figures: panels, a legend below them, axes, lines, failure crosses."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import format_size
from cpbench.reports.figures.style import MethodStyle
from cpbench.reports.labels import wrap_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.transforms import Transform

COLUMN_WIDTH, PAGE_WIDTH = 3.4, 7.0  # inches, of a two-column paper
FONT, SMALL_FONT = 8.0, 6.5  # points
CHAR_WIDTH = 0.6  # mean width over the size of a font
GREY, RED = "#666666", "#cc3311"
CROSS_SPACING = 8.5  # points between crosses
MAX_TICKS = 8  # of lengths or ranks
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
SETTINGS: Any = {
    "font.size": FONT, "axes.titlesize": FONT, "axes.labelsize": FONT, "legend.fontsize": FONT - 1,
    "xtick.labelsize": FONT - 1, "ytick.labelsize": FONT - 1, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#dddddd", "grid.linewidth": 0.5, "hatch.linewidth": 0.5,
    "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "cpbench", "pdf.fonttype": 42,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A point of one method, with its interval in y."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class PanelGroup:
    """Panels that belong together: their titles, and the labels of their axes, with units."""

    titles: Sequence[str]
    x: str
    y: str


class Sheet:
    """A figure: its panels, and a legend of what was drawn on them.

    Args:
        styles: of all methods, in the order of the legend.
    """

    def __init__(self, styles: Mapping[str, MethodStyle]) -> None:
        # Figure and canvas directly: pyplot would keep global state and may look for a display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.styles = styles
        self.figure = Figure(layout="constrained")
        self._canvas = FigureCanvasAgg(self.figure)
        self._handles: dict[str, Artist] = {}
        self._panel_width = 0.0  # points, approximate

    def panels(
        self, *groups: PanelGroup, height: float = 1.9, columns: int = 3, share: bool = True,
        width: float = 0.0,
    ) -> list[Axes]:  # fmt: skip
        """Create small multiples; each group starts on a new row.

        Args:
            height: of a row in inches, titles and labels included.
            columns: maximum number.
            share: whether all panels share their axes, whose ticks are then at the edge only.
            width: minimum width of the figure in inches.
        """
        most = max(len(group.titles) for group in groups)
        columns = 2 if most == 4 and columns == 3 else min(columns, most)
        rows = [-(-len(group.titles) // columns) for group in groups]
        self.figure.set_size_inches(
            max(COLUMN_WIDTH if columns == 1 else PAGE_WIDTH, width), sum(rows) * height
        )
        grid = self.figure.add_gridspec(sum(rows), columns)
        title_chars = int(self.figure.get_figwidth() / columns * 72 / (CHAR_WIDTH * FONT)) - 7
        self._panel_width = (self.figure.get_figwidth() - 0.5) / columns * 72 - 15
        panels: list[Axes] = []
        for start, group in zip((sum(rows[:i]) for i in range(len(rows))), groups, strict=True):
            for i, title in enumerate(group.titles):
                row, column = divmod(i, columns)
                first = panels[0] if panels and share else None
                axes = self.figure.add_subplot(
                    grid[start + row, column], sharex=first, sharey=first
                )
                axes.set_title(wrap_label(title, title_chars))
                bottom = not share or i + columns >= len(group.titles)
                left = not share or column == 0
                axes.set_xlabel(group.x if bottom else "")
                axes.set_ylabel(group.y if left else "")
                axes.tick_params(labelbottom=bottom, labelleft=left)
                panels.append(axes)
        return panels

    def tick_spacing(self, values: pd.Series[Any]) -> float:
        """Points between the ticks of a panel at the given values."""
        return self._panel_width / max(values.nunique(), 2)

    def offset_transform(self, axes: Axes, x: float, y: float = 0.0) -> Transform:
        """Data coordinates shifted by the given number of points."""
        from matplotlib.transforms import ScaledTranslation

        return axes.transData + ScaledTranslation(x / 72, y / 72, self.figure.dpi_scale_trans)

    def add_legend_entry(self, name: str, handle: Artist) -> None:
        """Add an entry to the legend, unless its name has one."""
        self._handles.setdefault(name, handle)

    def draw_legend(self) -> None:
        """Draw the legend below the panels, methods first."""
        from matplotlib.font_manager import FontProperties

        names = [name for name in self.styles if name in self._handles]
        names += [name for name in self._handles if name not in self.styles]
        if not names:
            return
        width, size = self.figure.get_figwidth(), FONT - 1
        texts = [wrap_label(name, int((width - 0.7) * 72 / (CHAR_WIDTH * size))) for name in names]
        font = FontProperties(size=size)
        renderer = self._canvas.get_renderer()  # type: ignore[no-untyped-call]
        widest = max(
            renderer.get_text_width_height_descent(line, font, ismath=False)[0]
            for text in texts
            for line in text.splitlines()
        )
        columns = max(1, min(len(names), int(width / (widest / self.figure.dpi + 0.6))))
        columns = -(-len(names) // -(-len(names) // columns))  # rows of the same length
        # Names are set afterwards: a legend leaves out labels that begin with "_".
        legend = self.figure.legend(
            [self._handles[name] for name in names], ["x"] * len(names), loc="outside lower center",
            ncols=columns, frameon=False, handlelength=2.6, columnspacing=1.4, borderaxespad=0.3,
        )  # fmt: skip
        for label, text in zip(legend.get_texts(), texts, strict=True):
            label.set_text(text)
        box = legend.get_window_extent(renderer)
        self.figure.set_figheight(self.figure.get_figheight() + box.height / self.figure.dpi + 0.1)


def printable(text: str) -> str:
    """Text of any origin for a figure: on one line, and valid in XML."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def wrap_label(text: str, chars: int) -> str:
    """A label broken into lines of about ``chars`` characters; its own line breaks are kept."""
    width = max(chars, 8)
    return "\n".join(
        line for part in text.split("\n") for line in wrap_name(printable(part), width)
    )


def method_points(
    rows: pd.DataFrame, x: str, y: str, low: str = "", high: str = ""
) -> dict[str, list[Point]]:
    """Points of each method: median and range over mask seeds, or a single value from ``low`` to
    ``high`` (columns; "" for none)."""
    points: dict[str, list[Point]] = {}
    known = rows[(rows["status"] == "ok") & rows[y].notna()]
    for name, method_rows in known.groupby("method", sort=True):
        for value in sorted(set(method_rows[x].tolist())):
            group = method_rows[method_rows[x] == value]
            ends = float(group[y].min()), float(group[y].max())
            if len(group) == 1 and low and high:
                interval = float(group[low].iloc[0]), float(group[high].iloc[0])
                ends = ends if any(map(math.isnan, interval)) else interval
            median = float(group[y].median())
            points.setdefault(str(name), []).append(Point(float(value), median, *ends))
    return points


def plot_lines(
    sheet: Sheet, axes: Axes, rows: pd.DataFrame, x: str, y: str, low: str = "", high: str = ""
) -> float:
    """Draw a line with markers and error bars for each method, see :func:`method_points`; ranges
    over mask seeds, which are long, are drawn side by side.

    Returns:
        the upper end of the highest bar, which autoscaling ignores.
    """
    points_by_method = method_points(rows, x, y, low, high)
    several_seeds = rows["draw"].nunique() > 1
    count = len(points_by_method)
    spacing = min(2.2, 0.6 * sheet.tick_spacing(rows[x]) / max(count, 1)) if several_seeds else 0.0
    for i, (name, points) in enumerate(points_by_method.items()):
        style = sheet.styles[name]
        # No bar rather than one without length, whose caps would strike through the marker.
        errors = [
            (max(0.0, p.y - p.low), max(0.0, p.high - p.y)) if p.low < p.high else (math.nan,) * 2
            for p in points
        ]
        container = axes.errorbar(
            [p.x for p in points], [p.y for p in points], yerr=list(zip(*errors, strict=True)),
            color=style.colour, marker=style.marker, linestyle=style.dash, linewidth=1.2,
            markerfacecolor="white" if style.hollow else style.colour,
            markersize=4, elinewidth=0.7, capsize=1.8, capthick=0.7,
            transform=sheet.offset_transform(axes, (i - (count - 1) / 2) * spacing),
        )  # fmt: skip
        sheet.add_legend_entry(name, container[0])
    return max((p.high for points in points_by_method.values() for p in points), default=0.0)


def plot_markers(
    sheet: Sheet, axes: Axes, name: str, xs: Iterable[float], ys: Iterable[float]
) -> None:
    """Draw unconnected markers of one method."""
    style = sheet.styles[name]
    face, edge, width = ("white", style.colour, 1.2) if style.hollow else (
        style.colour, "white", 0.4
    )  # fmt: skip
    (line,) = axes.plot(
        list(xs),
        list(ys),
        color=face,
        marker=style.marker,
        linestyle="",
        markersize=6,
        markeredgecolor=edge,
        markeredgewidth=width,
        clip_on=False,
        zorder=3,
    )
    sheet.add_legend_entry(name, line)


def plot_failures(
    sheet: Sheet, axes: Axes, rows: pd.DataFrame, x: str, y: float, label: str, step: int = 1
) -> None:
    """Draw failed cases: the hollow marker of the method, crossed out; several at one x are placed
    side by side, and where there is no room in rows upwards (downwards for a ``step`` of -1)."""
    from matplotlib.lines import Line2D

    per_row = max(1, int(sheet.tick_spacing(rows[x]) * 0.9 / CROSS_SPACING))
    for value in sorted(set(rows[x].tolist())):
        failed = set(rows.loc[rows[x] == value, "method"])
        names = [name for name in sheet.styles if name in failed]
        for i, name in enumerate(names):
            style = sheet.styles[name]
            row, column = divmod(i, per_row)
            in_row = min(per_row, len(names) - row * per_row)
            x_offset = (column - (in_row - 1) / 2) * CROSS_SPACING
            transform = sheet.offset_transform(axes, x_offset, row * CROSS_SPACING * step)
            for marker, size, edge in ((style.marker, 7.5, style.colour), ("x", 4.5, "black")):
                axes.plot(
                    [value], [y], marker=marker, linestyle="", markersize=size, zorder=4,
                    markerfacecolor="white", markeredgecolor=edge, markeredgewidth=0.9,
                    clip_on=False, transform=transform,
                )  # fmt: skip
            (line,) = axes.plot([], [], color=style.colour, marker=style.marker,
                                linestyle=style.dash, markersize=4, linewidth=1.2)  # fmt: skip
            sheet.add_legend_entry(name, line)
    if len(rows):
        cross = Line2D([], [], marker="x", color="black", linestyle="", markersize=6)
        sheet.add_legend_entry(label, cross)


def set_log2_axis(axes: Axes, values: Iterable[float], sizes: bool) -> None:
    """Make the x axis logarithmic, with ticks at measured values, as ``4k`` (sizes) or plain."""
    ticks = sorted({int(value) for value in values})
    axes.set_xscale("log", base=2)
    pad = max((ticks[-1] / ticks[0]) ** 0.07, 1.2)
    axes.set_xlim(ticks[0] / pad, ticks[-1] * pad)
    kept: list[int] = []
    min_distance = math.log(ticks[-1] / ticks[0]) / (MAX_TICKS + 0.5)
    for tick in reversed(ticks):
        if not kept or math.log(kept[-1] / tick) > min_distance:
            kept.append(tick)
    set_ticks(axes.xaxis, kept, [format_size(tick) if sizes else str(tick) for tick in kept])


def set_log10_ticks(axis: Axis, low: float, high: float) -> tuple[float, float]:
    """Set ticks of a logarithmic axis at powers of ten, or with 2 and 5 where these are few.

    Returns:
        the next ticks below ``low`` and above ``high``.
    """
    fine = [m * 10.0**k for k in range(-30, 31) for m in (1, 2, 5)]
    for steps in (fine, fine[::3]):
        first = bisect.bisect_right(steps, low * (1 + 1e-9)) - 1
        last = bisect.bisect_left(steps, high * (1 - 1e-9))
        ticks = steps[first : max(last, first + 1) + 1]
        if len(ticks) <= MAX_TICKS:
            break
    kept = ticks[:: -(-len(ticks) // MAX_TICKS)]
    set_ticks(axis, kept, [_tick_text(t) if ticks[-1] > 1e5 else f"{t:,.10g}" for t in kept])
    return ticks[0], ticks[-1]


def _tick_text(tick: float) -> str:
    """``10⁶`` for powers of ten from 100 on, plain digits for others."""
    power = round(math.log10(tick))
    if power < 2 or not math.isclose(tick, 10.0**power):
        return f"{tick:,.10g}"
    return "10" + str(power).translate(SUPERSCRIPTS)


def set_ticks(axis: Axis, ticks: Sequence[float], labels: Sequence[str]) -> None:
    """Set the ticks of an axis, without minor ones."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FixedFormatter(list(labels)))
    axis.set_minor_locator(NullLocator())
