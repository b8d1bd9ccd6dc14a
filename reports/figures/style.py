"""One look for every chart: colours that colour-blind people tell apart, and for black and white
a marker and a dash for each.

Colours: Paul Tol's "bright" scheme (https://personal.sron.nl/~pault/) and an orange, without the
grey.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733")
# A marker and a dash as matplotlib and as Plotly call them.
MARKERS = (
    ("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"),
    ("v", "triangle-down"), ("P", "cross"), ("X", "x"), ("<", "triangle-left"),
    (">", "triangle-right"), ("p", "pentagon"), ("*", "star"),
)  # fmt: skip
DASHES = (("-", "solid"), ("--", "dash"), (":", "dot"), ("-.", "dashdot"))


@dataclass(frozen=True)
class Look:
    """Of one method."""

    colour: str
    marker: str
    symbol: str
    dash: str
    plotly_dash: str


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each method, the same in every chart.  Operators of one rank come first: they meet
    in other charts than strategies, so that neither takes colours from the other."""
    found = {}
    alone_first = sorted(set(methods), key=lambda name: (" " in name, name))
    for i, name in enumerate(alone_first):
        marker, symbol = MARKERS[i % len(MARKERS)]
        dash, plotly_dash = DASHES[i // len(COLOURS) % len(DASHES)]
        found[name] = Look(COLOURS[i % len(COLOURS)], marker, symbol, dash, plotly_dash)
    return found
