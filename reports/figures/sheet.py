"""What figures are made of: small multiples, a legend below them, axes, lines, crosses."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import format_size
from cpbench.reports.figures.style import Look
from cpbench.reports.tables.terminal import wrapped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.transforms import Transform

COLUMN, PAGE = 3.4, 7.0  # inches: one column of a paper, and both
FONT, SMALL = 8.0, 6.5  # points
LETTER = 0.6  # mean width over the size of a font
DIM, BAD = "#666666", "#cc3311"
CROSS = 8.5  # points between crosses
TICKS = 8  # at most, of lengths or ranks
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
    """Of one method: y at x, from low to high."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """Panels that belong together, and what their axes are, with units."""

    titles: Sequence[str]
    x: str
    y: str


class Sheet:
    """A figure: its panels, and a legend of what was drawn on them.

    Args:
        looks: of every method, in the order of the legend.
    """

    def __init__(self, looks: Mapping[str, Look]) -> None:
        # Figure and canvas directly: pyplot would keep global state and may look for a display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.looks = looks
        self.figure = Figure(layout="constrained")
        self._canvas = FigureCanvasAgg(self.figure)
        self._keys: dict[str, Artist] = {}
        self._panel = 0.0  # width in points, about

    def panels(
        self, *groups: Group, height: float = 1.9, columns: int = 3, share: bool = True,
        width: float = 0.0,
    ) -> list[Axes]:  # fmt: skip
        """Small multiples, each group from a new row on.

        Args:
            height: of a row in inches, titles and labels included.
            columns: at most.
            share: whether all have the same axes, whose numbers then are at the edge only.
            width: of the figure in inches, at least.
        """
        most = max(len(group.titles) for group in groups)
        columns = 2 if most == 4 and columns == 3 else min(columns, most)
        rows = [-(-len(group.titles) // columns) for group in groups]
        self.figure.set_size_inches(
            max(COLUMN if columns == 1 else PAGE, width), sum(rows) * height
        )
        grid = self.figure.add_gridspec(sum(rows), columns)
        letters = int(self.figure.get_figwidth() / columns * 72 / (LETTER * FONT)) - 7
        self._panel = (self.figure.get_figwidth() - 0.5) / columns * 72 - 15
        made: list[Axes] = []
        for start, group in zip((sum(rows[:i]) for i in range(len(rows))), groups, strict=True):
            for i, title in enumerate(group.titles):
                row, column = divmod(i, columns)
                first = made[0] if made and share else None
                axes = self.figure.add_subplot(
                    grid[start + row, column], sharex=first, sharey=first
                )
                axes.set_title(multiline(title, letters))
                below = not share or i + columns >= len(group.titles)
                beside = not share or column == 0
                axes.set_xlabel(group.x if below else "")
                axes.set_ylabel(group.y if beside else "")
                axes.tick_params(labelbottom=below, labelleft=beside)
                made.append(axes)
        return made

    def room(self, values: pd.Series[Any]) -> float:
        """Points between the ticks of a panel at such values."""
        return self._panel / max(values.nunique(), 2)

    def aside(self, axes: Axes, x: float, y: float = 0.0) -> Transform:
        """Moves what is drawn on axes by so many points."""
        from matplotlib.transforms import ScaledTranslation

        return axes.transData + ScaledTranslation(x / 72, y / 72, self.figure.dpi_scale_trans)

    def key(self, name: str, handle: Artist) -> None:
        """Explain something in the legend, once."""
        self._keys.setdefault(name, handle)

    def finish(self) -> None:
        """Put the legend below the panels: methods first."""
        from matplotlib.font_manager import FontProperties

        names = [name for name in self.looks if name in self._keys]
        names += [name for name in self._keys if name not in self.looks]
        if not names:
            return
        width, size = self.figure.get_figwidth(), FONT - 1
        texts = [multiline(name, int((width - 0.7) * 72 / (LETTER * size))) for name in names]
        font = FontProperties(size=size)
        renderer = self._canvas.get_renderer()  # type: ignore[no-untyped-call]
        widest = max(
            renderer.get_text_width_height_descent(line, font, ismath=False)[0]
            for text in texts
            for line in text.splitlines()
        )
        columns = max(1, min(len(names), int(width / (widest / self.figure.dpi + 0.6))))
        columns = -(-len(names) // -(-len(names) // columns))  # rows of the same length
        # Names are set afterwards: a legend leaves out what begins with "_".
        legend = self.figure.legend(
            [self._keys[name] for name in names], ["x"] * len(names), loc="outside lower center",
            ncols=columns, frameon=False, handlelength=2.6, columnspacing=1.4, borderaxespad=0.3,
        )  # fmt: skip
        for shown, text in zip(legend.get_texts(), texts, strict=True):
            shown.set_text(text)
        box = legend.get_window_extent(renderer)
        self.figure.set_figheight(self.figure.get_figheight() + box.height / self.figure.dpi + 0.1)


def literal(text: str) -> str:
    """A name from outside as a figure can show it: on one line, and fit for XML."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def multiline(text: str, letters: int) -> str:
    """A name, broken where it is longer; a line of ours stays one."""
    lines = [line for part in text.split("\n") for line in wrapped(literal(part), max(letters, 8))]
    return "\n".join(lines)


def series(
    rows: pd.DataFrame, x: str, y: str, low: str = "", high: str = ""
) -> dict[str, list[Point]]:
    """Points of each method: the median over draws and their range, or one value from ``low`` to
    ``high`` (columns; "" for none)."""
    found: dict[str, list[Point]] = {}
    known = rows[(rows["status"] == "ok") & rows[y].notna()]
    for name, own in known.groupby("method", sort=True):
        for at in sorted(set(own[x].tolist())):
            group = own[own[x] == at]
            ends = float(group[y].min()), float(group[y].max())
            if len(group) == 1 and low and high:
                told = float(group[low].iloc[0]), float(group[high].iloc[0])
                ends = ends if any(map(math.isnan, told)) else told
            middle = float(group[y].median())
            found.setdefault(str(name), []).append(Point(float(at), middle, *ends))
    return found


def lines(
    sheet: Sheet, axes: Axes, rows: pd.DataFrame, x: str, y: str, low: str = "", high: str = ""
) -> float:
    """A line with markers and bars for each method, see :func:`series`; the bars of draws, which
    are long, a little beside each other.

    Returns:
        the upper end of the highest bar; axes do not see it themselves.
    """
    found = series(rows, x, y, low, high)
    drawn = rows["draw"].nunique() > 1
    apart = min(2.2, 0.6 * sheet.room(rows[x]) / max(len(found), 1)) if drawn else 0.0
    for i, (name, points) in enumerate(found.items()):
        look = sheet.looks[name]
        # No bar rather than one without length, whose caps would strike through the marker.
        errors = [
            (max(0.0, p.y - p.low), max(0.0, p.high - p.y)) if p.low < p.high else (math.nan,) * 2
            for p in points
        ]
        shown = axes.errorbar(
            [p.x for p in points], [p.y for p in points], yerr=list(zip(*errors, strict=True)),
            color=look.colour, marker=look.marker, linestyle=look.dash, linewidth=1.2, markersize=4,
            elinewidth=0.7, capsize=1.8, capthick=0.7,
            transform=sheet.aside(axes, (i - (len(found) - 1) / 2) * apart),
        )  # fmt: skip
        sheet.key(name, shown[0])
    return max((p.high for points in found.values() for p in points), default=0.0)


def dots(sheet: Sheet, axes: Axes, name: str, xs: Iterable[float], ys: Iterable[float]) -> None:
    """Markers of one method, in no order."""
    look = sheet.looks[name]
    (drawn,) = axes.plot(
        list(xs), list(ys), color=look.colour, marker=look.marker, linestyle="", markersize=6,
        markeredgecolor="white", markeredgewidth=0.4, clip_on=False, zorder=3,
    )  # fmt: skip
    sheet.key(name, drawn)


def crosses(
    sheet: Sheet, axes: Axes, rows: pd.DataFrame, x: str, y: float, word: str, step: int = 1
) -> None:
    """Where a method could not run: its marker, hollow and crossed out, beside those of others, or
    above them (below for a ``step`` of -1) where there is no room."""
    from matplotlib.lines import Line2D

    across = max(1, int(sheet.room(rows[x]) * 0.9 / CROSS))
    for at in sorted(set(rows[x].tolist())):
        there = set(rows.loc[rows[x] == at, "method"])
        names = [name for name in sheet.looks if name in there]
        for i, name in enumerate(names):
            look = sheet.looks[name]
            beside, row = i % across, i // across
            abreast = min(across, len(names) - row * across)
            aside = sheet.aside(axes, (beside - (abreast - 1) / 2) * CROSS, row * CROSS * step)
            for marker, size, edge in ((look.marker, 7.5, look.colour), ("x", 4.5, "black")):
                axes.plot(
                    [at], [y], marker=marker, linestyle="", markersize=size, zorder=4,
                    markerfacecolor="white", markeredgecolor=edge, markeredgewidth=0.9,
                    clip_on=False, transform=aside,
                )  # fmt: skip
            (line,) = axes.plot([], [], color=look.colour, marker=look.marker, linestyle=look.dash,
                                markersize=4, linewidth=1.2)  # fmt: skip
            sheet.key(name, line)
    if len(rows):
        sheet.key(word, Line2D([], [], marker="x", color="black", linestyle="", markersize=6))


def powers_of_two(axes: Axes, values: Iterable[float], sizes: bool) -> None:
    """A logarithmic x axis with ticks where something was measured, as ``4k`` or plain."""
    ticks = sorted({int(value) for value in values})
    axes.set_xscale("log", base=2)
    pad = max((ticks[-1] / ticks[0]) ** 0.07, 1.2)
    axes.set_xlim(ticks[0] / pad, ticks[-1] * pad)
    shown: list[int] = []
    for tick in reversed(ticks):
        if not shown or math.log(shown[-1] / tick) > math.log(ticks[-1] / ticks[0]) / (TICKS + 0.5):
            shown.append(tick)
    fixed(axes.xaxis, shown, [format_size(tick) if sizes else str(tick) for tick in shown])


def decades(axis: Axis, low: float, high: float) -> tuple[float, float]:
    """Ticks of a logarithmic axis at powers of ten, or with 2 and 5 where there are few.

    Returns:
        the next ticks below ``low`` and above ``high``.
    """
    fine = [m * 10.0**k for k in range(-30, 31) for m in (1, 2, 5)]
    for steps in (fine, fine[::3]):
        first = bisect.bisect_right(steps, low * (1 + 1e-9)) - 1
        last = bisect.bisect_left(steps, high * (1 - 1e-9))
        ticks = steps[first : max(last, first + 1) + 1]
        if len(ticks) <= TICKS:
            break
    shown = ticks[:: -(-len(ticks) // TICKS)]
    fixed(axis, shown, [_power(tick) if ticks[-1] > 1e5 else f"{tick:,.10g}" for tick in shown])
    return ticks[0], ticks[-1]


def _power(tick: float) -> str:
    """``10⁶``; the first ones and others in plain digits."""
    power = round(math.log10(tick))
    if power < 2 or not math.isclose(tick, 10.0**power):
        return f"{tick:,.10g}"
    return "10" + str(power).translate(SUPERSCRIPTS)


def fixed(axis: Axis, ticks: Sequence[float], labels: Sequence[str]) -> None:
    """These ticks and no others."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FixedFormatter(list(labels)))
    axis.set_minor_locator(NullLocator())
