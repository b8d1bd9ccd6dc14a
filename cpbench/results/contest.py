"""The evidence that calls one of several methods the fastest.

Its units are launches, or the turns of methods that one gang measured alternately: turns are pairs,
for what disturbs one method in a turn disturbs the others too.  The fastest must beat every other
method; each of k methods might do so by chance, so each test has a level of ``ALPHA`` ÷ k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

ALPHA = 0.05  # of calling a method the fastest that is not
MIN_LAUNCHES = 5  # per side
MAX_EXACT = 50  # differences


def launches_needed(tests: int) -> int:
    """Launches per side with which one of so many tests can be significant: the smallest p-value of
    the rank-sum test is at most ``ALPHA`` ÷ ``tests``."""
    n = MIN_LAUNCHES
    while tests / math.comb(2 * n, n) > ALPHA:
        n += 1
    return n


def turns_needed(contenders: int) -> int:
    """Turns with which the fastest of so many methods can be significant: 6 for two or three."""
    return math.ceil(math.log2(contenders / ALPHA))


def signed_rank(differences: Sequence[float]) -> float:
    """One-sided p-value of the Wilcoxon signed-rank test, for differences above 0: exact up to
    ``MAX_EXACT`` of them, then by the normal approximation.  Zeros and ties count against it."""
    ordered = sorted(differences, key=lambda difference: (abs(difference), difference <= 0))
    against = sum(rank for rank, x in enumerate(ordered, start=1) if x <= 0)
    n = len(ordered)
    if n > MAX_EXACT:
        deviation = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return NormalDist(n * (n + 1) / 4, deviation).cdf(against + 0.5)
    counts = [1]  # subsets of the ranks so far, by their sum
    for rank in range(1, n + 1):
        counts += [0] * rank
        for total in range(len(counts) - 1, rank - 1, -1):
            counts[total] += counts[total - rank]
    return sum(counts[: against + 1]) / float(2**n)
