"""Running a sweep: the order of its cases, those that cannot succeed, the exit code."""

from __future__ import annotations

import secrets
import shlex
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from cpbench.core import registry
from cpbench.core.problem import Case
from cpbench.launchers import supervisor
from cpbench.launchers.failure_cause import RankState
from cpbench.launchers.join import GANG_ENDED_FILE
from cpbench.results import active, worlds
from cpbench.results.damage import damaged_files
from cpbench.results.record import FAILURES, Record
from cpbench.results.store import (
    RecordWriter,
    Run,
    read_document,
    read_run,
    trace_path,
)
from cpbench.sweep import estimate, progress
from cpbench.sweep.remaining import needs_launches, remaining_cases, settings_warnings
from cpbench.sweep.request import Request, write_sweep_json

MAX_KILLED_RUNS = 3  # runs that were killed during the same case, which is then given up


def describe_timelines(request: Request) -> list[str]:
    """Lines that name the timeline file of each case, and its stragglers."""
    lines = []
    for case in request.cases if request.settings.trace else ():
        path = trace_path(request.out, case.id)
        if path.exists():
            try:
                stragglers = read_document(path)["otherData"]["stragglers"]
                lines += [f"{case.label}: {path}", *(f"  {line}" for line in stragglers)]
            except (OSError, KeyError, TypeError, ValueError) as error:
                lines.append(f"{case.label}: {error}; remove it and repeat the command")
        elif not registry.strategy_info(case.strategy.name).traced:
            lines.append(f"{case.label}: no timeline, since the library communicates by itself")
    return lines


def results(request: Request) -> Run:
    """The run directory, with the records of the request's cases only."""
    run = read_run(request.out)
    case_ids = {case.id for case in request.cases}
    run.records = {key: record for key, record in run.records.items() if key in case_ids}
    return run


def execute(request: Request, quiet: bool = False) -> int:
    """Run the remaining cases; the exit code of the whole request.

    Raises:
        StoreError, LaunchError, KeyboardInterrupt: as ``supervisor.run``.
        ValueError: when another process is running some of the cases.
    """
    before = read_run(request.out)
    todo = remaining_cases(request, before)
    warnings = [*before.warnings, *damaged_files(request.out)]
    if todo and request.present_world:
        warnings += worlds.change_warnings(before, request.present_world)
    warnings += settings_warnings(request, before, todo)
    for warning in warnings:
        print(f"cpbench: {request.out}: {warning}", file=sys.stderr)
    if todo:
        with active.registered_as_active(request.out, [case.id for case in todo]):
            write_sweep_json(request)
            # Another process may have recorded some of them until they were claimed.
            todo = remaining_cases(request)
            _print_progress(request, todo, quiet)
            run_cases(request, todo, quiet)
    else:
        _print_progress(request, todo, quiet)
    return exit_code(request)


def _print_progress(request: Request, todo: Sequence[Case], quiet: bool) -> None:
    recorded = len(request.cases) - len(todo)
    if recorded and not quiet:
        print(
            f"{recorded} of {len(request.cases)} cases are recorded in {request.out} already",
            file=sys.stderr,
        )
    other_nodes = request.place(todo[0].world_size).nodes - 1 if todo else 0
    if other_nodes and request.launcher == "torchrun" and not quiet:
        print(
            f"waiting for {other_nodes} other machines to join; on each, run: "
            f"cpbench join {shlex.quote(str(request.out))}", file=sys.stderr,
        )  # fmt: skip


def run_cases(request: Request, todo: Sequence[Case], quiet: bool) -> None:
    """Run cases and show the progress: all of them once, then again those that need more launches.

    Raises:
        StoreError, LaunchError, KeyboardInterrupt, TimeUp: as ``supervisor.run``.
    """
    todo = feasible_cases(request, todo)
    turns = estimator(request).turns(todo)
    todo = order_cases(request, todo, turns)
    for _ in range(request.settings.launches):
        with progress.progress_display(len(todo), quiet) as display:
            supervisor.run(
                todo,
                replace(request.plan, turns=turns),
                case_started=display.case_started,
                case_finished=display.case_finished,
            )
        run = read_run(request.out)
        todo = [case for case in todo if needs_launches(request, run, case)]


def estimator(request: Request) -> estimate.Estimator:
    """An estimator that uses the records of the run directory."""
    return estimate.Estimator(request.device, request.settings, [request.out])


def order_cases(request: Request, cases: Sequence[Case], turns: Collection[str] = ()) -> list[Case]:
    """Cases in the order of ``cpbench.sweep.estimate.order_cases``, but last those during which a
    run was killed before."""
    suspects = count_killed_runs(request.out)
    ordered = estimate.order_cases(cases, estimator(request), turns)
    return sorted(ordered, key=lambda case: case.id in suspects)


def count_killed_runs(out: Path) -> Counter[str]:
    """How many runs were killed during each case, by its id: the supervisor was killed or its
    machine went down, so that the folder of the gang lacks the file that marks its end."""
    counts: Counter[str] = Counter()
    for journal in sorted((out / "jobs").glob("*/rank0.jsonl")):
        if not (journal.parent / GANG_ENDED_FILE).exists():
            rank = RankState(0, journal)
            rank.read_journal()
            if rank.case is not None:
                counts[rank.case] += 1
    return counts


def feasible_cases(request: Request, cases: Sequence[Case]) -> list[Case]:
    """The cases that may succeed; the others get a record that says why they are not run."""
    estimates, killed_runs = estimator(request), count_killed_runs(request.out)
    feasible, writer = [], f"planner-{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
    skipped: list[Record] = []
    for case in cases:
        reason, status = estimate.oom_reason(case, *request.memory_per_rank(case)), "oom"
        if reason is None:
            reason, status = estimates.timeout_reason(case), "timeout"
        if reason is None and killed_runs[case.id] >= MAX_KILLED_RUNS:
            reason = f"not run: {killed_runs[case.id]} runs were killed during this case"
            status = "crash"
        if reason is None:
            feasible.append(case)
            continue
        conditions = request.settings.conditions(request.device)
        skipped.append(
            Record(
                case=case, status=status, reason=reason, conditions=conditions, writer=writer,
                started=time.time(), flags=["not-run"],
            )
        )  # fmt: skip
    if skipped:
        with RecordWriter(request.out / "records" / f"{writer}.jsonl") as records:
            for record in skipped:
                records.append(record.to_json())
        print(
            f"{len(skipped)} cases cannot succeed and are not run; the report says why",
            file=sys.stderr,
        )
    return feasible


def exit_code(request: Request) -> int:
    """1 when some case of a request failed, else 0."""
    counts = Counter(record.status for record in results(request).records.values())
    failures = (*FAILURES, "oom") if request.strict else FAILURES
    return 1 if any(counts[status] for status in failures) else 0
