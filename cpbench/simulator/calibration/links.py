"""Constants of links and collectives, fitted to the output of ``cpbench links --json``.

A ring, in which every rank sends and receives at once, gives latency and rate of a rank; all ranks
that send across at once, how many links a node has.  All-to-alls are not fitted, but predicted from
the rates of links.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpbench.simulator.calibration.solve import Fit, solve
from cpbench.simulator.cluster import Collectives, Link

GATHERING = ("all_gather", "reduce_scatter", "all_reduce")
FIELDS = {"link": str, "operation": str, "bytes": int, "ranks": int, "us": float, "busbw": float}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """What a file of ``cpbench links --json`` holds: ranks, type of device, and rows."""

    path: Path
    ranks: int
    ranks_per_node: int
    device: str
    rows: Sequence[Row]

    def times(self, link: str, operation: str) -> list[tuple[float, float]]:
        """Bytes that a rank receives, and seconds, by ascending size."""
        return sorted(
            (row["busbw"] * row["us"] * 1e3, row["us"] * 1e-6)
            for row in self.rows
            if (row["link"], row["operation"]) == (link, operation)
        )


def read_measured(path: Path) -> Measured:
    """Read a file of ``cpbench links --json``.

    Raises:
        ValueError: for another file, one of a run that failed, or of an earlier version.
        OSError: when it cannot be read.
    """
    if not path.exists():
        raise ValueError(f"--links {path}: there is no such file; cpbench links --json prints one")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for row in table["rows"]:
            if any(not isinstance(row[name], kind) for name, kind in FIELDS.items()):
                raise TypeError
        measured = Measured(
            path, int(table["ranks"]), int(table["ranks_per_node"]), str(table["device"]["type"]),
            table["rows"],
        )  # fmt: skip
        complete = table["complete"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--links {path}: not a file of cpbench links --json") from None
    if not complete:
        raise ValueError(f"--links {path}: that run of cpbench links failed before its end")
    for name in ("ring", *GATHERING):
        if not any(row["operation"] == name for row in measured.rows):
            raise ValueError(
                f"--links {path}: has no {name}: an earlier version of cpbench wrote it; run "
                "cpbench links --json again"
            )
    return measured


@dataclass(frozen=True)
class LinksFit:
    """Fitted links and collectives.

    Attributes:
        fits: by name of the table of the cluster file, with the intervals.
        all_to_all: relative errors of the all-to-alls that the links predict.
    """

    links: dict[str, Link]
    collectives: Collectives
    fits: dict[str, Fit]
    all_to_all: list[float]


def fit_links(measured: Measured, source: str) -> LinksFit:
    """Fit the links and collectives.

    Raises:
        ValueError: for less than two sizes, in one line.
    """
    links: dict[str, Link] = {}
    fits: dict[str, Fit] = {}
    for name in ("node", "across"):
        if not (times := measured.times(name, "ring")):
            continue
        if len(times) < 2:
            raise ValueError(f"--links {measured.path}: one message size; measure two or more")
        fit = fits[f"links.{name}"] = _fit_link(times)
        alpha_us, gb_per_s = fit.constants["alpha_us"], fit.constants["gb_per_s"]
        per_node = _links_per_node(measured, gb_per_s) if name == "across" else 0
        links[name] = Link(source=source, alpha_us=alpha_us, gb_per_s=gb_per_s, per_node=per_node)
    fits["collectives"] = _fit_collectives(measured)
    found = fits["collectives"].constants

    def both(name: str) -> tuple[float, float]:
        inside, across = found.get(f"{name}.node"), found.get(f"{name}.across")
        assert inside or across
        return inside or across or 0.0, across or inside or 0.0

    collectives = Collectives(
        source=source, alpha_us=found["alpha_us"], **{name: both(name) for name in GATHERING}
    )
    return LinksFit(links, collectives, fits, _all_to_all_errors(measured, links))


def _fit_link(times: Sequence[tuple[float, float]]) -> Fit:
    """Latency and rate of messages."""
    (_, least_s), (most_bytes, most_s) = times[0], times[-1]
    guess = {"alpha_us": least_s * 1e6, "gb_per_s": most_bytes / most_s / 1e9}

    def residuals(x: dict[str, float]) -> list[float]:
        return [_log_ratio(x["alpha_us"], x["gb_per_s"], *point) for point in times]

    return solve(residuals, guess)


def _log_ratio(alpha_us: float, gb_per_s: float, nbytes: float, seconds: float) -> float:
    return math.log((alpha_us * 1e-6 + nbytes / (gb_per_s * 1e9)) / seconds)


def _links_per_node(measured: Measured, gb_per_s: float) -> int:
    """Links of a node, from the rates of one rank alone and of all at once; 0: one for each."""
    times = measured.times("all", "cross")
    if not times:
        return 0
    nbytes, seconds = times[-1]
    share = nbytes / seconds / 1e9 / gb_per_s
    links = max(1, round(share * measured.ranks_per_node))
    return links if links < measured.ranks_per_node else 0


def _fit_collectives(measured: Measured) -> Fit:
    """One latency, and the rate of each collective inside a node and across."""
    points: dict[str, list[tuple[float, float]]] = {}
    for name in GATHERING:
        for place, links in (("node", ("node",)), ("across", ("all", "across"))):
            rows = next((found for link in links if (found := measured.times(link, name))), [])
            if rows:
                points[f"{name}.{place}"] = rows
    guess = {"alpha_us": min(rows[0][1] for rows in points.values()) * 1e6}
    guess |= {name: rows[-1][0] / rows[-1][1] / 1e9 for name, rows in points.items()}

    def residuals(x: dict[str, float]) -> list[float]:
        return [
            _log_ratio(x["alpha_us"], x[name], *point)
            for name, rows in points.items()
            for point in rows
        ]

    return solve(residuals, guess)


def _all_to_all_errors(measured: Measured, links: Mapping[str, Link]) -> list[float]:
    """Relative errors of all-to-alls inside a node and over one rank of each."""
    return [
        abs(math.exp(_log_ratio(link.alpha_us, link.gb_per_s, *point)) - 1)
        for name, link in links.items()
        for point in measured.times(name, "all_to_all")
    ]
