"""Supervisor of gangs of workers: runs cases and turns failures into records.

One gang runs all cases of a world size.  When a rank dies or a case takes too long, the current
case gets a record with the reason, and a new gang runs the remaining cases.
"""

from __future__ import annotations

import itertools
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.launchers import failure_cause, join
from cpbench.launchers.gang import Gang
from cpbench.launchers.protocol import Command, GangSpec, Place
from cpbench.launchers.registry import LAUNCHERS
from cpbench.results.record import UNFINISHED, Record
from cpbench.results.store import Job, RecordWriter, StoreError, Tail, check_writable

STARTUP_S = 300.0  # importing torch on a cold network file system can take minutes
POLL_S = (0.05, 0.5)  # min, max; grows with the duration of a case, since cores are shared
STACK_DUMP_S = 0.1  # for ranks to print their stacks
GRACE_S = 2.0  # for the other ranks to report their errors once one has failed
EXIT_TIMEOUT_S = 10.0  # for workers to exit once all cases are recorded
MAX_FRUITLESS_GANGS = 2  # gangs in a row that end without a record: the cause is not a case


class LaunchError(RuntimeError):
    """Workers cannot be started; the message says where to look."""


class TimeUp(BaseException):
    """Raised by a signal handler to end :func:`run` before a time limit.

    Attributes:
        case_limit_s: a case that has been running for longer is recorded as ``timeout``, since it
            would not fit into another job either.
    """

    def __init__(self, case_limit_s: float, message: str) -> None:
        super().__init__(message)
        self.case_limit_s = case_limit_s


@dataclass(frozen=True)
class Plan:
    """How to run cases.

    Attributes:
        out: run directory.
        launcher: a name in ``LAUNCHERS``.
        device: ``"cpu"`` or ``"cuda"``.
        settings: the ``[measure]`` table.
        place: where the ranks of a world size run.
        wrap_command: function applied to every command, to run it under a profiler.
        exit_timeout_s: for workers to exit once all cases are recorded.
        turns: of the cases that are measured in turn, by their ids.
    """

    out: Path
    launcher: str
    device: str
    settings: MeasureSettings
    place: Callable[[int], Place] = lambda world_size: Place()
    wrap_command: Callable[[Command], Command] = lambda command: command
    exit_timeout_s: float = EXIT_TIMEOUT_S
    turns: Mapping[str, int] = field(default_factory=dict)

    def job(self, cases: Sequence[Case], writer: str) -> Job:
        """The job of a gang."""
        return Job(list(cases), self.settings, self.device, self.out, writer, self.turns)


def group_by_world_size(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases grouped by world size, smallest first; the order within a group is kept."""
    ordered = sorted(cases, key=lambda case: case.world_size)
    return [list(group) for _, group in itertools.groupby(ordered, lambda case: case.world_size)]


def run(
    cases: Sequence[Case],
    plan: Plan,
    *,
    case_started: Callable[[Case], None],
    case_finished: Callable[[Record], None],
) -> None:
    """Run cases, which gives one record each.

    Args:
        case_started: called when a case starts.
        case_finished: called when a case is recorded.

    Raises:
        StoreError: when results cannot be written; all earlier ones are intact.
        LaunchError: when workers cannot start.
        KeyboardInterrupt: on SIGINT, SIGTERM and SIGHUP, once all workers have ended.
        TimeUp: when a signal handler of the caller raises it, once all workers have ended.
    """
    # Not the process id, which may be the same in two containers that share a run directory.
    stamp = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
    with _interruptible():
        for group in group_by_world_size(cases):
            remaining, fruitless_gangs = group, 0
            for attempt in itertools.count():
                world_size = group[0].world_size
                job = plan.job(remaining, f"{plan.launcher}-p{world_size}-{stamp}-{attempt}")
                supervisor = _GangSupervisor(job, world_size, plan, case_started, case_finished)
                failure = supervisor.supervise()
                fruitless_gangs = 0 if supervisor.recorded else fruitless_gangs + 1
                remaining = [case for case in remaining if case.id not in supervisor.recorded]
                if not remaining:
                    break
                if fruitless_gangs == MAX_FRUITLESS_GANGS:
                    message = _worker_message(job.folder)
                    raise LaunchError(f"workers fail outside of any case: {failure}{message}")


def _worker_message(folder: Path) -> str:
    """The last message of a worker's main function in the logs, else the last line of the first log
    that has one, in parentheses; "" if all are empty."""
    prefix = "cpbench.worker.main: "
    last_line = ""
    for log in sorted(folder.glob("rank*.log")):
        lines = log.read_text("utf-8", errors="replace").split("\n")
        messages = [line for line in lines if prefix in line]
        if messages:
            return f" ({messages[-1].partition(prefix)[2]})"
        last_line = last_line or next((line for line in reversed(lines) if line.strip()), "")
    return f" ({last_line.strip()})" if last_line else ""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into one KeyboardInterrupt, after which they are ignored, so
    that a second Ctrl-C cannot leave workers behind."""
    previous: dict[signal.Signals, Any] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        for handled in previous:
            signal.signal(handled, signal.SIG_IGN)
        raise KeyboardInterrupt

    with suppress(ValueError):  # only the main thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _GangSupervisor:
    """Starts one gang, watches it and records its failures."""

    def __init__(
        self,
        job: Job,
        size: int,
        plan: Plan,
        case_started: Callable[[Case], None],
        case_finished: Callable[[Record], None],
    ) -> None:
        self.job, self.size, self.plan = job, size, plan
        self.recorded: set[str] = set()
        self._case_started, self._case_finished = case_started, case_finished
        self._cases = {case.id: case for case in job.cases}
        self._ranks = [
            failure_cause.RankState(rank, job.journal_path(rank)) for rank in range(size)
        ]
        self._records = Tail(job.record_path)
        self._environment_id: str | None = None
        self._last_progress = time.monotonic()  # when a case last started or was recorded
        self._oom_kills = failure_cause.oom_kill_count()
        self._launcher = LAUNCHERS[plan.launcher]
        multi_node = plan.launcher == "torchrun" and plan.place(size).nodes > 1
        self._peers = join.Peers(job.folder) if multi_node else None

    def supervise(self) -> str:
        """Run the gang until it has ended; the reason, if cases are left without a record.

        Raises:
            StoreError, LaunchError: as :func:`run`.
        """
        gang = self._start()
        try:
            while True:
                self._read_progress()
                codes = gang.exit_codes()
                if self._peers is not None and (lost := self._peers.lost_machine()):
                    gang.kill()
                    reason = f"machine {lost} sends no heartbeat"
                    return self._record_failure(self._ranks[0], "crash", reason)
                if self._has_failed(codes):
                    codes = gang.wait(GRACE_S)
                    gang.kill()
                    return self._record_root_cause(codes)
                if None not in codes:
                    self._read_progress()
                    return f"workers ended early; see {self._log_path(0)}"
                idle_s = time.monotonic() - self._last_progress
                if len(self.recorded) == len(self._cases) and idle_s > self.plan.exit_timeout_s:
                    return ""  # nothing is lost when a rank hangs in its clean-up
                if self._current_case and idle_s > self.job.settings.timeout_s:
                    return self._record_timeout(gang, self._current_case)
                if not self._current_case and idle_s > STARTUP_S:
                    raise LaunchError(
                        f"workers did not start within {STARTUP_S:.0f} s; see {self._log_path(0)}"
                    )
                time.sleep(min(max(POLL_S[0], idle_s / 20), POLL_S[1]))
        except TimeUp as time_up:
            gang.kill()
            self._read_progress()
            running_s = time.monotonic() - self._last_progress
            if self._current_case and running_s > time_up.case_limit_s:
                ranks = ", ".join(rank.description for rank in self._ranks)
                reason = f"did not end before {time_up}: {ranks}"
                self._record_failure(self._ranks[0], "timeout", reason)
            raise
        finally:
            with suppress(OSError):
                (self.job.folder / join.GANG_ENDED_FILE).touch()
            gang.kill()

    @property
    def _current_case(self) -> Case | None:
        """The current case of rank 0, unless it is recorded already."""
        case_id = self._ranks[0].case
        return None if case_id is None or case_id in self.recorded else self._cases[case_id]

    def _start(self) -> Gang:
        try:
            spec = GangSpec(self.job.save(), self.size, self.plan.place(self.size))
            if self._peers is not None:
                join.announce_gang(spec)
            commands = self._launcher.commands(spec)
            return Gang([self.plan.wrap_command(command) for command in commands])
        except OSError as error:
            check_writable(self.plan.out)
            raise LaunchError(f"cannot start workers: {error}") from error

    def _read_progress(self) -> None:
        """Process what rank 0 has written to its journal and recorded since the last time."""
        for case_id in self._ranks[0].read_journal():
            if case_id not in self.recorded:
                self._last_progress = time.monotonic()
                self._oom_kills = failure_cause.oom_kill_count()
                self._case_started(self._cases[case_id])
        for table in self._records.read():
            if table.get("kind") == "environment":
                self._environment_id = table["id"]
                continue
            record = Record.from_json(table)
            if UNFINISHED not in record.flags:
                self._finish_case(record)

    def _finish_case(self, record: Record) -> None:
        self.recorded.add(record.case.id)
        self._last_progress = time.monotonic()
        self._case_finished(record)

    def _has_failed(self, codes: Sequence[int | None]) -> bool:
        """Whether a command has ended before its ranks have completed the job."""
        ranks_per_command = self.size // len(codes)  # torchrun is one command for all ranks
        for index, code in enumerate(codes):
            if code == 0:
                first = index * ranks_per_command
                ranks = self._ranks[first : first + ranks_per_command]
                for rank in ranks:
                    rank.read_journal()
                code = not all(rank.finished for rank in ranks)
            if code:
                return True
        return False

    def _record_root_cause(self, codes: Sequence[int | None]) -> str:
        """Find out which rank failed first and why, and record it; the reason."""
        self._read_progress()
        for rank in self._ranks:
            rank.read_journal()
        log = self._log_path(0)
        failure_cause.assign_exit_codes(self._ranks, codes, self._launcher.parse_exit_codes, log)
        check_writable(self.plan.out)
        if any(rank.could_not_write for rank in self._ranks):
            raise StoreError(f"cannot write results to {self.plan.out}: a rank could not write")
        oom_killed = failure_cause.oom_kill_count() > self._oom_kills
        failure = failure_cause.root_cause(self._ranks, oom_killed)
        if failure is None:  # the launcher itself
            exit_text = failure_cause.describe_exit(codes[0])
            failure = self._ranks[0], "crash", f"{self.plan.launcher} {exit_text}"
        return self._record_failure(*failure)

    def _record_failure(self, rank: failure_cause.RankState, status: str, reason: str) -> str:
        """Record the case in which a rank failed; the reason and the log.

        A rank may also fail after its case is recorded, or before its first case: then no case is
        recorded, and the next gang runs the remaining cases.
        """
        if rank.case is not None and rank.case not in self.recorded:
            self._write_record(self._cases[rank.case], rank, status, reason)
        return f"{reason}; see {self._log_path(rank.rank)}"

    def _record_timeout(self, gang: Gang, case: Case) -> str:
        """Kill a gang whose case takes too long, and record the phase of each rank."""
        for rank in self._ranks[1:]:
            rank.read_journal()
        ranks = ", ".join(rank.description for rank in self._ranks)
        reason = f"no result after {self.job.settings.timeout_s:g} s: {ranks}"
        self._dump_stacks(gang)
        gang.kill()
        self._read_progress()  # the case may have finished meanwhile
        in_other_case = [rank for rank in self._ranks if rank.case != case.id]
        if case.id in self.recorded or in_other_case:
            log = self._log_path(in_other_case[0].rank if in_other_case else 0)
            return f"{reason}; see {log}"
        return self._record_failure(self._ranks[0], "timeout", reason)

    def _dump_stacks(self, gang: Gang) -> None:
        """Make every rank that still responds print its stacks to its log."""
        gang.forward_signal(signal.SIGUSR1, {rank.pid for rank in self._ranks if rank.pid})
        time.sleep(STACK_DUMP_S)

    def _log_path(self, rank: int) -> Path:
        """The log of a rank; one for all ranks, if one command starts them all."""
        return self.job.folder / f"rank{0 if self._launcher.parse_exit_codes else rank}.log"

    def _write_record(
        self, case: Case, rank: failure_cause.RankState, status: str, reason: str
    ) -> None:
        """Write the record of a case in which a rank failed."""
        record = Record(case=case, status=status, reason=reason, started=rank.case_started)
        record.conditions = self.job.settings.conditions(self.job.device)
        record.seconds = max(0.0, time.time() - rank.case_started)  # clocks may differ
        record.environment = self._environment_id
        record.writer = f"parent-{self.job.writer}"
        record.log = str(self._log_path(rank.rank).relative_to(self.plan.out))
        with RecordWriter(self.plan.out / "records" / f"{record.writer}.jsonl") as writer:
            writer.append(record.to_json())
        self._finish_case(record)
