"""Which cases of a request are still to run, by what its run directory has recorded."""

from __future__ import annotations

from collections.abc import Collection

from cpbench.core import registry
from cpbench.core.problem import Case
from cpbench.core.settings import PRECISION_SETTINGS, SCOPE_SETTINGS
from cpbench.results import worlds
from cpbench.results.launches import count_launches
from cpbench.results.record import STATUSES, UNFINISHED, Record
from cpbench.results.store import Run, read_run, trace_path
from cpbench.sweep.request import Request


def satisfies(record: Record, request: Request) -> bool:
    """Whether a record was checked and timed, as far as the request wants that."""
    conditions = request.settings.conditions(request.device)
    return record.status != "ok" or all(
        record.conditions.get(key, False) or not conditions[key] for key in ("checked", "timed")
    )


def changed_settings(record: Record, request: Request) -> dict[str, str]:
    """By name, the settings with which a successful case was measured, and those of the request,
    where they differ: ``0.03, now 0.01``."""
    if record.status != "ok" or not record.times_us:
        return {}
    conditions = request.settings.conditions(request.device)
    return {
        name: f"{record.conditions[name]}, now {conditions[name]}"
        for name in (*PRECISION_SETTINGS, *SCOPE_SETTINGS)
        if name in record.conditions and record.conditions[name] != conditions[name]
    }


def settings_warnings(request: Request, run: Run, todo: Collection[Case]) -> list[str]:
    """A line for the recorded cases that were measured with other settings and are kept."""
    remaining = {case.id for case in todo}
    kept = [run.records[case.id] for case in request.cases
            if case.id in run.records and case.id not in remaining]  # fmt: skip
    changes = [changes for record in kept if (changes := changed_settings(record, request))]
    if not changes:
        return []
    names = dict.fromkeys(f"{name} {text}" for case in changes for name, text in case.items())
    count = f"{len(changes)} recorded case{'s' if len(changes) > 1 else ''}"
    return [f"{count} measured with {'; '.join(names)}: kept; --remeasure measures them again"]


def parse_statuses(text: str) -> frozenset[str]:
    """``"oom,timeout"`` as a set.

    Raises:
        ValueError: for an unknown status.
    """
    statuses = frozenset(part.strip() for part in text.split(",") if part.strip())
    for status in sorted(statuses):
        if status not in STATUSES:
            raise ValueError(f"no status {status!r}; there are: {', '.join(STATUSES)}")
    return statuses


def remaining_cases(request: Request, run: Run | None = None) -> list[Case]:
    """The cases still to run: those without a record, those whose record does not satisfy the
    request, is to be retried or remeasured or was interrupted between turns, and those with too few
    launches or without a timeline."""
    run = run or read_run(request.out)
    records = run.records
    return [
        case
        for case in request.cases
        if case.id not in records
        or (records[case.id].status in request.retry and records[case.id].order[0] <= request.since)
        or not satisfies(records[case.id], request)
        or (request.remeasure and changed_settings(records[case.id], request))
        or UNFINISHED in records[case.id].flags
        or needs_launches(request, run, case)
        or _needs_timeline(request, records[case.id])
    ]


def needs_launches(request: Request, run: Run, case: Case) -> bool:
    """Whether a successful case was measured by fewer processes of the present world (if unknown,
    of that of the newest) than requested; a single one may be of any."""
    settings, record = request.settings, run.records.get(case.id)
    if not settings.time or record is None or record.status != "ok" or settings.launches == 1:
        return False
    world = request.present_world or worlds.record_world(record, run.environments)
    return count_launches(run, case.id, world) < settings.launches


def _needs_timeline(request: Request, record: Record) -> bool:
    """Whether a successful case lacks a requested timeline."""
    tracing = request.settings.trace and request.settings.time and record.status == "ok"
    if not tracing or trace_path(request.out, record.case.id).exists():
        return False
    return registry.strategy_info(record.case.strategy.name).traced
