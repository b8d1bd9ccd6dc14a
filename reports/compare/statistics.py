"""Whether one run is faster than another: the statistics of a comparison.

The unit of evidence is a launch: iterations of one process share its memory layout, clocks and
neighbours, and agree with each other better than with any other process.  Each launch counts once,
with its median.  The test is Mann and Whitney's, exact for few launches, of a ratio beyond the
floor (a minimum-effect test: the base is moved by the floor first), corrected for the number of
cases by Benjamini and Hochberg.  The ratio is Hodges and Lehmann's estimate with the interval that
belongs to that test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 5  # launches of a side
CHANCE = 0.05  # share of false discoveries; also one minus the level of intervals
SAME, FASTER, SLOWER, UNCLEAR = "SAME", "FASTER", "SLOWER", "UNCLEAR"


@dataclass(frozen=True)
class Evidence:
    """What launches of two sides say of their times.

    Attributes:
        ratio: new over base, Hodges and Lehmann's estimate.
        low, high: the interval of the ratio, of level 95 % or the next that so few launches allow.
        slower, faster: chance of such launches, or more extreme ones, if the new side were not
            slower (faster) than the base by more than the floor.
    """

    ratio: float
    low: float
    high: float
    slower: float
    faster: float


def weigh(base: Sequence[float], new: Sequence[float], floor: float) -> Evidence:
    """Evidence from the medians of launches.

    Args:
        base, new: at least one positive time each.
        floor: the relative difference that does not matter, 0.02 for 2 %.
    """
    from scipy.stats import mannwhitneyu

    a, b = [math.log(x) for x in base], [math.log(x) for x in new]
    shift = math.log1p(floor)
    method = "exact" if len(a) * len(b) <= 400 and len({*a, *b}) == len(a) + len(b) else "auto"

    def chance(moved_by: float, alternative: str) -> float:
        moved = [x + moved_by for x in a]
        return float(mannwhitneyu(b, moved, alternative=alternative, method=method).pvalue)

    pairs = sorted(y - x for x in a for y in b)
    skip = _outside(len(a), len(b))
    return Evidence(
        ratio=math.exp(_median(pairs)),
        low=math.exp(pairs[skip]),
        high=math.exp(pairs[-1 - skip]),
        slower=chance(shift, "greater"),
        faster=chance(-shift, "less"),
    )


def verdicts(found: Sequence[Evidence | None], floor: float) -> list[str]:
    """A verdict for each case, corrected for how many there are; None is too little evidence.

    SLOWER and FASTER: by more than the floor, with at most 5 % of such verdicts expected to be
    false.  SAME: the interval of the ratio lies within the floor on both sides.  UNCLEAR: neither.
    """
    from scipy.stats import false_discovery_control

    known = [evidence for evidence in found if evidence is not None]
    tested = [p for evidence in known for p in (evidence.slower, evidence.faster)]
    adjusted = iter(false_discovery_control(tested) if tested else ())
    told = []
    for evidence in found:
        if evidence is None:
            told.append(UNCLEAR)
            continue
        slower, faster = next(adjusted), next(adjusted)
        if min(slower, faster) <= CHANCE:
            told.append(SLOWER if slower < faster else FASTER)
        else:
            within = 1 / (1 + floor) <= evidence.low and evidence.high <= 1 + floor
            told.append(SAME if within else UNCLEAR)
    return told


def enough(cases: int) -> int:
    """Launches of a side with which a single case among so many can be told at all: the least
    chance that the test can give, twice (either direction) and corrected, is below 5 %."""
    n = FEWEST
    while 2 * cases / math.comb(2 * n, n) > CHANCE:
        n += 1
    return n


def _outside(m: int, n: int) -> int:
    """How many of the ordered differences lie outside of the interval at either end: the largest
    value of Mann and Whitney's statistic that is not exceeded with a chance of at most 2.5 %."""
    total, below = math.comb(m + n, n), 0
    for value, ways in enumerate(_ways(m, n)):
        below += ways
        if below / total > CHANCE / 2:
            return max(value - 1, 0)
    raise AssertionError


def _ways(m: int, n: int) -> list[int]:
    """In how many ways the statistic takes each value: coefficients of the Gaussian binomial."""
    ways = [1] + [0] * (m * n)
    for i in range(1, n + 1):
        for value in range(m * n, m + i - 1, -1):
            ways[value] -= ways[value - m - i]
        for value in range(i, m * n + 1):
            ways[value] += ways[value - i]
    return ways


def _median(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
