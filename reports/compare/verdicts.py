"""Comparison of two runs: a verdict per case, and differences of machine and software."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpbench.core.problem import Case
from cpbench.reports.compare.statistics import (
    ALPHA,
    UNCLEAR,
    RatioTest,
    compare_medians,
    decide_verdicts,
    detectable_change,
    launches_to_detect,
    relative_spread,
)
from cpbench.reports.labels import pluralize
from cpbench.results.contest import MIN_LAUNCHES, launches_needed
from cpbench.results.record import APPROXIMATE, DISQUALIFYING, Record
from cpbench.results.store import Run
from cpbench.results.worlds import world_of

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_FLOOR = 0.02
_MAX_WARNINGS = 20  # of a run
EXAMPLE_CHANGE = 0.1  # of a time, for which the launches that it takes are given
RECALL_TOLERANCE = 0.01  # difference of attention recall that is ignored
FAILS, WORKS, MISSING, ADDED, NEITHER = "FAILS", "WORKS", "MISSING", "ADDED", "NEITHER"

COLUMNS = {
    "id": "case id",
    "case": "label of the case",
    "verdict": "SAME, FASTER, SLOWER or UNCLEAR; FAILS (was ok), WORKS (was not), NEITHER (is ok), "
    "MISSING in the new run, ADDED by it",
    "why": "reason of the verdict, where it is not the ratio; for UNCLEAR, what it would take",
    "base_ms": "median over launches of their medians, base",
    "new_ms": "the same, new run",
    "ratio": "time of the new run over that of the base (Hodges-Lehmann); processor times are "
    "divided by the pace of the machine first",
    "spread": "standard deviation of the logarithms of the medians of launches, within sides",
    "detectable": "smallest slowdown that these launches show with a chance of 80 %, if any",
    "needed_launches": "launches per side that show a change of 10 % (or twice the floor) so",
    "low": "lower end of the 95 % interval of the ratio",
    "high": "its upper end",
    "base_launches": "processes, or gangs of workers, that measured the case, base",
    "new_launches": "the same, new run",
    "base_peak_mb": "peak memory excluding the inputs, max per rank, median over launches, base",
    "new_peak_mb": "the same, new run",
    "memory_ratio": "peak memory, new over base",
    "base_status": "status of the newest record, base",
    "new_status": "the same, new run",
    "new_flaws": "flags of the new run with which its times do not count",
}


_NUMBERS = (
    "base_ms", "new_ms", "ratio", "spread", "detectable", "needed_launches", "low", "high",
    "base_peak_mb", "new_peak_mb", "memory_ratio",
)  # fmt: skip


def compare(
    base: Run, new: Run, floor: float = DEFAULT_FLOOR, alpha: float = ALPHA
) -> pd.DataFrame:
    """Compare two runs: a row for each case in either run, with the columns of ``COLUMNS``.

    Cases with fewer than ``MIN_LAUNCHES`` launches on a side are UNCLEAR, whatever the times (see
    ``cpbench.reports.compare.statistics``).

    Args:
        floor: relative difference that is ignored, 0.02 for 2 %.
        alpha: false discovery rate; also one minus the level of intervals.
    """
    import pandas as pd

    pairs = _case_pairs(base, new)
    times = [_comparable_times(*pair) for pair in pairs.values()]
    tests = [
        compare_medians(a, b, floor, alpha) if min(len(a), len(b)) >= MIN_LAUNCHES else None
        for a, b in times
    ]
    cases = sum(bool(a and b) for a, b in times)
    rows = [
        _row(key, pair, test, verdict) | _evidence(*sides, floor, cases)
        for (key, pair), sides, test, verdict in zip(
            pairs.items(), times, tests, decide_verdicts(tests, floor, alpha), strict=True
        )
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in _NUMBERS:  # nan where unknown, in all rows too
        table[column] = pd.to_numeric(table[column])
    unclear = table["verdict"] == UNCLEAR
    table.loc[unclear, "why"] = [
        _what_it_takes(row, floor) for row in table[unclear].to_dict("records")
    ]
    return table


def environment_differences(base: Run, new: Run) -> list[str]:
    """Differences between machines and software of two runs that may matter, a line each."""
    return [
        f"{name} differs: {_join(base_values)} in the base, {_join(new_values)} in the new run"
        for name, (base_values, new_values) in _paired_facts(base, new).items()
        if base_values != new_values and name != "cpbench"
    ]


def describe_commits(base: Run, new: Run) -> str:
    """The commits of cpbench of both runs, in words."""
    base_commits, new_commits = _paired_facts(base, new)["cpbench"]
    if base_commits == new_commits:
        return f"cpbench {_join(base_commits)} on both sides"
    return f"cpbench {_join(base_commits)} in the base, {_join(new_commits)} in the new run"


def comparison_caveats(
    table: pd.DataFrame, base: Run, new: Run, floor: float, unclear_cases: bool = True
) -> list[str]:
    """What weakens the verdicts of a comparison, a line each.

    Args:
        table, floor: of :func:`compare`.
        unclear_cases: whether to say what UNCLEAR cases would take.
    """
    lines = [f"Warning: {line}" for line in environment_differences(base, new)]
    for name, run in (("base", base), ("new run", new)):
        lines += [f"Warning: {name}: {warning}" for warning in run.warnings[:_MAX_WARNINGS]]
    both = table["base_launches"].gt(0) & table["new_launches"].gt(0)
    unclear = table[table["verdict"] == UNCLEAR]
    unclear = unclear if unclear_cases else unclear.iloc[:0]
    if few := int(unclear["low"].isna().sum()):
        lines.append(
            f"UNCLEAR, too few launches: {pluralize(few, 'case')}. Each side needs {MIN_LAUNCHES} "
            f"or more: cpbench run SWEEP --launches {MIN_LAUNCHES}, or again with more."
        )
    if len(needed_launches := unclear["needed_launches"].dropna()):
        lines.append(
            "UNCLEAR: what these launches could show is beside each case; at their noise (median "
            f"spread of launches {unclear['spread'].median():.1%}), a change of "
            f"{_example_change(floor):.0%} takes about {needed_launches.median():.0f} launches per "
            "side."
        )
    timed = table[both]
    least = timed[["base_launches", "new_launches"]].min().min() if len(timed) else 0
    needed = launches_needed(2 * len(timed))  # slower, and faster
    if MIN_LAUNCHES <= least < needed:
        lines.append(
            f"With {least} launches per side, a single case among {len(timed)} cannot be "
            f"significant: that takes {needed}."
        )
    timed_ids = set(timed["id"])
    pairs = [pair for key, pair in _case_pairs(base, new).items() if key in timed_ids]
    separate = sum(_not_interleaved(a.launches, b.launches) for a, b in pairs)
    if separate:
        lines.append(
            f"Not interleaved: {pluralize(separate, 'case')} measured first in one run and then in "
            "the other; drift looks like a difference. Alternate the runs, or let race do it."
        )
    launches = [launch for pair in pairs for side in pair for launch in side.launches]
    if any(launch.pace_us for launch in launches):
        lines.append(
            "Processor time: changes are of times over the pace of the machine; ms are as measured."
        )
    flags = {flag for launch in launches for flag in launch.flags}
    disturbed = sorted(flags & {"contended", "throttled", "power-capped", "oversubscribed"})
    if disturbed:
        lines.append(f"Some launches are {', '.join(disturbed)}: verdicts are less certain.")
    if any(map(_needs_cpu_clock, launches)):
        lines.append(
            'Contended cases of one rank on a CPU: with clock = "cpu" under [measure], other '
            "processes disturb them less, and changes take fewer launches."
        )
    return lines


def _needs_cpu_clock(launch: Record) -> bool:
    """Whether a launch was disturbed by other processes and need not have been."""
    conditions = launch.conditions.get("device"), launch.conditions.get("clock")
    single_rank = launch.case.world_size == 1 and conditions == ("cpu", "wall")
    return single_rank and "contended" in launch.flags


@dataclass(frozen=True)
class _Side:
    """A case in one run: its newest record, if any, and its launches."""

    record: Record | None = None
    launches: Sequence[Record] = ()

    @property
    def flaws(self) -> list[str]:
        """Flags with which its times do not count; a selector is compared with itself."""
        records = self.launches or ([self.record] if self.record else [])
        reasons = {reason for record in records for reason in record.disqualifications}
        return [flag for flag in DISQUALIFYING if flag in reasons and flag != APPROXIMATE]


def _case_pairs(base: Run, new: Run) -> dict[str, tuple[_Side, _Side]]:
    """Every case of either run, by id; files with the code under test may differ in content."""
    sides: list[dict[str, _Side]] = []
    for run in (base, new):
        by_age = sorted(run.records.items(), key=lambda item: item[1].order)
        sides.append({case_key(r.case): _Side(r, run.launches.get(i, ())) for i, r in by_age})
    keys = dict.fromkeys(case_key(r.case) for run in (base, new) for r in run.records.values())
    return {key: (sides[0].get(key, _Side()), sides[1].get(key, _Side())) for key in keys}


def case_key(case: Case) -> str:
    """Id of a case in a comparison: the same for other versions of the code that it names."""
    return replace(case, content=case.data_content).id if case.content else case.id


def _row(
    key: str, pair: tuple[_Side, _Side], test: RatioTest | None, verdict: str
) -> dict[str, Any]:
    base, new = pair
    case: Case = (base.record or new.record).case  # type: ignore[union-attr]
    row: dict[str, Any] = {"id": key, "case": case.label, "verdict": verdict, "why": ""}
    times_by_side = [_launch_medians(side) for side in pair]
    for name, side, times in zip(("base", "new"), pair, times_by_side, strict=True):
        row[f"{name}_status"] = side.record.status if side.record else None
        row[f"{name}_launches"] = len(times)
        if times:
            row[f"{name}_ms"] = statistics.median(times) / 1e3
        peaks = [peak for launch in side.launches if (peak := launch.peak_bytes) is not None]
        if peaks:
            row[f"{name}_peak_mb"] = statistics.median(peaks) / 1e6
    if row.get("base_peak_mb") and "new_peak_mb" in row:
        row["memory_ratio"] = row["new_peak_mb"] / row["base_peak_mb"]
    if test is not None:
        row |= {"ratio": test.ratio, "low": test.low, "high": test.high}
    elif all(times_by_side):
        row["ratio"] = row["new_ms"] / row["base_ms"]
    row["new_flaws"] = " ".join(new.flaws)
    status_verdict = _status_verdict(base, new)
    if status_verdict is not None:
        row["verdict"], row["why"] = status_verdict
    return row


def _evidence(
    base: Sequence[float], new: Sequence[float], floor: float, cases: int
) -> dict[str, float | None]:
    """What the launches of a case could show, and how many would show a change."""
    spread = relative_spread(base, new) if base and new else None
    if spread is None:
        return {}
    return {
        "spread": spread,
        "detectable": detectable_change(spread, (len(base), len(new)), floor, cases),
        "needed_launches": launches_to_detect(_example_change(floor), spread, floor, cases),
    }


def _example_change(floor: float) -> float:
    """A change well above the floor, for which the launches that it takes are given."""
    return max(EXAMPLE_CHANGE, 2 * floor)


def _what_it_takes(row: dict[Any, Any], floor: float) -> str:
    """Why a case is unclear, and what would make it clear."""
    least, parts = min(row["base_launches"], row["new_launches"]), []
    if least < MIN_LAUNCHES:
        parts.append(f"{least} of {MIN_LAUNCHES} launches")
    elif not math.isnan(row["detectable"]):
        parts.append(f"shows {row['detectable']:.0%} or more")
    if not math.isnan(row["needed_launches"]):
        change = f"{_example_change(floor):.0%}"
        parts.append(f"{change} takes about {row['needed_launches']:.0f} per side")
    return "; ".join(parts)


def _status_verdict(base_side: _Side, new_side: _Side) -> tuple[str, str] | None:
    """Verdict and reason where times do not decide; None where they do."""
    base, new = base_side.record, new_side.record
    if new is None:
        return MISSING, "not in the new run"
    if base is None:
        return ADDED, f"not in the base; {new.status} in the new run"
    if base.status == new.status == "ok" and (base_side.flaws or new_side.flaws):
        runs = [name for name, side in (("base", base_side), ("new run", new_side)) if side.flaws]
        flaws = dict.fromkeys([*base_side.flaws, *new_side.flaws])
        verdict = WORKS if not new_side.flaws else NEITHER if base_side.flaws else FAILS
        return verdict, f"{', '.join(flaws)} in the {' and the '.join(runs)}"
    if base.status == new.status == "ok" and (changed := _incomparable(base_side, new_side)):
        return NEITHER, changed
    if base.status == new.status == "ok":
        was, now = (record.quality.get("mass") for record in (base, new))
        if was is not None and now is not None and abs(now - was) > RECALL_TOLERANCE:
            return (FAILS if now < was else NEITHER), f"attention recall {now:.1%}, was {was:.1%}"
        return None if base.times_us and new.times_us else (NEITHER, "not timed")
    if new.status == "ok":
        return WORKS, f"was {base.status}: {base.reason}"
    if base.status == "ok":
        return FAILS, f"{new.status}: {new.reason}"
    return NEITHER, f"{base.status}, then {new.status}: {new.reason}"


def _incomparable(base: _Side, new: _Side) -> str:
    """Conditions in which the times of two sides differ, so that they are no times of the same
    thing, in words; "" if there are none."""
    texts = []
    for name in ("device", "clock", "threads", "transport"):
        values = [
            {str(launch.conditions.get(name, "")) for launch in side.launches}
            for side in (base, new)
        ]
        if all(values) and values[0] != values[1]:
            was, now = (_join(value) or "none" for value in values)
            texts.append(f"{name} {was} in the base, {now} in the new run")
    return f"not comparable: {'; '.join(texts)}" if texts else ""


def _comparable_times(base: _Side, new: _Side) -> tuple[list[float], list[float]]:
    """Median time of each launch on either side, divided by the pace of the machine meanwhile where
    all launches have it; none where the times of a side do not count."""
    if base.flaws or new.flaws or _incomparable(base, new):
        return [], []
    paced = [[launch.paced for launch in side.launches] for side in (base, new)]
    if all(ratio is not None for side in paced for ratio in side):
        base_ratios, new_ratios = ([ratio for ratio in side if ratio is not None] for side in paced)
        return base_ratios, new_ratios
    return _launch_medians(base), _launch_medians(new)


def _launch_medians(side: _Side) -> list[float]:
    """Median of each launch, microseconds."""
    return [launch.median_us for launch in side.launches if launch.median_us]


def _not_interleaved(base: Sequence[Record], new: Sequence[Record]) -> bool:
    """Whether all launches of one side started before any of the other."""
    if not base or not new:
        return False
    a, b = [launch.started for launch in base], [launch.started for launch in new]
    return max(a) < min(b) or max(b) < min(a)


def _paired_facts(base: Run, new: Run) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Facts of machine, software and conditions by name: the values in either run."""
    facts = [_run_facts(run) for run in (base, new)]
    names = dict.fromkeys(["cpbench", *facts[0], *facts[1]])
    none = frozenset({"none"})
    return {name: (facts[0].get(name, none), facts[1].get(name, none)) for name in names}


def _run_facts(run: Run) -> dict[str, frozenset[str]]:
    """Values of each fact over all timed launches of a run."""
    used = {launch.environment for launches in run.launches.values() for launch in launches}
    values_by_name: dict[str, set[str]] = {}

    def add(name: str, value: object) -> None:
        if value not in (None, ""):
            values_by_name.setdefault(name, set()).add(str(value))

    for key in used & set(run.environments):
        environment = run.environments[key or ""]
        for name, value in world_of(environment, {}).items():
            add(name, value)
        for node in environment.get("nodes", ()):
            add("links between GPUs", _gpu_links(node.get("gpus")))
    records = [launch for launches in run.launches.values() for launch in launches]
    for record in records:
        for name, value in record.conditions.items():
            add(name, value)
    clocks = [mhz for record in records for rank in record.telemetry
              if (mhz := rank.get("sm_mhz", {}).get("median"))]  # fmt: skip
    if clocks:  # to within 2 %: clocks fluctuate
        add("SM clock (MHz, about)", round(statistics.median(clocks) / 30) * 30)
    return {name: frozenset(values) for name, values in values_by_name.items()}


def _gpu_links(gpus: object) -> str | None:
    return str(gpus.get("links", gpus)) if isinstance(gpus, dict) else None


def _join(values: Iterable[str]) -> str:
    return " and ".join(sorted(values))
