"""Worlds: the machine, software and conditions of a measurement.

Launches of a case are pooled only where these are the same.  A world is a table of facts by name,
without those that differ between jobs and do not matter.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from cpbench.core.environment import concerns_job
from cpbench.core.settings import PRECISION_SETTINGS, SCOPE_SETTINGS

if TYPE_CHECKING:
    from cpbench.results.record import Record
    from cpbench.results.store import Run

World = Mapping[str, str]
Difference = tuple[str, str, str]  # fact, its value, the value it is compared with

_OF_HOST = {
    "host": "host", "processor": "processor", "cores": "cores", "affinity": "affinity",
    "python": "python", "kernel": "system",
}  # fmt: skip
_OF_DEVICE = {
    "GPU": "name", "driver": "driver", "CUDA": "cuda", "cuDNN": "cudnn", "NCCL": "nccl",
    "priority of NCCL's streams": "nccl_streams", "power limit (mW)": "power_limit_mw",
    "threads per rank": "threads",
}  # fmt: skip
# Where a record has none of these, they are unknown; packages and variables were not there.
_MAY_BE_UNKNOWN = frozenset((*_OF_HOST, *_OF_DEVICE, "cpbench", *PRECISION_SETTINGS))
_MACHINE = ("host", "processor", "GPU")  # reports show machines apart
_ENVIRONMENT = "environment"  # a fact of records whose environment is not in their directory
_MAX_NAMED = 4  # facts in a line
_MAX_CHARS = 60  # of a value in a line


def world_of(environment: Mapping[str, Any], conditions: Mapping[str, Any]) -> dict[str, str]:
    """The world of a measurement in an environment, under conditions."""
    device = environment.get("device", {})
    facts = {name: environment.get(key) for name, key in _OF_HOST.items()}
    facts |= {name: device.get(key) for name, key in _OF_DEVICE.items()}
    facts["cpbench"] = environment.get("commit") or environment.get("cpbench")
    facts |= environment.get("packages", {})
    for name, value in environment.get("variables", {}).items():
        if not concerns_job(name):
            facts[name] = value
    if hosts := {str(rank.get("host")) for rank in environment.get("ranks", ())}:
        facts["host"] = ", ".join(sorted(hosts))
    facts |= {name: value for name, value in conditions.items() if name not in SCOPE_SETTINGS}
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def differences(world: World, reference: World) -> tuple[Difference, ...]:
    """The facts in which a world differs from another one."""
    found = []
    for name in dict.fromkeys([*reference, *world]):
        own, other = world.get(name), reference.get(name)
        if own != other and not (name in _MAY_BE_UNKNOWN and None in (own, other)):
            found.append((name, own or "none", other or "none"))
    lost = [one for one in found if one[0] == _ENVIRONMENT]
    return tuple(lost or found)


def describe(facts: Iterable[Difference]) -> str:
    """``torch 2.9.0 instead of 2.10.0, …``."""
    texts = [f"{name} {_short(own)} instead of {_short(other)}" for name, own, other in facts]
    more = [f"{len(texts) - _MAX_NAMED} more differences"] if len(texts) > _MAX_NAMED + 1 else []
    return ", ".join(texts[:_MAX_NAMED] + more if more else texts)


def _short(value: str) -> str:
    return value if len(value) <= _MAX_CHARS else f"{value[:_MAX_CHARS]}…"


def record_world(record: Record, environments: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The world of a record of a run directory with these environments."""
    environment = environments.get(record.environment or "")
    if environment is None:
        return {**world_of({}, record.conditions), _ENVIRONMENT: f"unknown ({record.environment})"}
    return world_of(environment, record.conditions)


def newest_world(run: Run) -> World | None:
    """The world of the newest timed record whose environment is known."""
    known = [r for r in run.records.values() if r.times_us and r.environment in run.environments]
    newest = max(known, key=lambda record: record.order, default=None)
    return record_world(newest, run.environments) if newest else None


def change_warnings(run: Run, present: World) -> list[str]:
    """A line if the results of a run directory are of another world than the present one."""
    recorded = newest_world(run)
    changed = differences(present, recorded) if recorded else ()
    if not changed:
        return []
    return [f"what runs now has {describe(changed)}: launches of both are not pooled"]


def mixture_warnings(run: Run) -> list[str]:
    """A line for each way in which launches of a case, or cases that reports compare, differ in
    their worlds."""
    return [*_mixed_launches(run), *_mixed_cases(run)]


def _mixed_launches(run: Run) -> list[str]:
    counts, cases = Counter[tuple[Difference, ...]](), defaultdict(set)
    for case, launches in run.other_launches.items():
        reference = record_world(run.records[case], run.environments)
        for launch in launches:
            facts = differences(record_world(launch, run.environments), reference)
            counts[facts] += 1
            cases[facts].add(case)
    lines = []
    for facts, count in counts.most_common():
        total = sum(
            len(run.launches[case]) + len(run.other_launches[case]) for case in cases[facts]
        )
        of_cases = f"{len(cases[facts])} case{'s' if len(cases[facts]) > 1 else ''}"
        lines.append(
            f"{count} of {total} launches of {of_cases} had {describe(facts)}: left out, only "
            "launches like the newest are pooled"
        )
    return lines


def _mixed_cases(run: Run) -> list[str]:
    """Lines on the cases of one machine and number of ranks, which reports compare."""
    facts = {key: world_of(environment, {}) for key, environment in run.environments.items()}
    groups: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    for record in run.records.values() if len(facts) > 1 else ():
        if record.environment in facts and record.status == "ok" and record.times_us:
            machine = map(facts[record.environment].get, _MACHINE)
            groups[record.case.world_size, *machine].append(record)
    counts, totals = Counter[tuple[Difference, ...]](), Counter[tuple[Difference, ...]]()
    for records in groups.values():
        newest = max(records, key=lambda record: record.order)
        reference, found = facts[newest.environment or ""], Counter[tuple[Difference, ...]]()
        for key, count in Counter(record.environment for record in records).items():
            found[differences(facts[key or ""], reference)] += count
        del found[()]
        counts += found
        totals += Counter(dict.fromkeys(found, len(records)))
    return [
        f"{count} of {totals[found]} cases had {describe(found)}: they are compared all the same"
        for found, count in counts.most_common()
    ]
