"""Running a sweep: the remaining cases, their order, the exit code."""

from __future__ import annotations

import functools
import math
import os
import secrets
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cpbench.core import registry
from cpbench.core.environment import collect_environment, machine_memory_bytes
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.launchers import profilers, supervisor
from cpbench.launchers.failure_cause import RankState
from cpbench.launchers.join import GANG_ENDED_FILE
from cpbench.launchers.protocol import Command, GangSpec, Place
from cpbench.results import active, worlds
from cpbench.results.launches import count_launches
from cpbench.results.record import FAILURES, STATUSES, UNFINISHED, Record
from cpbench.results.store import (
    RecordWriter,
    Run,
    StoreError,
    check_writable,
    damaged_files,
    read_document,
    read_run,
    trace_path,
    write_document,
)
from cpbench.sweep import estimate, progress

MAX_KILLED_RUNS = 3  # runs that were killed during the same case, which is then given up


@dataclass(frozen=True, kw_only=True)
class Request:
    """The run that a user requested.

    Attributes:
        name: of the sweep.
        cases: all cases of the sweep.
        out: run directory.
        launcher, device, settings: as for ``cpbench.launchers.supervisor.Plan``.
        retry: statuses whose cases are run again.
        strict: whether oom counts as a failure.
        since: sequence number of a record; cases with a newer one are not run again for ``retry``.
        place: launch configuration of the ranks of a world size.
        capacity: bytes of memory per rank, if a site profile gives it.
        profiler: ``"nsys"`` or ``"ncu"``, to run the ranks of a single case under; "" for none.
            Such a run has a directory of its own, since profiling changes the times.
        command: words of the command line, without the name of the program; recorded.

    Raises:
        ValueError: when the run directory holds results of another device, number of threads,
            transport or clock, or when CPU time is requested where it is meaningless.
    """

    name: str
    cases: Sequence[Case]
    out: Path
    launcher: str
    device: str
    settings: MeasureSettings
    retry: frozenset[str] = field(default_factory=frozenset)
    strict: bool = False
    since: float = math.inf
    place: Callable[[int], Place] = lambda world_size: Place()
    capacity: int | None = None
    profiler: str = ""
    command: Sequence[str] = ()

    def memory_per_rank(self, case: Case) -> tuple[int | None, str]:
        """Bytes of memory per rank (None if unknown), and where the number comes from."""
        if self.capacity is not None:
            return self.capacity, "gpu_memory of the profile"
        if self.device == "cpu" and self.launcher in ("local", "torchrun"):
            local_ranks = -(-case.world_size // self.place(case.world_size).nodes)
            return machine_memory_bytes() // local_ranks, "memory of this machine per rank"
        return None, ""

    def __post_init__(self) -> None:
        conditions = self.settings.conditions(self.device)
        multi_rank = any(case.world_size > 1 for case in self.cases)
        if self.settings.clock == "cpu" and (self.device != "cpu" or multi_rank):
            raise ValueError(
                'measure.clock = "cpu" is for one rank on a CPU: ranks that wait use no CPU time'
            )
        if self.profiler:
            if len(self.cases) != 1:
                raise ValueError(
                    f"--profiler {self.profiler} is for one case, not {len(self.cases)}: "
                    "select one with --where"
                )
            self._profiler_wrapper()  # raises if the profiler cannot be used
        for record in read_run(self.out).records.values():
            for key in ("device", "threads", "transport", "clock"):
                requested = conditions.get(key, "torch")
                recorded = record.conditions.get(key, "torch" if key == "transport" else requested)
                if recorded != requested:
                    raise ValueError(
                        f"{self.out} holds results of {key} {recorded}, not {requested}: "
                        "choose another --out"
                    )

    @functools.cached_property
    def present_world(self) -> worlds.World | None:
        """The world that ranks will have; None where they may be on other machines."""
        place = self.place(max((case.world_size for case in self.cases), default=1))
        if self.launcher not in ("local", "torchrun") or place.nodes > 1:
            return None
        environment = collect_environment({**os.environ, **GangSpec(self.out, 1, place).env})
        return worlds.world_of(environment, self.settings.conditions(self.device))

    @property
    def plan(self) -> supervisor.Plan:
        plan = supervisor.Plan(self.out, self.launcher, self.device, self.settings, self.place)
        if self.profiler:
            plan = replace(
                plan,
                wrap_command=self._profiler_wrapper(),
                exit_timeout_s=profilers.REPORT_TIMEOUT_S,
            )
        return plan

    def _profiler_wrapper(self) -> Callable[[Command], Command]:
        return profilers.profiler_wrapper(self.profiler, self.device, self.cases[0].world_size)


def satisfies(record: Record, request: Request) -> bool:
    """Whether a record was checked and timed, as far as the request wants that."""
    conditions = request.settings.conditions(request.device)
    return record.status != "ok" or all(
        record.conditions.get(key, False) or not conditions[key] for key in ("checked", "timed")
    )


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
    request, is to be retried or was interrupted between turns, and those with too few launches or
    without a timeline."""
    run = run or read_run(request.out)
    records = run.records
    return [
        case
        for case in request.cases
        if case.id not in records
        or (records[case.id].status in request.retry and records[case.id].order[0] <= request.since)
        or not satisfies(records[case.id], request)
        or UNFINISHED in records[case.id].flags
        or _needs_launches(request, run, case)
        or _needs_timeline(request, records[case.id])
    ]


def _needs_launches(request: Request, run: Run, case: Case) -> bool:
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


def write_sweep_json(request: Request) -> None:
    """Write ``sweep.json``, the sweep that was requested.

    Raises:
        StoreError: when the run directory cannot be written.
    """
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        write_document(request.out / "sweep.json", _sweep_table(request), indent=1)
    except OSError as error:
        raise StoreError(f"cannot write results to {request.out}: {error.strerror}") from error
    check_writable(request.out)


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
        todo = [case for case in todo if _needs_launches(request, run, case)]


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


def _sweep_table(request: Request) -> dict[str, Any]:
    """The contents of ``sweep.json``."""
    return {
        "name": request.name,
        "command": list(request.command),
        "launcher": request.launcher,
        "device": request.device,
        "settings": asdict(request.settings),
        "cases": [{"id": case.id, **case.to_json()} for case in request.cases],
    }
