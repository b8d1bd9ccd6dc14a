"""A series of times for each case, and the steps in it.

Candidates for steps come from optimal partitioning of the logarithms of the medians (PELT: Killick,
Fearnhead & Eckley 2012, by the library ruptures).  A candidate is a step if the launches before it
and after it, up to the neighbouring steps, differ by more than a floor, by the test of ``cpbench
compare``, with a false discovery rate of 5 % over all candidates of all cases.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cpbench.reports.compare.statistics import ALPHA, RatioTest, compare_medians
from cpbench.reports.compare.verdicts import case_key
from cpbench.reports.history.versions import Version
from cpbench.results.contest import MIN_LAUNCHES
from cpbench.results.record import APPROXIMATE, Record

_UNTESTED = 2  # times the floor, above which a change without a test is named
_MIN_SPREAD = 1e-3  # of launches, below which partitions would follow rounding
METRICS = {"ms": "time, ms", "peak": "peak memory, MB"}


@dataclass(frozen=True)
class Point:
    """A case in one version: its launches, if any, or the status of its record."""

    status: str
    launches: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.launches) if self.launches else math.nan


@dataclass(frozen=True)
class Step:
    """A change of level.

    Attributes:
        index: of the first version of the new level.
        previous: of the last version of the old one that was measured.
        test: ratio of the new level to the old, with its interval.
    """

    index: int
    previous: int
    test: RatioTest


@dataclass
class Series:
    """A case over the versions.

    Attributes:
        id, case: of the case.
        machine: that measured it.
        points: by version; None where the case is missing.
        steps: in order.
        untested: version and ratio of changes of level with too few launches for the test.
    """

    id: str
    case: str
    machine: str
    points: list[Point | None]
    steps: list[Step] = field(default_factory=list)
    untested: list[tuple[int, float]] = field(default_factory=list)

    @property
    def measured(self) -> list[int]:
        """Versions with launches."""
        return [i for i, point in enumerate(self.points) if point and point.launches]


def make_series(found: Sequence[Version], metric: str, floor: float) -> list[Series]:
    """The series of every case, with their steps, those with the largest step first.

    Where the pace of the machine was measured beside all launches of a case (``clock = "cpu"``),
    times are at the median pace.

    Args:
        metric: a key of ``METRICS``.
        floor: relative difference that is ignored, 0.02 for 2 %.
    """
    newest: dict[tuple[str, str], dict[int, Record]] = {}
    launches: dict[tuple[str, str], dict[int, list[Record]]] = {}
    for index, version in enumerate(found):
        for run in version.runs.values():
            for case_id, record in run.records.items():
                environment = run.environments.get(record.environment or "", {})
                key = case_key(record.case), str(environment.get("host", "unknown machine"))
                newest.setdefault(key, {})[index] = record
                of_version = launches.setdefault(key, {}).setdefault(index, [])
                of_version += [one for one in run.launches.get(case_id, ()) if _counts(one)]
    series = []
    for key, records in newest.items():
        values = _values(launches[key], metric)
        points = [
            Point(records[i].status, values[i]) if i in records else None for i in range(len(found))
        ]
        label = records[max(records)].case.label
        series.append(Series(key[0], label, key[1], points))
    _find_steps(series, floor)
    return sorted(series, key=lambda one: (-_largest_step(one), one.case, one.machine))


def _counts(launch: Record) -> bool:
    """Whether the times of a launch count; a selector is compared with itself."""
    return set(launch.disqualifications) <= {APPROXIMATE}


def _values(launches: Mapping[int, Sequence[Record]], metric: str) -> dict[int, tuple[float, ...]]:
    """A value of each launch by version: ms or MB."""
    if metric == "peak":
        return {
            index: tuple(peak / 1e6 for one in records if (peak := one.peak_bytes) is not None)
            for index, records in launches.items()
        }
    all_launches = [one for records in launches.values() for one in records]
    ratios = [one.paced for one in all_launches]
    medians = [one.median_us for one in all_launches]
    pairs = zip(medians, ratios, strict=True)
    paces = [us / ratio for us, ratio in pairs if us is not None and ratio]
    paced = len(paces) == len(all_launches) > 0
    pace = statistics.median(paces) if paced else 0.0
    return {
        index: tuple(
            us / 1e3
            for one in records
            if (us := (one.paced or 0.0) * pace if paced else one.median_us) is not None
        )
        for index, records in launches.items()
    }


def _find_steps(series: Sequence[Series], floor: float) -> None:
    """Find candidates in each series, and keep those that are significant among all."""
    from scipy.stats import false_discovery_control

    candidates = [(one, step) for one in series for step in _candidates(one, floor)]
    if not candidates:
        return
    adjusted = false_discovery_control([_p_value(step.test) for _, step in candidates])
    for (one, step), p_value in zip(candidates, adjusted, strict=True):
        if p_value <= ALPHA:
            one.steps.append(step)


def _candidates(series: Series, floor: float) -> list[Step]:
    """Boundaries of levels, with the test of the launches on either side.

    The least significant boundary is removed, and its levels joined, until all are significant.
    """
    measured = series.measured
    launches = [series.points[i].launches for i in measured]  # type: ignore[union-attr]
    edges = [0, *_boundaries([[math.log(x) for x in of] for of in launches]), len(measured)]
    while len(edges) > 2:
        tests = []
        for before, at, after in zip(edges, edges[1:], edges[2:], strict=False):
            old = [x for of in launches[before:at] for x in of]
            new = [x for of in launches[at:after] for x in of]
            enough = min(len(old), len(new)) >= MIN_LAUNCHES
            tests.append(compare_medians(old, new, floor) if enough else None)
        p_values = [_p_value(test) for test in tests]
        worst = max(range(len(tests)), key=p_values.__getitem__)
        if tests[worst] is None:
            at = edges[worst + 1]
            levels = [
                statistics.median(x for of in launches[start:end] for x in of)
                for start, end in ((edges[worst], at), (at, edges[worst + 2]))
            ]
            ratio = levels[1] / levels[0]
            if abs(math.log(ratio)) > math.log1p(_UNTESTED * floor):
                series.untested.append((measured[at], ratio))
        if p_values[worst] <= ALPHA:
            return [
                Step(measured[at], measured[at - 1], test)
                for at, test in zip(edges[1:], tests, strict=False)
                if test is not None
            ]
        del edges[worst + 1]
    return []


def _p_value(test: RatioTest | None) -> float:
    """Two-sided; 1 where there are too few launches."""
    return 1.0 if test is None else min(1.0, 2 * min(test.slower, test.faster))


def _boundaries(logs: Sequence[Sequence[float]]) -> list[int]:
    """Where the level of a series changes: indices of the first version of each new level.

    Args:
        logs: by version, of its launches.
    """
    if len(logs) < 2:
        return []
    import numpy as np
    import ruptures

    medians = [statistics.median(of) for of in logs]
    freedom = sum(len(of) - 1 for of in logs)
    if freedom:
        within = sum((x - m) ** 2 for of, m in zip(logs, medians, strict=True) for x in of)
        variance = within / freedom * math.pi / 2 / statistics.mean(map(len, logs))
    else:  # one launch each: from differences of neighbours, of which steps are few
        steps = [abs(b - a) for a, b in itertools.pairwise(medians)]
        variance = (statistics.median(steps) / 0.954) ** 2  # of a normal: 0.6745 * sqrt(2)
    penalty = 2 * math.log(len(logs) + 1) * max(variance, _MIN_SPREAD**2)
    partition = ruptures.Pelt(model="l2", min_size=1, jump=1).fit(np.array(medians)[:, None])
    found: list[int] = partition.predict(pen=penalty)
    return found[:-1]


def _largest_step(series: Series) -> float:
    return max((abs(math.log(step.test.ratio)) for step in series.steps), default=0.0)
