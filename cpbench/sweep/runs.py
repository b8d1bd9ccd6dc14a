"""One run of a sweep: what is left to do, progress, the exit code."""

from __future__ import annotations

import json
import math
import secrets
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cpbench.core import registry
from cpbench.core.environment import machine_bytes
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.launchers import profilers, supervisor
from cpbench.launchers.failure_cause import Rank
from cpbench.launchers.join import OVER
from cpbench.launchers.protocol import Command, Place
from cpbench.launchers.registry import LAUNCHERS
from cpbench.results import active
from cpbench.results.record import FAILURES, STATUSES, Record
from cpbench.results.store import (
    RecordWriter,
    Run,
    StoreError,
    check_writable,
    read_run,
    trace_path,
    write_whole,
)
from cpbench.sweep import estimate, progress

DEATHS = 3  # of a run in one and the same case: then the case is given up


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run as the user asked for it.

    Attributes:
        name: of the sweep.
        cases: all of them.
        out: run directory.
        launcher, device, settings: as for ``supervise.Plan``.
        retry: statuses whose cases are run again.
        strict: whether oom counts as a failure.
        since: seconds since the epoch; a record of ``retry`` that is newer counts.
        place: where the ranks of a world size run.
        capacity: bytes of memory that each rank has, where a profile says so.
        profiler: ``"nsys"`` or ``"ncu"``, that the ranks of the one case run under; "" for none.
            Such a run has a directory of its own: its times are not those of the case.

    Raises:
        ValueError: when the directory holds results of another device, number of threads, transport
            or clock; when processor time is asked for where it means nothing.
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

    def room(self, case: Case) -> tuple[int | None, str]:
        """Bytes that each rank of a case has, None where that is not known, and who says so."""
        if self.capacity is not None:
            return self.capacity, "gpu_memory of the profile"
        if self.device == "cpu" and self.launcher in ("local", "torchrun"):
            here = -(-case.world_size // self.place(case.world_size).nodes)
            return machine_bytes() // here, f"memory of this machine for {here} ranks"
        return None, ""

    def __post_init__(self) -> None:
        wanted = self.settings.conditions(self.device)
        several = any(case.world_size > 1 for case in self.cases)
        if self.settings.clock == "cpu" and (self.device != "cpu" or several):
            raise ValueError(
                'measure.clock = "cpu" is for one rank on a CPU: ranks that wait use no '
                "processor time"
            )
        if self.profiler:
            if len(self.cases) != 1:
                raise ValueError(
                    f"--profiler {self.profiler} is for one case; these are {len(self.cases)}: "
                    "choose one with --where"
                )
            self._profiled()  # or say why not
        for record in read_run(self.out).records.values():
            for key in ("device", "threads", "transport", "clock"):
                default = wanted.get(key, "torch")
                there = record.conditions.get(key, default if key != "transport" else "torch")
                if there != default:
                    raise ValueError(
                        f"{self.out} holds results of {key} {there}, not {default}: "
                        "choose another --out"
                    )

    @property
    def plan(self) -> supervisor.Plan:
        plan = supervisor.Plan(self.out, self.launcher, self.device, self.settings, self.place)
        if self.profiler:
            plan = replace(plan, wrapped=self._profiled(), exit_s=profilers.REPORT_S)
        return plan

    def _profiled(self) -> Callable[[Command], Command]:
        return profilers.wrapper(self.profiler, self.device, self.cases[0].world_size)


def serves(record: Record, request: Request) -> bool:
    """Whether a record answers what a request asks: checked and timed where that is wanted."""
    wanted = request.settings.conditions(request.device)
    return record.status != "ok" or all(
        record.conditions.get(key, False) or not wanted[key] for key in ("checked", "timed")
    )


def statuses(text: str) -> frozenset[str]:
    """``"oom,timeout"`` as a set.

    Raises:
        ValueError: for a status that there is not.
    """
    wanted = frozenset(part.strip() for part in text.split(",") if part.strip())
    for status in sorted(wanted):
        if status not in STATUSES:
            raise ValueError(f"no status {status!r}; there are: {', '.join(STATUSES)}")
    return wanted


def remaining(request: Request, run: Run | None = None) -> list[Case]:
    """The cases without a record, with one that does not serve or is to be tried again, or with
    fewer launches than are asked for."""
    run = run or read_run(request.out)
    done = run.records
    return [
        case
        for case in request.cases
        if case.id not in done
        or (done[case.id].status in request.retry and done[case.id].started < request.since)
        or not serves(done[case.id], request)
        or _short(request, run, case)
        or _untraced(request, done[case.id])
    ]


def _short(request: Request, run: Run, case: Case) -> bool:
    """Whether a case that went well was measured by fewer processes than are asked for."""
    settings, record = request.settings, run.records.get(case.id)
    fine = settings.time and record is not None and record.status == "ok"
    return fine and len(run.launches[case.id]) < settings.launches


def _untraced(request: Request, record: Record) -> bool:
    """Whether a case that went well lacks a timeline that is asked for."""
    asked = request.settings.trace and request.settings.time and record.status == "ok"
    if not asked or trace_path(request.out, record.case.id).exists():
        return False
    return registry.strategy_info(record.case.strategy.name).traced


def timelines(request: Request) -> list[str]:
    """Lines on the timelines of a request's cases: where they lie, and who was late."""
    lines = []
    for case in request.cases if request.settings.trace else ():
        path = trace_path(request.out, case.id)
        if path.exists():
            told = json.loads(path.read_text())["otherData"]
            lines += [f"{case.label}: {path}", *(f"  {line}" for line in told["stragglers"])]
        elif not registry.strategy_info(case.strategy.name).traced:
            lines.append(f"{case.label}: no timeline, for the library does its own sending")
    return lines


def results(request: Request) -> Run:
    """The records of the request's cases that are there."""
    run = read_run(request.out)
    wanted = {case.id for case in request.cases}
    run.records = {key: record for key, record in run.records.items() if key in wanted}
    return run


def execute(request: Request, quiet: bool = False) -> int:
    """Run what is left; the exit code of the whole request.

    Raises:
        StoreError, LaunchError, KeyboardInterrupt: as ``supervise.run``.
        ValueError: when another process is at it.
    """
    before = read_run(request.out)
    todo = remaining(request, before)
    for warning in before.warnings:
        print(f"cpbench: {request.out / 'records'}/{warning}", file=sys.stderr)
    if todo:
        note_down(request)
    kept = len(request.cases) - len(todo)
    if kept and not quiet:
        print(
            f"{kept} of {len(request.cases)} cases are recorded in {request.out} already",
            file=sys.stderr,
        )
    others = request.place(todo[0].world_size).nodes - 1 if todo else 0
    if others and request.launcher == "torchrun" and not quiet:
        print(
            f"other machines that are to join: {others}; on each: "
            f"cpbench join {shlex.quote(str(request.out))}", file=sys.stderr,
        )  # fmt: skip
    with active.here(request.out, [case.id for case in todo]) if todo else nullcontext():
        work(request, todo, quiet)
    return exit_code(request)


def note_down(request: Request) -> None:
    """Write ``sweep.json``: what was asked for.

    Raises:
        StoreError: when that cannot be written, or a record could not.
    """
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        write_whole(request.out / "sweep.json", json.dumps(_told(request), indent=1))
    except OSError as error:
        raise StoreError(f"cannot write results to {request.out}: {error.strerror}") from error
    check_writable(request.out)


def work(request: Request, todo: Sequence[Case], quiet: bool) -> None:
    """Run cases, in an order that shows much early, telling of each as it ends; all of them once,
    then those again that are to be launched several times.

    Raises:
        StoreError, LaunchError, KeyboardInterrupt, TimeUp: as ``supervise.run``.
    """
    todo = ordered(request, feasible(request, todo))
    for _ in range(request.settings.launches):
        with progress.progress(len(todo), quiet) as lines:
            supervisor.run(todo, request.plan, starting=lines.starting, finished=lines.finished)
        there = read_run(request.out)
        todo = [case for case in todo if _short(request, there, case)]


def estimator(request: Request) -> estimate.Estimator:
    """Estimates from the records that are in the run directory."""
    return estimate.Estimator(request.device, request.settings, [request.out])


def ordered(request: Request, cases: Sequence[Case]) -> list[Case]:
    """In an order that shows much early, see ``cpbench.sweep.estimate.ordered``; those that were
    under way when a run died without a word come last."""
    suspects = under_way_at_death(request.out)
    made = estimate.ordered(cases, estimator(request), request.settings.interleave > 1)
    return sorted(made, key=lambda case: case.id in suspects)


def under_way_at_death(out: Path) -> Counter[str]:
    """How often each case was under way when whoever watched it was killed, or its machine went
    down: such a gang's folder lacks the note that it is over."""
    found: Counter[str] = Counter()
    for journal in sorted((out / "jobs").glob("*/rank0.jsonl")):
        if not (journal.parent / OVER).exists():
            rank = Rank(0, journal)
            rank.catch_up()
            if rank.case is not None:
                found[rank.case] += 1
    return found


def feasible(request: Request, cases: Sequence[Case]) -> list[Case]:
    """The cases that may fit; the others get a record that says why they are not run."""
    known, deaths = estimator(request), under_way_at_death(request.out)
    left, writer = [], f"planner-{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
    told: list[Record] = []
    for case in cases:
        reason, status = estimate.too_large(case, *request.room(case)), "oom"
        if reason is None:
            reason, status = known.hopeless(case), "timeout"
        if reason is None and deaths[case.id] >= DEATHS:
            reason, status = f"under way when its run died, {deaths[case.id]} times", "crash"
        if reason is None:
            left.append(case)
            continue
        conditions = request.settings.conditions(request.device)
        told.append(
            Record(
                case=case, status=status, reason=reason, conditions=conditions, writer=writer,
                started=time.time(), flags=["not-run"],
            )
        )  # fmt: skip
    if told:
        with RecordWriter(request.out / "records" / f"{writer}.jsonl") as records:
            for record in told:
                records.append(record.to_json())
        print(f"{len(told)} cases cannot fit and are not run; the report says why", file=sys.stderr)
    return left


def exit_code(request: Request) -> int:
    """1 when some case of a request failed, else 0."""
    found = Counter(record.status for record in results(request).records.values())
    bad = (*FAILURES, "oom") if request.strict else FAILURES
    return 1 if any(found[status] for status in bad) else 0


def show_plan(request: Request, as_json: bool) -> int:
    """Print the cases that are left and the worker commands, without starting anything."""
    todo = ordered(request, remaining(request))
    gangs: list[dict[str, Any]] = []
    for group in supervisor.gangs(todo):
        size = group[0].world_size
        job = request.plan.job(group, f"{request.launcher}-p{size}-STAMP")
        path, place = job.folder.resolve() / "job.json", request.plan.place(size)
        commands = LAUNCHERS[request.launcher].commands(path, size, place)
        commands = [request.plan.wrapped(command) for command in commands]
        gangs.append(
            {
                "world_size": size,
                "cases": len(group),
                "commands": [command.to_json() for command in commands],
            }
        )
    if as_json:
        cases = [{"id": case.id, **case.to_json()} for case in todo]
        print(
            json.dumps(
                {"sweep": request.name, "out": str(request.out), "cases": cases, "gangs": gangs},
                indent=1,
            )
        )
        return 0
    for case in todo:
        print(f"{case.id}  {case.label}")
    for gang in gangs:
        print(f"\n{gang['cases']} cases on {gang['world_size']} ranks:")
        for command in gang["commands"]:
            env = " ".join(f"{key}={shlex.quote(value)}" for key, value in command["env"].items())
            print(f"  {env} {shlex.join(command['argv'])}")
    print(f"\n{len(todo)} of {len(request.cases)} cases to run into {request.out}")
    known = estimator(request)
    hours = sum(known.seconds(case) for case in todo) / 3600
    ranks = sum(known.seconds(case) * case.world_size for case in todo) / 3600
    unit = "GPU-hours" if request.device == "cuda" else "rank-hours"
    print(f"about {hours:.2f} hours, {ranks:.2f} {unit}: {known.words(todo)}")
    return 0


def _told(request: Request) -> dict[str, Any]:
    return {
        "name": request.name,
        "launcher": request.launcher,
        "device": request.device,
        "settings": asdict(request.settings),
        "cases": [{"id": case.id, **case.to_json()} for case in request.cases],
    }
