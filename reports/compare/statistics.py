"""Statistics of a comparison of two runs: test, effect size and verdict per case.

The unit of evidence is a launch: iterations of one process share its memory layout, clocks and
neighbours, and vary less than processes do.  Each launch counts once, with its median.  The test is
the Mann-Whitney U test, exact for few launches, of a ratio beyond the floor (a minimum-effect test:
the base is shifted by the floor first), corrected for the number of cases by Benjamini-Hochberg.
The ratio is the Hodges-Lehmann estimate with the confidence interval that belongs to that test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from cpbench.results.contest import MIN_LAUNCHES, launches_needed

ALPHA = 0.05  # false discovery rate; also one minus the level of intervals
POWER = 0.8  # chance with which a detectable change is found
SAME, FASTER, SLOWER, UNCLEAR = "SAME", "FASTER", "SLOWER", "UNCLEAR"


@dataclass(frozen=True)
class RatioTest:
    """Estimate and tests of the ratio of times of one case, new over base.

    Attributes:
        ratio: Hodges-Lehmann estimate.
        low, high: confidence interval of the ratio, at 95 % or the next level that the number of
            launches allows.
        slower, faster: p-values against the new side being slower (faster) by more than the floor.
    """

    ratio: float
    low: float
    high: float
    slower: float
    faster: float


def compare_medians(
    base: Sequence[float], new: Sequence[float], floor: float, alpha: float = ALPHA
) -> RatioTest:
    """Test the medians of launches of two sides.

    Args:
        base, new: at least one positive time each.
        floor: relative difference that is ignored, 0.02 for 2 %.
        alpha: one minus the level of the interval.
    """
    from scipy.stats import mannwhitneyu

    a, b = [math.log(x) for x in base], [math.log(x) for x in new]
    shift = math.log1p(floor)
    method = "exact" if len(a) * len(b) <= 400 and len({*a, *b}) == len(a) + len(b) else "auto"

    def p_value(shift: float, alternative: str) -> float:
        shifted = [x + shift for x in a]
        return float(mannwhitneyu(b, shifted, alternative=alternative, method=method).pvalue)

    differences = sorted(y - x for x in a for y in b)
    trimmed = _trimmed_differences(len(a), len(b), alpha)
    return RatioTest(
        ratio=math.exp(_median(differences)),
        low=math.exp(differences[trimmed]),
        high=math.exp(differences[-1 - trimmed]),
        slower=p_value(shift, "greater"),
        faster=p_value(-shift, "less"),
    )


def decide_verdicts(
    tests: Sequence[RatioTest | None], floor: float, alpha: float = ALPHA
) -> list[str]:
    """A verdict for each case, corrected for the number of cases; None is too few launches.

    SLOWER and FASTER: by more than the floor, with a false discovery rate of ``alpha``.  SAME: the
    interval of the ratio lies within the floor on both sides.  UNCLEAR: neither.
    """
    from scipy.stats import false_discovery_control

    p_values = [p for test in tests if test is not None for p in (test.slower, test.faster)]
    adjusted = iter(false_discovery_control(p_values) if p_values else ())
    verdicts = []
    for test in tests:
        if test is None:
            verdicts.append(UNCLEAR)
            continue
        slower, faster = next(adjusted), next(adjusted)
        if min(slower, faster) <= alpha:
            verdicts.append(SLOWER if slower < faster else FASTER)
        else:
            within = 1 / (1 + floor) <= test.low and test.high <= 1 + floor
            verdicts.append(SAME if within else UNCLEAR)
    return verdicts


def relative_spread(base: Sequence[float], new: Sequence[float]) -> float | None:
    """Standard deviation of the logarithms of the medians of launches, within sides; None below
    three launches in all."""
    if (freedom := len(base) + len(new) - 2) < 1:
        return None
    sides = [[math.log(x) for x in side] for side in (base, new)]
    squares = sum(sum((x - sum(side) / len(side)) ** 2 for x in side) for side in sides if side)
    return math.sqrt(squares / freedom)


def detectable_change(
    spread: float, launches: tuple[int, int], floor: float, cases: int
) -> float | None:
    """The smallest slowdown that so many launches per side show with a chance of ``POWER``, by the
    normal approximation (Noether 1987; the rank test has 3/π of the efficiency of a t-test).

    None where no change of a single case among ``cases`` can be significant.
    """
    if min(launches) < launches_needed(2 * cases):
        return None
    error = spread * math.sqrt(math.pi / 3 * sum(1 / n for n in launches))
    return (1 + floor) * math.exp(_quantiles(cases) * error) - 1


def launches_to_detect(change: float, spread: float, floor: float, cases: int) -> int:
    """About how many launches per side show a slowdown (above the floor), see
    :func:`detectable_change`."""
    return max(
        _launches_to_tell(change, floor, spread, _quantiles(cases)), launches_needed(2 * cases)
    )


def launches_to_decide(ratio: float, spread: float, limit: float, cases: int) -> int | None:
    """About how many launches per side tell a ratio of times from a limit, with a chance of
    ``POWER``: below the limit by the interval of the ratio, above it by the test, which is
    corrected for the number of cases.  None for a ratio at the limit.

    Args:
        limit: allowed slowdown, 0.05 for 5 %.
    """
    if abs(math.log(ratio) - math.log1p(limit)) < 1e-9:
        return None
    below = ratio < 1 + limit
    n = _launches_to_tell(ratio - 1, limit, spread, _quantiles(1 if below else cases))
    return max(n, MIN_LAUNCHES if below else launches_needed(2 * cases))


def _launches_to_tell(change: float, limit: float, spread: float, quantiles: float) -> int:
    """Launches per side that tell a change from a limit, by the normal approximation."""
    distance = math.log1p(change) - math.log1p(limit)
    return math.ceil(2 * math.pi / 3 * (quantiles * spread / distance) ** 2)


def _quantiles(cases: int) -> float:
    """Normal quantiles of the level, corrected for the number of cases, and the power, added."""
    normal = NormalDist()
    return normal.inv_cdf(1 - ALPHA / (2 * cases)) + normal.inv_cdf(POWER)


def _trimmed_differences(m: int, n: int, alpha: float = ALPHA) -> int:
    """Number of ordered differences outside of the interval at either end: the largest u for which
    the Mann-Whitney statistic U has P(U <= u) of at most half of ``alpha``."""
    total, below = math.comb(m + n, n), 0
    for value, count in enumerate(_statistic_counts(m, n)):
        below += count
        if below / total > alpha / 2:
            return max(value - 1, 0)
    raise AssertionError


def _statistic_counts(m: int, n: int) -> list[int]:
    """Number of rankings for each value of the Mann-Whitney statistic: coefficients of the Gaussian
    binomial."""
    counts = [1] + [0] * (m * n)
    for i in range(1, n + 1):
        for value in range(m * n, m + i - 1, -1):
            counts[value] -= counts[value - m - i]
        for value in range(i, m * n + 1):
            counts[value] += counts[value - i]
    return counts


def _median(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
