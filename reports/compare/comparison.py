"""Comparisons of one base with one or several new runs, and their rows for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.compare.verdicts import NEITHER, cautions, commits, compare
from cpbench.reports.labels import counted, number, significant
from cpbench.results.store import Run

if TYPE_CHECKING:
    import pandas as pd

ORDER = ("FAILS", "MISSING", "SLOWER", "FASTER", "UNCLEAR", "WORKS", "ADDED", "SAME", "NEITHER")


@dataclass(frozen=True)
class Comparison:
    """One comparison.

    Attributes:
        base, new: names of the run directories.
        floor: relative difference that does not matter.
        table: of ``compare``.
        notes: commits, and what weakens the verdicts.
    """

    base: str
    new: str
    floor: float
    table: pd.DataFrame
    notes: list[str]

    @property
    def headline(self) -> str:
        counts = Counter(self.table["verdict"])
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict])
        new, base = Path(self.new), Path(self.base)
        names = (new.name, base.name) if new.name != base.name else (str(new), str(base))
        return f"{' against '.join(names)}: {told}"


def compare_runs(
    base: tuple[str, Run], news: Sequence[tuple[str, Run]], floor: float
) -> list[Comparison]:
    """Each of some runs against a base; see ``cpbench.reports.compare.verdicts``."""
    name, there = base
    found = []
    for other, here in news:
        table = compare(there, here, floor)
        notes = [f"{commits(there, here)}.", *cautions(table, there, here)]
        found.append(Comparison(name, other, floor, table, notes))
    return found


def display_rows(one: Comparison) -> list[dict[str, str]]:
    """Rows for people: what calls for attention first."""
    return [_told(row) for row in rows_by_urgency(one)]


def rows_by_urgency(one: Comparison) -> list[dict[str, Any]]:
    """Rows of the table without those timed in neither, what calls for attention first."""
    rows: list[dict[str, Any]] = [
        {str(key): value for key, value in row.items()} for row in one.table.to_dict("records")
    ]
    rows.sort(key=lambda row: (ORDER.index(row["verdict"]), -abs(_log(row["ratio"]))))
    return [row for row in rows if row["verdict"] != NEITHER]


def explanations(one: Comparison) -> list[str]:
    """What the columns and verdicts mean."""
    neither = int((one.table["verdict"] == NEITHER).sum())
    return [
        f"SLOWER, FASTER: by more than {one.floor:.1%}, told from launches (rank test; of all such "
        "verdicts at most 5 % are expected to be false). SAME: the interval lies within that. "
        "change: time, with its 95 % interval.",
        *([f"Left out: {counted(neither, 'case')} timed in neither."] if neither else []),
    ]


def _told(row: dict[str, Any]) -> dict[str, str]:
    change, interval = "", ""
    if not math.isnan(row["ratio"]):
        change = f"{row['ratio'] - 1:+.1%}"
    if not math.isnan(row["low"]):
        interval = f"{row['low'] - 1:+.1%} to {row['high'] - 1:+.1%}"
    memory = row["memory_ratio"]
    return {
        "case": row["case"],
        "verdict": row["verdict"],
        "base ms": significant(row["base_ms"]),
        "new ms": significant(row["new_ms"]),
        "change": change,
        "interval": interval,
        "launches": f"{row['base_launches']}/{row['new_launches']}",
        "memory": "" if math.isnan(memory) or abs(memory - 1) < 5e-4
        else number((memory - 1) * 100, "+.1f", "%"),
        "why": row["why"],
    }  # fmt: skip


def _log(ratio: float) -> float:
    return 0.0 if math.isnan(ratio) else math.log(ratio)
