"""A history: series of cases over versions, what changed and where, as rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpbench.reports.collection import collect
from cpbench.reports.history.series import Point, Series, Step, make_series
from cpbench.reports.history.versions import (
    Version,
    change_of_world,
    commits_between,
    short_names,
    versions,
)
from cpbench.reports.labels import pluralize, signed_percent, split_common_words, three_digits


@dataclass(frozen=True)
class History:
    """Series of cases over versions.

    Attributes:
        versions: oldest first.
        order: by what they are ordered, in words.
        metric: a key of ``series.METRICS``.
        floor: relative difference that is ignored.
        series: of every case, those with the largest step first.
    """

    versions: list[Version]
    order: str
    metric: str
    floor: float
    series: list[Series]

    @property
    def names(self) -> list[str]:
        return short_names(self.versions)

    @property
    def common(self) -> str:
        """What all cases have in common, in words; "" for nothing."""
        return split_common_words([series.case for series in self.series])[0]

    @property
    def answer(self) -> str:
        """One sentence: how many cases changed, and at which versions."""
        at = Counter(step.index for series in self.series for step in series.steps)
        changed = sum(bool(series.steps) for series in self.series)
        cases = pluralize(len(self.series), "case")
        if changed:
            where = ", ".join(
                f"{self.names[i]} ({pluralize(n, 'case')})" for i, n in sorted(at.items())
            )
            parts = [f"{changed} of {cases} changed: at {where}"]
        else:
            parts = [f"No step in {cases} over {pluralize(len(self.versions), 'version')}"]
        if failing := sum(bool(_status_change(self, series)) for series in self.series):
            parts.append(f"no longer ok: {pluralize(failing, 'case')}")
        if untested := sum(bool(series.untested) for series in self.series):
            parts.append(f"changes of {pluralize(untested, 'case')} have too few launches to tell")
        return "; ".join(parts) + "."

    @property
    def notes(self) -> list[str]:
        lines = [
            f"step: a change of level by more than {self.floor:.1%}, significant over launches "
            "(rank test, false discovery rate 5 %); interval: of the ratio of the levels, 95 %.",
            f"Versions are ordered by {self.order}.",
        ]
        for i in sorted({step.index for series in self.series for step in series.steps}):
            before = max(s.previous for one in self.series for s in one.steps if s.index == i)
            count = commits_between(self.versions[before], self.versions[i])
            if count and count > 1:
                lines.append(
                    f"{self.names[i]} is the last of {count} commits since {self.names[before]}: "
                    "those between were not measured."
                )
            if world := change_of_world(self.versions[before], self.versions[i]):
                lines.append(f"Warning: {self.names[i]} also has {world}.")
        few = sum(len(point.launches) == 1 for one in self.series for point in one.points if point)
        if few:
            lines.append(
                f"{few} of the points are one launch: a step needs five launches on either side "
                "(of one version or several)."
            )
        return lines


def read_history(
    folders: Sequence[Path], metric: str, floor: float, where: Sequence[str] = ()
) -> History:
    """Read run directories.

    Raises:
        ValueError: see :func:`collect`; and for a single version.
    """
    runs = {name: run for folder in folders for name, run in collect([folder], where).runs.items()}
    found, order = versions(runs)
    if len(found) < 2:
        raise ValueError("a history takes run directories of two versions or more")
    return History(found, order, metric, floor, make_series(found, metric, floor))


def rows(history: History) -> list[dict[str, str]]:
    """A row for each step, largest first, then for each case without one."""
    result = []
    labels = split_common_words([series.case for series in history.series])[1]
    for series, label in zip(history.series, labels, strict=True):
        base = {"case": label}
        if len({one.machine for one in history.series}) > 1:
            base["machine"] = series.machine
        steps: list[Step | None] = [*series.steps] or [None]
        for step in steps:
            result.append({**base, **_step_cells(history, series, step)})
    return result


def _step_cells(history: History, series: Series, step: Step | None) -> dict[str, str]:
    at = series.measured
    first, last = (_median(series.points[i]) for i in (at[0], at[-1])) if at else (math.nan,) * 2
    cells = {
        "versions": f"{len(at)} of {len(history.versions)}", "first": three_digits(first),
        "last": three_digits(last), "step": "", "interval": "", "at": "", "after": "",
    }  # fmt: skip
    if step is not None:
        low, high = (signed_percent(end - 1) for end in (step.test.low, step.test.high))
        cells |= {
            "step": signed_percent(step.test.ratio - 1), "interval": f"{low} to {high}",
            "at": history.names[step.index], "after": history.names[step.previous],
        }  # fmt: skip
    elif problem := _status_change(history, series):
        cells["step"] = problem
    elif series.untested:
        index, ratio = series.untested[-1]
        cells |= {"step": f"{signed_percent(ratio - 1)}?", "interval": "too few launches",
                  "at": history.names[index]}  # fmt: skip
    return cells


def _median(point: Point | None) -> float:
    return point.median if point else math.nan


def _status_change(history: History, series: Series) -> str:
    """``crash since 1a2b3c``, where the newest version of a case is not ok; or ``""``."""
    statuses = [(i, point.status) for i, point in enumerate(series.points) if point]
    if not statuses or statuses[-1][1] == "ok" or all(s != "ok" for _, s in statuses):
        return ""
    status = statuses[-1][1]
    since = next(i for k, (i, _) in enumerate(statuses) if all(s != "ok" for _, s in statuses[k:]))
    return f"{status} since {history.names[since]}"


def data_rows(history: History) -> list[dict[str, Any]]:
    """A row for each case and version, for programs."""
    result = []
    for series in history.series:
        steps = {step.index: step for step in series.steps}
        for i, point in enumerate(series.points):
            if point is None:
                continue
            step = steps.get(i)
            result.append(
                {
                    "id": series.id, "case": series.case, "machine": series.machine,
                    "version": history.versions[i].name, "position": i, "status": point.status,
                    history.metric: None if math.isnan(point.median) else point.median,
                    "launches": len(point.launches),
                    "step_ratio": step.test.ratio if step else None,
                    "step_low": step.test.low if step else None,
                    "step_high": step.test.high if step else None,
                }
            )  # fmt: skip
    return result
