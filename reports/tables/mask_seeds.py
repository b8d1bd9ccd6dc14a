"""Mask seeds: cases that differ only in the mask seed are compared as a distribution."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.reports.columns import UNKNOWN_MACHINE
from cpbench.reports.tables.summary import PROBLEM_KEYS, method_names

if TYPE_CHECKING:
    import pandas as pd

# Columns that are equal within a group, apart from the machine.
GROUP_KEYS = tuple(
    "mask_family" if key == "mask" else key for key in PROBLEM_KEYS if key != "machine"
)
# Columns that are read here; the others would be copied many times.
_COLUMNS = (
    *GROUP_KEYS, "machine", "draw", "id", "status", "flags", "competes", "disqualified", "started",
    "operator", "strategy", "layout", "placement", "time_ms", "low_ms", "high_ms",
    "tflops_per_rank", "density", "peak_mb", "imbalance", "sent_mb", "exposed_ms",
)  # fmt: skip
MIN_SEEDS_P95 = 20  # with fewer, the 95th percentile is the maximum
MIN_SEEDS_SIGN_TEST = 6  # with fewer, the sign test cannot reject
SIGNIFICANCE = 0.05  # level of the two-sided sign test


Row = dict[str, Any]  # of the tidy table, with its method


@dataclass(frozen=True)
class SeedSpread:
    """Results of one method across mask seeds.

    Attributes:
        method: see ``summary.method_name``.
        rows: rows of the tidy table by mask seed.
    """

    method: str
    rows: dict[Any, Row]

    def values(self, column: str) -> list[float]:
        """Values of a column, one per mask seed; nan where unknown."""
        return [row[column] for row in self.rows.values()]

    def known_values(self, column: str) -> list[float]:
        return [value for value in self.values(column) if not math.isnan(value)]

    def median(self, column: str) -> float:
        """Median across mask seeds; nan where unknown."""
        known = self.known_values(column)
        return statistics.median(known) if known else math.nan

    def min(self, column: str) -> float:
        return min(self.known_values(column), default=math.nan)

    def max(self, column: str) -> float:
        return max(self.known_values(column), default=math.nan)

    def p95(self, column: str) -> float:
        """95th percentile across mask seeds, see :func:`percentile_95`."""
        return percentile_95(self.values(column))

    def tail(self, column: str) -> float:
        """95th percentile, or the maximum with fewer than ``MIN_SEEDS_P95`` mask seeds."""
        return self.p95(column) if len(self.rows) >= MIN_SEEDS_P95 else self.max(column)

    def time_ratio(self, other: SeedSpread) -> float:
        """Geometric mean, over the same mask seeds, of this time over the other's."""
        return math.exp(sum(self._log_ratios(other)) / len(self.rows))

    def is_slower_than(self, other: SeedSpread) -> bool:
        """Whether this is slower in the geometric mean, and on significantly more mask seeds."""
        logs = self._log_ratios(other)
        slower, faster = sum(log > 0 for log in logs), sum(log < 0 for log in logs)
        return sum(logs) > 0 and slower > faster and sign_test(slower, faster) <= SIGNIFICANCE

    def _log_ratios(self, other: SeedSpread) -> list[float]:
        assert list(self.rows) == list(other.rows)
        pairs = zip(self.values("time_ms"), other.values("time_ms"), strict=True)
        return [math.log(a / b) for a, b in pairs]


@dataclass(frozen=True)
class SeedGroup:
    """Methods compared across the mask seeds of one problem.

    Attributes:
        problem: values of ``PROBLEM_KEYS``; ``mask`` is without its seed.
        mask_seeds: all seeds of the group.
        compared: competing methods, over the mask seeds that all of them completed (ok, checked
            and timed); lowest median time first.
        timed: all methods with an ok case, each over all mask seeds on which it was timed.
        missing: for each method with an ok case, reasons for missing mask seeds, and their counts.
        density_range: lowest and highest density over mask seeds, where known.
    """

    problem: dict[str, Any]
    mask_seeds: list[Any]
    compared: list[SeedSpread]
    timed: list[SeedSpread]
    missing: dict[str, Counter[str]]
    density_range: tuple[float, float] | None

    @property
    def num_common_seeds(self) -> int:
        """Number of mask seeds on which methods are compared."""
        return len(self.compared[0].rows) if self.compared else 0

    @property
    def common_density_range(self) -> tuple[float, float] | None:
        """``density_range`` of the mask seeds on which methods are compared."""
        return _known_range(self.compared[0].known_values("density")) if self.compared else None

    @property
    def not_compared(self) -> list[SeedSpread]:
        """Entries of ``timed`` that cover other mask seeds than in ``compared``."""
        counts = {spread.method: len(spread.rows) for spread in self.compared}
        return [spread for spread in self.timed if counts.get(spread.method) != len(spread.rows)]

    @property
    def methods(self) -> list[SeedSpread]:
        """Each method once: those in ``compared``, then the others from ``timed``."""
        names = {spread.method for spread in self.compared}
        return [*self.compared, *(spread for spread in self.timed if spread.method not in names)]

    @property
    def verdict(self) -> str:
        """``"won"``, ``"tie"``, ``"inconclusive"`` (too few mask seeds) or ``"uncontested"``."""
        fastest, *others = self.compared
        if not others:
            return "uncontested"
        if self.num_common_seeds < MIN_SEEDS_SIGN_TEST:
            return "inconclusive"
        return "won" if all(other.is_slower_than(fastest) for other in others) else "tie"

    @property
    def fastest_in_tail(self) -> str | None:
        """Method with the lowest :meth:`SeedSpread.tail` of the time; None for a tie.

        It is a tie when the tail of another method, taken from the lower ends of its intervals, is
        not above that of the fastest, taken from the upper ends, or when an end is unknown.
        """
        fastest, *others = sorted(self.compared, key=lambda spread: spread.tail("time_ms"))
        ends = [spread.values(end) for spread in self.compared for end in ("low_ms", "high_ms")]
        if any(math.isnan(end) for values in ends for end in values):
            return None
        upper = fastest.tail("high_ms")
        return fastest.method if all(other.tail("low_ms") > upper for other in others) else None

    def count_fastest(self, spread: SeedSpread) -> int:
        """Number of mask seeds on which no compared method took less time."""
        all_times = [other.values("time_ms") for other in self.compared]
        times = spread.values("time_ms")
        return sum(own <= min(others) for own, *others in zip(times, *all_times, strict=True))


def split_seed_groups(table: pd.DataFrame) -> tuple[pd.DataFrame, list[SeedGroup]]:
    """Split a table into the cases outside of groups, and groups of two mask seeds or more."""
    seeded = table.loc[table["draw"].notna(), list(_COLUMNS)]
    seeded = seeded.assign(method=method_names(seeded), index=seeded.index)
    rows: list[Row] = seeded.to_dict("records")  # type: ignore[assignment]
    groups, members = [], set()
    for problem, group_rows in _group_rows(rows):
        if len({row["draw"] for row in group_rows}) > 1:
            groups.append(_seed_group(problem, group_rows))
            members |= {row["index"] for row in group_rows}
    return table[~table.index.isin(members)], groups


def percentile_95(values: list[float]) -> float:
    """The smallest value that 95 % of all do not exceed; nan below ``MIN_SEEDS_P95`` values."""
    n = len(values)
    return sorted(values)[-(-95 * n // 100) - 1] if n >= MIN_SEEDS_P95 else math.nan


def sign_test(won: int, lost: int) -> float:
    """Two-sided p-value of the sign test: chance of a score at least as uneven at even odds."""
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(max(won, lost), n + 1))
    return min(1.0, tail / 2.0 ** (n - 1))


def _group_rows(rows: Sequence[Row]) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    """Rows by problem and machine; a failure on an unknown machine belongs to every machine."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in GROUP_KEYS), []).append(row)
    for key, group in sorted(groups.items(), key=lambda item: item[0]):
        unplaced = [row["machine"] == UNKNOWN_MACHINE and row["status"] != "ok" for row in group]
        machines = {row["machine"] for row, lost in zip(group, unplaced, strict=True) if not lost}
        for machine in sorted(machines) or [UNKNOWN_MACHINE]:
            problem = dict(zip(GROUP_KEYS, key, strict=True)) | {"machine": machine}
            problem["mask"] = problem.pop("mask_family")
            pairs = zip(group, unplaced, strict=True)
            yield problem, [row for row, lost in pairs if lost or row["machine"] == machine]


def _seed_group(problem: dict[str, Any], group: Sequence[Row]) -> SeedGroup:
    seeds = list(dict.fromkeys(row["draw"] for row in group))
    cases: dict[str, dict[Any, Row]] = {name: {} for name in sorted({r["method"] for r in group})}
    for row in sorted(group, key=lambda row: row["started"]):  # the newest of each seed stays
        cases[row["method"]][row["draw"]] = row
    completed = {
        name: {seed: rows[seed] for seed in seeds if seed in rows and rows[seed]["competes"]}
        for name, rows in cases.items()
    }
    most = max(map(len, completed.values()))
    names = [name for name, rows in completed.items() if most and 2 * len(rows) >= most]
    common = [seed for seed in seeds if all(seed in completed[name] for name in names)]
    compared = [
        SeedSpread(name, {seed: completed[name][seed] for seed in common})
        for name in names
        if common
    ]
    compared.sort(key=lambda spread: spread.median("time_ms"))
    order = list(dict.fromkeys([*(spread.method for spread in compared), *cases]))
    ok = {n: {s: row for s, row in cases[n].items() if row["status"] == "ok"} for n in order}
    ok = {name: rows for name, rows in ok.items() if rows}
    return SeedGroup(
        problem=problem,
        mask_seeds=seeds,
        compared=compared,
        timed=[SeedSpread(name, _timed_rows(rows)) for name, rows in ok.items()],
        missing={
            name: Counter(
                _missing_reason(cases[name], seed) for seed in seeds if seed not in completed[name]
            )
            for name in ok
            if len(completed[name]) < len(seeds)
        },
        density_range=_known_range([row["density"] for row in group]),
    )


def _timed_rows(rows: dict[Any, Row]) -> dict[Any, Row]:
    return {seed: row for seed, row in rows.items() if not math.isnan(row["time_ms"])}


def _known_range(values: Sequence[float]) -> tuple[float, float] | None:
    known = [value for value in values if not math.isnan(value)]
    return (min(known), max(known)) if known else None


def _missing_reason(rows: dict[Any, Row], seed: Any) -> str:
    """Why a method did not complete a mask seed, in a word or two."""
    return str(rows[seed]["disqualified"]) if seed in rows else "not run"
