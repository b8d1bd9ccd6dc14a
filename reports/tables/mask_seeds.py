"""Drawn masks: the draws of one family are one question, answered as a distribution over draws."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.reports.columns import UNKNOWN
from cpbench.reports.tables.summary import QUESTION, competing, methods

if TYPE_CHECKING:
    import pandas as pd

# What draws of one family have in common, apart from the machine.
FAMILY = tuple({"mask": "mask_family"}.get(key, key) for key in QUESTION if key != "machine")
# What is looked at of a case; everything else would be copied many times.
_NEEDED = (
    *FAMILY, "machine", "draw", "id", "status", "flags", "started", "operator", "strategy",
    "layout", "placement", "time_ms", "low_ms", "high_ms", "tflops_per_rank", "density", "peak_mb",
    "imbalance", "sent_mb", "exposed_ms",
)  # fmt: skip
FEWEST_P95 = 20  # draws; the 95th percentile of fewer is the worst one
FEWEST_TOLD = 6  # draws; the sign test tells nothing of fewer
CHANCE = 0.05  # two-sided, of the sign test


Row = dict[str, Any]  # of the tidy table, with its method


@dataclass(frozen=True)
class Spread:
    """One method over draws.

    Attributes:
        method: the operator, and how it is spread where it is.
        rows: by draw.
    """

    method: str
    rows: dict[Any, Row]

    def values(self, column: str) -> list[float]:
        """A figure of each draw; nan where nothing is known."""
        return [row[column] for row in self.rows.values()]

    def known(self, column: str) -> list[float]:
        return [value for value in self.values(column) if not math.isnan(value)]

    def median(self, column: str) -> float:
        """The middle over draws; nan where nothing is known."""
        known = self.known(column)
        return statistics.median(known) if known else math.nan

    def least(self, column: str) -> float:
        return min(self.known(column), default=math.nan)

    def most(self, column: str) -> float:
        return max(self.known(column), default=math.nan)

    def p95(self, column: str) -> float:
        """What 95 % of the draws do not exceed, itself of a draw; nan below ``FEWEST_P95``."""
        return percentile95(self.values(column))

    def tail(self, column: str) -> float:
        """The 95th percentile, or the largest where there are too few draws for one."""
        return self.p95(column) if len(self.rows) >= FEWEST_P95 else self.most(column)

    def ratio(self, other: Spread) -> float:
        """Geometric mean over the same draws of this time over the other's."""
        return math.exp(sum(self._logs(other)) / len(self.rows))

    def slower(self, other: Spread) -> bool:
        """Whether this is slower on average and on more of the same draws than chance allows."""
        logs = self._logs(other)
        won, lost = sum(log > 0 for log in logs), sum(log < 0 for log in logs)
        return sum(logs) > 0 and won > lost and sign_test(won, lost) <= CHANCE

    def _logs(self, other: Spread) -> list[float]:
        assert list(self.rows) == list(other.rows)
        pairs = zip(self.values("time_ms"), other.values("time_ms"), strict=True)
        return [math.log(a / b) for a, b in pairs]


@dataclass(frozen=True)
class Family:
    """The contest over the draws of one mask, for one problem on one number of ranks.

    Attributes:
        question: what was to be computed; ``mask`` is without its seed.
        draws: seeds that some method was asked for.
        compared: every method that competes, over the draws that all of these completed (ok,
            checked and timed); smallest median time first.
        lacking: for each method that completed some, why draws are missing, and how many.
        own: every method that some draw is ok of, over all draws that it was timed on.
        density: least and largest share of visible pairs of a draw, where known.
    """

    question: dict[str, Any]
    draws: list[Any]
    compared: list[Spread]
    own: list[Spread]
    lacking: dict[str, Counter[str]]
    density: tuple[float, float] | None

    @property
    def common(self) -> int:
        """Draws on which methods are compared."""
        return len(self.compared[0].rows) if self.compared else 0

    @property
    def common_density(self) -> tuple[float, float] | None:
        """``density`` of the draws on which methods are compared."""
        return _ends(self.compared[0].known("density")) if self.compared else None

    @property
    def apart(self) -> list[Spread]:
        """Of ``own``, what is not over the same draws as in ``compared``."""
        known = {spread.method: len(spread.rows) for spread in self.compared}
        return [spread for spread in self.own if known.get(spread.method) != len(spread.rows)]

    @property
    def methods(self) -> list[Spread]:
        """Each method once: those that compete over common draws, then others over their own."""
        known = {spread.method for spread in self.compared}
        return [*self.compared, *(spread for spread in self.own if spread.method not in known)]

    @property
    def verdict(self) -> str:
        """In the median: ``"alone"``, ``"open"`` (too few draws to tell), ``"tie"``, ``"won"``."""
        first, *rivals = self.compared
        if not rivals:
            return "alone"
        if self.common < FEWEST_TOLD:
            return "open"
        return "won" if all(rival.slower(first) for rival in rivals) else "tie"

    @property
    def tail_winner(self) -> str | None:
        """The method of the smallest 95th percentile (worst of few draws); None for a tie.

        It is a tie when a rival's, taken from the lower ends of its times' intervals, is not
        above the winner's, taken from the upper ends; an end that is not known reaches everywhere.
        """
        first, *rivals = sorted(self.compared, key=lambda spread: spread.tail("time_ms"))
        ends = [spread.values(end) for spread in self.compared for end in ("low_ms", "high_ms")]
        if any(math.isnan(end) for values in ends for end in values):
            return None
        reach = first.tail("high_ms")
        return first.method if all(rival.tail("low_ms") > reach for rival in rivals) else None

    def fastest_on(self, spread: Spread) -> int:
        """Draws on which no method that competes took less time."""
        times = [rival.values("time_ms") for rival in self.compared]
        mine = spread.values("time_ms")
        return sum(own <= min(others) for own, *others in zip(mine, *times, strict=True))


def split(table: pd.DataFrame) -> tuple[pd.DataFrame, list[Family]]:
    """The cases that belong to no family of several draws, and the families."""
    drawn = table.loc[table["draw"].notna(), list(_NEEDED)]
    drawn = drawn.assign(method=methods(drawn), competing=competing(drawn), index=drawn.index)
    rows: list[Row] = drawn.to_dict("records")  # type: ignore[assignment]
    found, members = [], set()
    for key, group in _groups(rows):
        if len({row["draw"] for row in group}) > 1:
            found.append(_family(key, group))
            members |= {row["index"] for row in group}
    return table[~table.index.isin(members)], found


def percentile95(values: list[float]) -> float:
    """The smallest value that 95 % of all do not exceed; nan below ``FEWEST_P95`` values."""
    n = len(values)
    return sorted(values)[-(-95 * n // 100) - 1] if n >= FEWEST_P95 else math.nan


def sign_test(won: int, lost: int) -> float:
    """The chance of a score at least as uneven if either side were as likely to win a draw."""
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(max(won, lost), n + 1))
    return min(1.0, tail / 2.0 ** (n - 1))


def _groups(rows: Sequence[Row]) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    """Draws of one family and machine; a failure on a machine that nobody noted is of every."""
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        families.setdefault(tuple(row[name] for name in FAMILY), []).append(row)
    for key, group in sorted(families.items(), key=lambda item: item[0]):
        nowhere = [row["machine"] == UNKNOWN and row["status"] != "ok" for row in group]
        there = {row["machine"] for row, lost in zip(group, nowhere, strict=True) if not lost}
        for machine in sorted(there) or [UNKNOWN]:
            question = dict(zip(FAMILY, key, strict=True)) | {"machine": machine}
            question["mask"] = question.pop("mask_family")
            pairs = zip(group, nowhere, strict=True)
            yield question, [row for row, lost in pairs if lost or row["machine"] == machine]


def _family(question: dict[str, Any], group: Sequence[Row]) -> Family:
    draws = list(dict.fromkeys(row["draw"] for row in group))
    cases: dict[str, dict[Any, Row]] = {name: {} for name in sorted({r["method"] for r in group})}
    for row in sorted(group, key=lambda row: row["started"]):  # the newest of each draw stays
        cases[row["method"]][row["draw"]] = row
    done = {
        name: {draw: rows[draw] for draw in draws if draw in rows and rows[draw]["competing"]}
        for name, rows in cases.items()
    }
    most = max(map(len, done.values()))
    rivals = [name for name, rows in done.items() if most and 2 * len(rows) >= most]
    common = [draw for draw in draws if all(draw in done[name] for name in rivals)]
    compared = [Spread(name, {d: done[name][d] for d in common}) for name in rivals if common]
    compared.sort(key=lambda spread: spread.median("time_ms"))
    names = list(dict.fromkeys([*(spread.method for spread in compared), *cases]))
    fine = {n: {d: r for d, r in cases[n].items() if r["status"] == "ok"} for n in names}
    fine = {name: rows for name, rows in fine.items() if rows}
    return Family(
        question=question,
        draws=draws,
        compared=compared,
        own=[Spread(name, _timed(rows)) for name, rows in fine.items()],
        lacking={
            name: Counter(_why(cases[name], draw) for draw in draws if draw not in done[name])
            for name in fine
            if len(done[name]) < len(draws)
        },
        density=_ends([row["density"] for row in group]),
    )


def _timed(rows: dict[Any, Row]) -> dict[Any, Row]:
    return {draw: row for draw, row in rows.items() if not math.isnan(row["time_ms"])}


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    known = [value for value in values if not math.isnan(value)]
    return (min(known), max(known)) if known else None


def _why(rows: dict[Any, Row], draw: Any) -> str:
    """Why a method did not complete a draw, in a word or two."""
    if draw not in rows:
        return "not run"
    if rows[draw]["status"] != "ok":
        return str(rows[draw]["status"])
    return "not timed" if math.isnan(rows[draw]["time_ms"]) else "not checked"
