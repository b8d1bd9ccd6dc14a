"""Styles of methods in charts: colours that are safe for colour-blind readers, and for black and
white a marker and a dash for each.

Colours: Paul Tol's "bright" scheme (https://personal.sron.nl/~pault/) with an orange instead of the
grey.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733")
# Markers and dashes by their names in matplotlib and in Plotly.
MARKERS = (
    ("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"),
    ("v", "triangle-down"), ("P", "cross"), ("X", "x"), ("<", "triangle-left"),
    (">", "triangle-right"), ("p", "pentagon"), ("*", "star"),
)  # fmt: skip
DASHES = (("-", "solid"), ("--", "dash"), (":", "dot"), ("-.", "dashdot"))


@dataclass(frozen=True)
class MethodStyle:
    """Style of one method: matplotlib's ``marker`` and ``dash``, Plotly's ``symbol`` and
    ``plotly_dash``; ``hollow`` markers for results that may not be compared with others."""

    colour: str
    marker: str
    symbol: str
    dash: str
    plotly_dash: str
    hollow: bool = False


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """A style for each method, the same in all charts.  Operators of one rank come first: they
    appear in other charts than strategies do, so neither takes colours from the other."""
    styles = {}
    single_rank_first = sorted(set(methods), key=lambda name: (" " in name, name))
    for i, name in enumerate(single_rank_first):
        marker, symbol = MARKERS[i % len(MARKERS)]
        dash, plotly_dash = DASHES[i // len(COLOURS) % len(DASHES)]
        styles[name] = MethodStyle(COLOURS[i % len(COLOURS)], marker, symbol, dash, plotly_dash)
    return styles


def with_hollow_styles(
    styles: Mapping[str, MethodStyle], labels: Mapping[str, str]
) -> dict[str, MethodStyle]:
    """The styles with those of more labels: that of the method, hollow.

    Args:
        labels: method by label; equal ones need no style of their own.
    """
    hollow = {
        label: replace(styles[method], symbol=f"{styles[method].symbol}-open", hollow=True)
        for label, method in sorted(labels.items())
        if label != method
    }
    return {**styles, **hollow}
