"""Launches of a case: which of its records are pooled, and whether their results agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cpbench.core.tolerance import LIMITS
from cpbench.results.record import APPROXIMATE, LAUNCHES_DIFFER, UNFINISHED, Record
from cpbench.results.worlds import World, differences, record_world

if TYPE_CHECKING:
    from cpbench.results.store import Run


def split_launches(
    records: Sequence[Record], environments: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Record], list[Record]]:
    """The launches of a case that are of the world of its newest record, and the others: records
    that are ok and timed, one per writer; none if the newest is not.  Earlier ones that were
    interrupted between turns are left out.

    Args:
        records: of the case, oldest first.
    """
    newest = records[-1]
    if newest.status != "ok" or not newest.times_us:
        return [], []
    if len(records) == 1:
        return [newest], []
    timed = {
        record.writer: record
        for record in records
        if record.status == "ok"
        and record.times_us
        and (record is newest or UNFINISHED not in record.flags)
    }
    reference = record_world(newest, environments)
    launches: tuple[list[Record], list[Record]] = ([], [])
    for record in timed.values():
        differs = differences(record_world(record, environments), reference)
        launches[bool(differs)].append(record)
    return launches


def flag_differing_results(launches: Sequence[Record]) -> None:
    """Flag the launches of a case whose checked results differ, by their fingerprints, from those
    of the first, by more than errors may be.  Records without fingerprints are not compared."""
    known = [one for one in launches if one.fingerprint and APPROXIMATE not in one.flags]
    for other in known[1:]:
        if _results_differ(known[0], other):
            for one in (known[0], other):
                one.flags = sorted({*one.flags, LAUNCHES_DIFFER})


def _results_differ(first: Record, other: Record) -> bool:
    allowed = 2 * LIMITS[first.case.dtype][0]
    for name in first.fingerprint.keys() & other.fingerprint.keys():
        *sums, weight = first.fingerprint[name]
        *others, _ = other.fingerprint[name]
        differences = [abs(a - b) for a, b in zip(sums, others, strict=True)]
        if not max(differences) <= allowed * math.sqrt(weight):
            return True
    return False


def count_launches(run: Run, case: str, world: World) -> int:
    """How many launches of a case (its id) are of a world."""
    launches = [*run.launches[case], *run.other_launches.get(case, ())]
    return sum(not differences(record_world(one, run.environments), world) for one in launches)
