"""A recommendation as a figure: parts of the time, and times by number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.figures.draw import save
from cpbench.reports.figures.sheet import SETTINGS, PanelGroup, Sheet, set_log2_axis, wrap_label
from cpbench.reports.figures.style import COLOURS, method_styles
from cpbench.reports.recommendation import text
from cpbench.reports.recommendation.page import PARTS, lines_by_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 12  # methods that are drawn
NAMES = {"attention": "attention", "side": "merges and copies", "exposed": "waiting"}
FILLS = dict(zip(PARTS, (COLOURS[0], COLOURS[3], COLOURS[1]), strict=True))
HATCHES = dict(zip(PARTS, ("", "////", "----"), strict=True))


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the figure.

    Raises:
        OSError: when the file cannot be written.
    """
    import matplotlib

    rows = [row for row in text.of_ranks(result) if "breakdown" in row][:MOST]
    series = lines_by_ranks(result) if len(result["by_ranks"]) > 1 else []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(SETTINGS)
        sheet = Sheet(method_styles(one["strategy"] for one in series))
        groups = [PanelGroup([f"{result['ranks']} ranks"], "ms", "")]
        groups += [PanelGroup(["by number of ranks"], "ranks", "ms")] if series else []
        panels = sheet.panels(*groups, height=max(1.9, 0.6 + 0.26 * len(rows)), share=False)
        _draw_parts(sheet, panels[0], rows)
        if series:
            _draw_ranks(sheet, panels[1], series)
        sheet.draw_legend()
        save(sheet.figure, path)


def _draw_parts(sheet: Sheet, axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Stacked bars with the interval of the prediction, the fastest on top."""
    places = range(len(rows))
    starts = [0.0] * len(rows)
    for part in PARTS:
        widths = [row["breakdown"][part] * 1e3 for row in rows]
        bars = axes.barh(places, widths, left=starts, height=0.7, color=FILLS[part],
                         hatch=HATCHES[part], edgecolor="white", linewidth=0.4)  # fmt: skip
        sheet.add_legend_entry(NAMES[part], bars[0])
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    ends = [(row["seconds"] - row["low"], row["high"] - row["seconds"]) for row in rows]
    errors = [[low * 1e3 for low, _ in ends], [high * 1e3 for _, high in ends]]
    axes.errorbar(starts, places, xerr=errors, fmt="none", color="black", elinewidth=0.7,
                  capsize=1.8, capthick=0.7)  # fmt: skip
    labels = [wrap_label(text.method(row), 34) for row in rows]
    axes.set_yticks(list(places), labels)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["status"] == "best" else "normal")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _draw_ranks(sheet: Sheet, axes: Axes, series: list[dict[str, Any]]) -> None:
    """The least time of each strategy by number of ranks."""
    for one in series:
        style = sheet.styles[one["strategy"]]
        (line,) = axes.plot(
            one["ranks"], [time * 1e3 for time in one["seconds"]], color=style.colour,
            marker=style.marker, linestyle=style.dash, linewidth=1.2, markersize=4,
        )  # fmt: skip
        sheet.add_legend_entry(one["strategy"], line)
    set_log2_axis(axes, [n for one in series for n in one["ranks"]], sizes=False)
    axes.set_yscale("log")
