"""One run against another: a verdict for each case, and what else differs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpbench.core.problem import Case
from cpbench.reports.compare.statistics import FEWEST, Evidence, enough, verdicts, weigh
from cpbench.reports.labels import counted
from cpbench.results.record import Record
from cpbench.results.store import Run

if TYPE_CHECKING:
    import pandas as pd

FLOOR = 0.02
RECOVERS = 0.01  # by how much what a choice recovers may differ, and it be the same
FAILS, WORKS, MISSING, ADDED, NEITHER = "FAILS", "WORKS", "MISSING", "ADDED", "NEITHER"

COLUMNS = {
    "id": "case id",
    "case": "what ran, on what",
    "verdict": "SAME, FASTER, SLOWER or UNCLEAR; FAILS (was ok), WORKS (was not), NEITHER (is ok), "
    "MISSING in the new run, ADDED by it",
    "why": "what makes the verdict, where it is not the ratio",
    "base_ms": "median of the launches' medians",
    "new_ms": "the same of the new run",
    "ratio": "time of the new run over the base's (Hodges and Lehmann), of processor time after "
    "division by the pace of the machine",
    "low": "lower end of the 95 % interval of the ratio",
    "high": "its upper end",
    "base_launches": "processes, or gangs of them, that measured the case",
    "new_launches": "the same of the new run",
    "base_peak_mb": "peak memory beside the inputs, largest rank, median over launches",
    "new_peak_mb": "the same of the new run",
    "memory_ratio": "new over base",
    "base_status": "of the newest record",
    "new_status": "of the newest record",
}

_PASSING = (  # environment variables that tell one job from another, not what matters
    "SLURM_",
    "GLOO_SOCKET_IFNAME",
    "CUDA_VISIBLE_DEVICES",
)


def compare(base: Run, new: Run, floor: float = FLOOR) -> pd.DataFrame:
    """A row for each case that is in either run, with the columns of ``COLUMNS``.

    Args:
        floor: the relative difference that does not matter, 0.02 for 2 %.

    Fewer than five launches on a side are UNCLEAR, whatever the times (see
    ``cpbench.reports.compare.statistics``).
    """
    import pandas as pd

    pairs = _pairs(base, new)
    times = [_evidence(*pair) for pair in pairs.values()]
    found = [weigh(a, b, floor) if min(len(a), len(b)) >= FEWEST else None for a, b in times]
    rows = [
        _row(key, pair, evidence, verdict)
        for (key, pair), evidence, verdict in zip(
            pairs.items(), found, verdicts(found, floor), strict=True
        )
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def differences(base: Run, new: Run) -> list[str]:
    """What differs between the machines and software of two runs and may matter, a line each."""
    return [
        f"{name} differs: {_several(there)} in the base, {_several(here)} in the new run"
        for name, (there, here) in _facts(base, new).items()
        if there != here and name != "cpbench"
    ]


def commits(base: Run, new: Run) -> str:
    """The commits of cpbench on either side, in words."""
    there, here = _facts(base, new)["cpbench"]
    if there == here:
        return f"cpbench {_several(there)} on both sides"
    return f"cpbench {_several(there)} in the base, {_several(here)} in the new run"


def cautions(table: pd.DataFrame, base: Run, new: Run) -> list[str]:
    """What weakens the verdicts of a comparison."""
    lines = [f"Warning: {line}" for line in differences(base, new)]
    both = table["base_launches"].gt(0) & table["new_launches"].gt(0)
    few = int((both & table[["base_launches", "new_launches"]].min(axis=1).lt(FEWEST)).sum())
    if few:
        lines.append(
            f"UNCLEAR for want of launches: {counted(few, 'case')}. Each side needs {FEWEST} or "
            f"more: cpbench run SWEEP --launches {FEWEST}, or again with more."
        )
    told = table[both]
    least = told[["base_launches", "new_launches"]].min().min() if len(told) else 0
    wanted = enough(len(told))
    if FEWEST <= least < wanted:
        lines.append(
            f"With {least} launches a side, one case alone among {len(told)} cannot be told from "
            f"chance: that takes {wanted}."
        )
    timed = set(told["id"])
    pairs = [pair for key, pair in _pairs(base, new).items() if key in timed]
    apart = sum(_apart(there.launches, here.launches) for there, here in pairs)
    if apart:
        lines.append(
            f"Not interleaved: {counted(apart, 'case')} measured first in one run and then in the "
            "other; what drifted meanwhile looks like a difference. Run them in turn: "
            "--launches 1, 2, 3, …"
        )
    if any(one.pace_us for pair in pairs for side in pair for one in side.launches):
        lines.append(
            "Processor time: changes are of times over the pace of the machine; ms are as measured."
        )
    flags = {flag for pair in pairs for side in pair for one in side.launches for flag in one.flags}
    disturbed = sorted(flags & {"contended", "throttled", "power-capped", "oversubscribed"})
    if disturbed:
        lines.append(f"Some launches are {', '.join(disturbed)}: verdicts are less certain.")
    return lines


@dataclass(frozen=True)
class _Side:
    """A case in one run: its newest record, if any, and its launches."""

    record: Record | None = None
    launches: Sequence[Record] = ()


def _pairs(base: Run, new: Run) -> dict[str, tuple[_Side, _Side]]:
    """Every case of either run, by id; where the code under test is a file, whatever is in it."""
    sides: list[dict[str, _Side]] = []
    for run in (base, new):
        by_age = sorted(run.records.items(), key=lambda item: item[1].started)
        sides.append({_key(r.case): _Side(r, run.launches.get(i, ())) for i, r in by_age})
    keys = dict.fromkeys(_key(r.case) for run in (base, new) for r in run.records.values())
    return {key: (sides[0].get(key, _Side()), sides[1].get(key, _Side())) for key in keys}


def _key(case: Case) -> str:
    return replace(case, content=case.data_content).id if case.content else case.id


def _row(
    key: str, pair: tuple[_Side, _Side], evidence: Evidence | None, verdict: str
) -> dict[str, Any]:
    there, here = (side.record for side in pair)
    case: Case = (there or here).case  # type: ignore[union-attr]
    row: dict[str, Any] = {"id": key, "case": case.label, "verdict": verdict, "why": ""}
    sides = [_medians(side) for side in pair]
    for name, side, times in zip(("base", "new"), pair, sides, strict=True):
        row[f"{name}_status"] = side.record.status if side.record else None
        row[f"{name}_launches"] = len(times)
        if times:
            row[f"{name}_ms"] = statistics.median(times) / 1e3
        peaks = [peak for one in side.launches if (peak := one.peak_bytes) is not None]
        if peaks:
            row[f"{name}_peak_mb"] = statistics.median(peaks) / 1e6
    if row.get("base_peak_mb") and "new_peak_mb" in row:
        row["memory_ratio"] = row["new_peak_mb"] / row["base_peak_mb"]
    if evidence is not None:
        row |= {"ratio": evidence.ratio, "low": evidence.low, "high": evidence.high}
    elif all(sides):
        row["ratio"] = row["new_ms"] / row["base_ms"]
        row["why"] = f"{min(map(len, sides))} of {FEWEST} launches"
    status = _status(there, here)
    if status is not None:
        row["verdict"], row["why"] = status
    return row


def _status(there: Record | None, here: Record | None) -> tuple[str, str] | None:
    """Verdict and reason where times are not what is to be told."""
    if here is None:
        return MISSING, "not in the new run"
    if there is None:
        return ADDED, f"not in the base; {here.status} in the new run"
    if there.status == here.status == "ok":
        was, now = (one.quality.get("mass") for one in (there, here))
        if was is not None and now is not None and abs(now - was) > RECOVERS:
            words = f"recovers {now:.1%} of full attention, not {was:.1%}"
            return (FAILS if now < was else NEITHER), words
        return None if there.times_us and here.times_us else (NEITHER, "not timed")
    if here.status == "ok":
        return WORKS, f"was {there.status}: {there.reason}"
    if there.status == "ok":
        return FAILS, f"{here.status}: {here.reason}"
    return NEITHER, f"{there.status}, then {here.status}: {here.reason}"


def _evidence(there: _Side, here: _Side) -> tuple[list[float], list[float]]:
    """A figure of each launch on either side: its median time, over the machine's pace meanwhile
    where all know it."""
    paced = [[one.paced for one in side.launches] for side in (there, here)]
    if all(pace is not None for side in paced for pace in side):
        base, new = ([pace for pace in side if pace is not None] for side in paced)
        return base, new
    return _medians(there), _medians(here)


def _medians(side: _Side) -> list[float]:
    """Median of each launch, microseconds."""
    return [one.median_us for one in side.launches if one.median_us]


def _apart(base: Sequence[Record], new: Sequence[Record]) -> bool:
    """Whether every launch of one side ended before any of the other began."""
    if not base or not new:
        return False
    a, b = [one.started for one in base], [one.started for one in new]
    return max(a) < min(b) or max(b) < min(a)


def _facts(base: Run, new: Run) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Everything that is told of both sides, by name: the values seen in each."""
    sides = [_seen(run) for run in (base, new)]
    names = dict.fromkeys(["cpbench", *sides[0], *sides[1]])
    none = frozenset({"none"})
    return {name: (sides[0].get(name, none), sides[1].get(name, none)) for name in names}


def _seen(run: Run) -> dict[str, frozenset[str]]:
    used = {one.environment for launches in run.launches.values() for one in launches}
    found: dict[str, set[str]] = {}

    def see(name: str, value: object) -> None:
        if value not in (None, ""):
            found.setdefault(name, set()).add(str(value))

    for key in used & set(run.environments):
        told = run.environments[key or ""]
        for name in ("host", "processor", "cores", "python"):
            see(name, told.get(name))
        see("kernel", told.get("system"))
        see("cpbench", told.get("commit") or told.get("cpbench"))
        for name, value in told.get("packages", {}).items():
            see(name, value)
        device = told.get("device", {})
        for name, what in (
            ("GPU", "name"), ("driver", "driver"), ("CUDA", "cuda"),
            ("power limit (mW)", "power_limit_mw"), ("threads", "threads"),
        ):  # fmt: skip
            see(name, device.get(what))
        for name, value in told.get("variables", {}).items():
            if not name.startswith(_PASSING):
                see(name, value)
        for node in told.get("nodes", ()):
            see("links between GPUs", _links(node.get("gpus")))
    records = [one for launches in run.launches.values() for one in launches]
    for record in records:
        for name, value in record.conditions.items():
            see(name, value)
    clocks = [mhz for record in records for told in record.telemetry
              if (mhz := told.get("sm_mhz", {}).get("median"))]  # fmt: skip
    if clocks:  # to within 2 %: they wander
        see("SM clock (MHz, about)", round(statistics.median(clocks) / 30) * 30)
    return {name: frozenset(values) for name, values in found.items()}


def _links(gpus: object) -> str | None:
    return str(gpus.get("links", gpus)) if isinstance(gpus, dict) else None


def _several(values: Iterable[str]) -> str:
    return " and ".join(sorted(values))
