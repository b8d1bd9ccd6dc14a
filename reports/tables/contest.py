"""Which method of a problem is the fastest, by the evidence of launches or turns."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cpbench.reports.compare.statistics import compare_medians
from cpbench.reports.labels import pluralize
from cpbench.results.contest import ALPHA, launches_needed, signed_rank, turns_needed

Units = dict[str, list[float]]  # by writer: medians of turns, or of the launch


@dataclass(frozen=True)
class Shortage:
    """Too few units to decide: how many there are, and how many are needed."""

    unit: str
    count: int
    needed: int

    def __str__(self) -> str:
        return f"{pluralize(self.count, self.unit)}, {self.needed} needed"


@dataclass(frozen=True)
class Contest:
    """The fastest method of a problem against each other one.

    Attributes:
        slower: by the other methods, in order: whether they are significantly slower, or the
            shortage of evidence.
    """

    slower: tuple[bool | Shortage, ...]

    @property
    def verdict(self) -> str:
        """``"won"``; ``"tie"``, where some method is not slower; ``"inconclusive"``, where there is
        too little evidence on some; or ``"uncontested"``."""
        if not self.slower:
            return "uncontested"
        if False in self.slower:
            return "tie"
        return "won" if all(slower is True for slower in self.slower) else "inconclusive"

    @property
    def shortage(self) -> Shortage | None:
        """The first shortage of evidence."""
        return next((slower for slower in self.slower if isinstance(slower, Shortage)), None)


def hold_contest(evidence: Sequence[str]) -> Contest:
    """The contest of methods.

    Args:
        evidence: that column of the tidy table, of the fastest method first.
    """
    first, *others = (json.loads(units) for units in evidence)
    return Contest(tuple(_is_slower(first, other, len(evidence)) for other in others))


def _is_slower(first: Units, other: Units, contenders: int) -> bool | Shortage:
    """Whether a method is significantly slower than the first of so many."""
    count, needed = min(len(first), len(other)), launches_needed(contenders)
    if count >= needed:
        medians, others = (list(map(statistics.median, units.values())) for units in (first, other))
        return compare_medians(medians, others, floor=0.0).slower <= ALPHA / contenders
    pairs = [
        (a, b)
        for writer in first.keys() & other.keys()
        if min(len(first[writer]), len(other[writer])) > 1
        for a, b in zip(first[writer], other[writer], strict=False)
    ]
    if not pairs:
        return Shortage("launch", count, needed)
    if len(pairs) < (needed := turns_needed(contenders)):
        return Shortage("turn", len(pairs), needed)
    return signed_rank([math.log(b / a) for a, b in pairs]) <= ALPHA / contenders
