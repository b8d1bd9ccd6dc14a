"""One run of a sweep: what is left to do, progress, the exit code."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpbench.launchers import supervise
from cpbench.problem import Case
from cpbench.record import FAILURES, STATUSES, Record
from cpbench.settings import MeasureSettings
from cpbench.store import Run, StoreError, read_run, write_whole


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

    Raises:
        ValueError: when the directory holds results of another device or number of threads.
    """

    name: str
    cases: Sequence[Case]
    out: Path
    launcher: str
    device: str
    settings: MeasureSettings
    retry: frozenset[str] = field(default_factory=frozenset)
    strict: bool = False

    def __post_init__(self) -> None:
        wanted = self.settings.conditions(self.device)
        for record in read_run(self.out).records.values():
            for key in ("device", "threads"):
                there = record.conditions.get(key, wanted[key])
                if there != wanted[key]:
                    raise ValueError(
                        f"{self.out} holds results of {key} {there}, not {wanted[key]}: "
                        "choose another --out"
                    )

    @property
    def plan(self) -> supervise.Plan:
        return supervise.Plan(self.out, self.launcher, self.device, self.settings)


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
    """The cases without a record, or with one that does not serve or is to be tried again."""
    done = (run or read_run(request.out)).records
    return [
        case
        for case in request.cases
        if case.id not in done
        or done[case.id].status in request.retry
        or not serves(done[case.id], request)
    ]


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
    """
    before = read_run(request.out)
    todo = remaining(request, before)
    for warning in before.warnings:
        print(f"cpbench: {request.out / 'records'}/{warning}", file=sys.stderr)
    try:
        if todo:
            request.out.mkdir(parents=True, exist_ok=True)
            write_whole(request.out / "sweep.json", json.dumps(_told(request), indent=1))
    except OSError as error:
        raise StoreError(f"cannot write results to {request.out}: {error.strerror}") from error
    kept = len(request.cases) - len(todo)
    if kept and not quiet:
        print(
            f"{kept} of {len(request.cases)} cases are recorded in {request.out} already",
            file=sys.stderr,
        )
    with _progress(len(todo), quiet) as progress:
        supervise.run(todo, request.plan, starting=progress.starting, finished=progress.finished)
    found = Counter(record.status for record in results(request).records.values())
    bad = (*FAILURES, "oom") if request.strict else FAILURES
    return 1 if any(found[status] for status in bad) else 0


def show_plan(request: Request, as_json: bool) -> int:
    """Print the cases that are left and the worker commands, without starting anything."""
    todo = remaining(request)
    gangs: list[dict[str, Any]] = []
    for group in supervise.gangs(todo):
        size = group[0].world_size
        job = request.plan.job(group, f"{request.launcher}-p{size}-STAMP")
        commands = supervise.LAUNCHERS[request.launcher](job.folder.resolve() / "job.json", size)
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
            env = " ".join(f"{key}={value}" for key, value in command["env"].items())
            print(f"  {env} {' '.join(command['argv'])}")
    print(f"\n{len(todo)} of {len(request.cases)} cases to run into {request.out}")
    return 0


def _told(request: Request) -> dict[str, Any]:
    return {
        "name": request.name,
        "launcher": request.launcher,
        "device": request.device,
        "settings": asdict(request.settings),
        "cases": [{"id": case.id, **case.to_json()} for case in request.cases],
    }


def outcome(record: Record) -> str:
    """What became of a case, in a few words."""
    if record.median_us is None:
        if record.status != "ok":
            return f"{record.status}: {record.reason}"
        return f"ok, largest error {record.worst_error:.1e}" if record.worst_error else "ok"
    noise = f" ±{record.noise:.1%}" if record.noise is not None else ""
    flags = f" [{' '.join(record.flags)}]" if record.flags else ""
    return f"{record.median_us / 1e3:.3g} ms{noise}{flags}"


class _Lines:
    """Progress as plain lines, for logs."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet, self._done = total, quiet, 0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def starting(self, case: Case) -> None:
        pass

    def finished(self, record: Record) -> None:
        self._done += 1
        if not self._quiet:
            print(
                f"[{self._done}/{self._total}] {record.case.label}: {outcome(record)}",
                file=sys.stderr,
                flush=True,
            )


class _Bar(_Lines):
    """Progress as a bar with the time left, for terminals."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        super().__init__(total, False)
        self._bar = Progress(
            MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True), transient=True,
            refresh_per_second=2,  # ten would take 2 % of a core that is being measured
        )  # fmt: skip
        self._task = self._bar.add_task("starting workers", total=total)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def starting(self, case: Case) -> None:
        self._bar.update(self._task, description=case.label)

    def finished(self, record: Record) -> None:
        self._bar.console.print(
            f"{record.case.label}: {outcome(record)}", markup=False, highlight=False, soft_wrap=True
        )
        self._bar.advance(self._task)


def _progress(total: int, quiet: bool) -> _Lines:
    return _Bar(total) if sys.stderr.isatty() and not quiet else _Lines(total, quiet)
