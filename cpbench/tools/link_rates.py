"""Rates of measured links, from the file of ``cpbench links --json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpbench.core.spec import format_size

_NAMES = {"node": "inside a node", "across": "across nodes"}


@dataclass(frozen=True)
class LinkRates:
    """Times of point-to-point messages, by class of link.

    Attributes:
        times_us: by link (``"node"``, ``"across"``): microseconds by size in bytes, ascending.
    """

    times_us: Mapping[str, Mapping[int, float]]

    def describe_range(self) -> str:
        """The sizes that were measured, beyond which rates are taken as constant, in words."""
        largest = ", ".join(
            f"{_NAMES.get(link, link)} {format_size(max(times))}"
            for link, times in self.times_us.items()
        )
        return f"--links: largest messages measured: {largest}; larger ones have the same rate"

    def gb_per_s(self, link: str, nbytes: float) -> float:
        """Bytes over time of a message, 1e9 bytes per second: between the measured sizes, along a
        line in the logarithms of size and time; beyond the largest, its rate.

        Raises:
            ValueError: when that class of link was not measured.
        """
        times = self.times_us.get(link)
        if not times:
            raise ValueError(
                f"--links: no links {_NAMES[link]} were measured; cpbench links --world-size N "
                "--ranks-per-node M --json measures both"
            )
        sizes = list(times)
        if nbytes >= sizes[-1]:
            return sizes[-1] / times[sizes[-1]] / 1e3
        if nbytes <= sizes[0]:
            return nbytes / times[sizes[0]] / 1e3
        above = next(i for i, size in enumerate(sizes) if size >= nbytes)
        low, high = sizes[above - 1], sizes[above]
        share = math.log(nbytes / low) / math.log(high / low)
        log_us = (1 - share) * math.log(times[low]) + share * math.log(times[high])
        return nbytes / math.exp(log_us) / 1e3


def read_link_rates(path: Path) -> LinkRates:
    """Read the output of ``cpbench links --json``: of several groups of ranks, the slowest.

    Raises:
        ValueError: for another file.
        OSError: when it cannot be read.
    """
    try:
        table: Any = json.loads(path.read_text("utf-8"))
        rows = [row for row in table["rows"] if row["operation"] == "p2p"]
        times: dict[str, dict[int, float]] = {}
        for row in sorted(rows, key=lambda row: int(row["bytes"])):
            times.setdefault(str(row["link"]), {})[int(row["bytes"])] = float(row["slowest_us"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--links {path}: not a file of cpbench links --json") from None
    if not times:
        raise ValueError(f"--links {path}: no point-to-point messages were measured")
    return LinkRates(times)
