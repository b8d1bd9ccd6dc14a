"""Comparisons of a base run with one or several new runs, and their rows for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.compare.verdicts import (
    NEITHER,
    compare,
    comparison_caveats,
    describe_commits,
)
from cpbench.reports.labels import (
    format_number,
    pluralize,
    signed_percent,
    split_common_words,
    three_digits,
)
from cpbench.results.store import Run

if TYPE_CHECKING:
    import pandas as pd

BY_SEVERITY = (
    "FAILS", "MISSING", "SLOWER", "FASTER", "UNCLEAR", "WORKS", "ADDED", "SAME", "NEITHER"
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Comparison of two runs.

    Attributes:
        base, new: names of the run directories.
        floor: relative difference that is ignored.
        table: of ``verdicts.compare``.
        notes: commits and caveats.
    """

    base: str
    new: str
    floor: float
    table: pd.DataFrame
    notes: list[str]

    @property
    def common(self) -> str:
        """What all cases have in common, in words; "" for nothing."""
        return split_common_words(self.table["case"].tolist())[0]

    @property
    def short_labels(self) -> list[str]:
        """Labels of the rows of the table without what all have in common."""
        return split_common_words(self.table["case"].tolist())[1]

    @property
    def headline(self) -> str:
        counts = Counter(self.table["verdict"])
        verdicts = ", ".join(f"{counts[name]} {name}" for name in BY_SEVERITY if counts[name])
        new, base = Path(self.new), Path(self.base)
        names = (new.name, base.name) if new.name != base.name else (str(new), str(base))
        return f"{' against '.join(names)}: {verdicts}"


def compare_runs(
    base: tuple[str, Run], news: Sequence[tuple[str, Run]], floor: float
) -> list[Comparison]:
    """Compare each new run with the base; see ``cpbench.reports.compare.verdicts``."""
    base_name, base_run = base
    comparisons = []
    for new_name, new_run in news:
        table = compare(base_run, new_run, floor)
        notes = [
            f"{describe_commits(base_run, new_run)}.",
            *comparison_caveats(table, base_run, new_run, floor),
        ]
        comparisons.append(Comparison(base_name, new_name, floor, table, notes))
    return comparisons


def display_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Rows for people, most severe verdicts first; labels without what all have in common."""
    return [_display_row(row) for row in rows_by_severity(comparison)]


def rows_by_severity(comparison: Comparison) -> list[dict[str, Any]]:
    """Rows of the table without those timed in neither run, most severe verdicts first."""
    rows: list[dict[str, Any]] = [
        {str(key): value for key, value in row.items()}
        for row in comparison.table.to_dict("records")
    ]
    rows.sort(key=lambda row: (BY_SEVERITY.index(row["verdict"]), -abs(_log(row["ratio"]))))
    labels = dict(zip(comparison.table["case"], comparison.short_labels, strict=True))
    return [row | {"case": labels[row["case"]]} for row in rows if row["verdict"] != NEITHER]


def explanations(comparison: Comparison) -> list[str]:
    """Explanations of the verdicts and columns."""
    neither = int((comparison.table["verdict"] == NEITHER).sum())
    return [
        f"SLOWER, FASTER: by more than {comparison.floor:.1%}, significant over launches (rank "
        "test, false discovery rate 5 %). SAME: the interval lies within that. change: change of "
        "the time, with its 95 % interval.",
        *(
            [f"Left out: {pluralize(neither, 'case')} without times that count in both runs."]
            if neither
            else []
        ),
    ]


def _display_row(row: dict[str, Any]) -> dict[str, str]:
    change, interval = "", ""
    if not math.isnan(row["ratio"]):
        change = signed_percent(row["ratio"] - 1)
    if not math.isnan(row["low"]):
        interval = f"{signed_percent(row['low'] - 1)} to {signed_percent(row['high'] - 1)}"
    memory = row["memory_ratio"]
    return {
        "case": row["case"],
        "verdict": row["verdict"],
        "base ms": three_digits(row["base_ms"]),
        "new ms": three_digits(row["new_ms"]),
        "change": change,
        "interval": interval,
        "launches": f"{row['base_launches']}/{row['new_launches']}",
        "memory": "" if math.isnan(memory) or abs(memory - 1) < 5e-4
        else format_number((memory - 1) * 100, "+.1f", "%"),
        "why": row["why"],
    }  # fmt: skip


def _log(ratio: float) -> float:
    return 0.0 if math.isnan(ratio) else math.log(ratio)
