"""Run cases through gangs of workers, and turn whatever happens to a gang into records.

One gang serves all cases of its world size.  When a rank dies or a case takes too long, the case
that was under way becomes a record with the reason, and a new gang goes on with the rest.
"""

from __future__ import annotations

import itertools
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.launchers import failure_cause, join
from cpbench.launchers.gang import Gang
from cpbench.launchers.protocol import Command, Place
from cpbench.launchers.registry import LAUNCHERS
from cpbench.results.record import Record
from cpbench.results.store import Job, RecordWriter, StoreError, Tail, check_writable

STARTUP_S = 300.0  # importing torch on a cold network file system can take minutes
POLL_S = (0.05, 0.5)  # more rarely the longer a case takes: the parent shares its cores
WORKER = "cpbench.worker.main"
STACKS_S = 0.1  # for ranks to print where they are
PARTING_S = 2.0  # for the last words of the ranks that are left when one has failed
EXIT_S = 10.0  # for workers to leave when all is done
FRUITLESS = 2  # gangs in a row that end without a record: then it is not the cases


class LaunchError(RuntimeError):
    """Workers cannot be started at all; the message says where to look."""


class TimeUp(BaseException):
    """Raised into :func:`run` to end it before a time limit.

    Attributes:
        long_s: a case that has been under way for so long would not fit another time either: it is
            recorded as ``timeout``.
    """

    def __init__(self, long_s: float, words: str) -> None:
        super().__init__(words)
        self.long_s = long_s


@dataclass(frozen=True)
class Plan:
    """How cases are run.

    Attributes:
        out: run directory.
        launcher: a name in ``LAUNCHERS``.
        device: ``"cpu"`` or ``"cuda"``.
        settings: the ``[measure]`` table.
        place: where ranks run, for a world size.
        wrapped: a command as it is to be run, such as under a profiler.
        exit_s: for workers to leave when all is done.
    """

    out: Path
    launcher: str
    device: str
    settings: MeasureSettings
    place: Callable[[int], Place] = lambda world_size: Place()
    wrapped: Callable[[Command], Command] = lambda command: command
    exit_s: float = EXIT_S

    def job(self, cases: Sequence[Case], writer: str) -> Job:
        return Job(list(cases), self.settings, self.device, self.out, writer)


def gangs(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases by world size, smallest first, order kept."""
    ordered = sorted(cases, key=lambda case: case.world_size)
    return [list(group) for _, group in itertools.groupby(ordered, lambda c: c.world_size)]


def run(
    cases: Sequence[Case],
    plan: Plan,
    *,
    starting: Callable[[Case], None],
    finished: Callable[[Record], None],
) -> None:
    """Run every case, one record each.

    Args:
        starting, finished: called as cases start and as their records are there.

    Raises:
        StoreError: when results cannot be written; all earlier ones are intact.
        LaunchError: when workers cannot start.
        KeyboardInterrupt: on SIGINT, SIGTERM and SIGHUP, once no worker is left.
        TimeUp: when a signal handler of the caller's raised it, likewise.
    """
    # Not the process id: runs in two containers that share a folder may have the same.
    stamp = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
    with _interruptible():
        for group in gangs(cases):
            left, fruitless = group, 0
            for attempt in itertools.count():
                size = group[0].world_size
                job = plan.job(left, f"{plan.launcher}-p{size}-{stamp}-{attempt}")
                watch = _Watch(job, size, plan, starting, finished)
                trouble = watch.follow()
                fruitless = 0 if watch.recorded else fruitless + 1
                left = [case for case in left if case.id not in watch.recorded]
                if not left:
                    break
                if fruitless == FRUITLESS:
                    said = _last_words(job.folder)
                    raise LaunchError(f"workers fail outside of any case: {trouble}{said}")


def _last_words(folder: Path) -> str:
    """The last line that ranks printed, if any."""
    for log in sorted(folder.glob("rank*.log")):
        words = "cpbench.worker.main: "
        said = [line for line in log.read_text(errors="replace").splitlines() if words in line]
        if said:
            return f" ({said[-1].partition(words)[2]})"
    return ""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make every request to end a KeyboardInterrupt, and let only the first one through, so that
    an impatient second Ctrl-C cannot leave workers behind."""
    before: dict[signal.Signals, Any] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    with suppress(ValueError):  # only the main thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watch:
    """One gang from start to end."""

    def __init__(
        self,
        job: Job,
        size: int,
        plan: Plan,
        starting: Callable[[Case], None],
        finished: Callable[[Record], None],
    ) -> None:
        self.job, self.size, self.plan = job, size, plan
        self.recorded: set[str] = set()
        self._starting, self._finished = starting, finished
        self._cases = {case.id: case for case in job.cases}
        self._ranks = [failure_cause.Rank(rank, job.journal_path(rank)) for rank in range(size)]
        self._records = Tail(job.record_path)
        self._environment: str | None = None
        self._progress = time.monotonic()  # when a case last started or ended
        self._oom_kills = failure_cause.oom_kills()
        self._launcher = LAUNCHERS[plan.launcher]
        several = plan.launcher == "torchrun" and plan.place(size).nodes > 1
        self._peers = join.Peers(job.folder) if several else None

    def follow(self) -> str:
        """Watch until the gang has ended; if cases are left that no record explains, why.

        Raises:
            StoreError, LaunchError: as :func:`run`.
        """
        gang = self._start()
        try:
            while True:
                self._catch_up()
                codes = gang.codes()
                if self._peers is not None and (lost := self._peers.lost()) is not None:
                    gang.kill()
                    return self._blame(self._ranks[0], "crash", f"machine {lost} has gone silent")
                if self._has_failed(codes):
                    codes = gang.wait(PARTING_S)
                    gang.kill()
                    return self._bury(codes)
                if None not in codes:
                    self._catch_up()
                    return f"workers ended early; see {self._log(0)}"
                idle = time.monotonic() - self._progress
                if len(self.recorded) == len(self._cases) and idle > self.plan.exit_s:
                    return ""  # nothing is lost when a rank hangs in its clean-up
                if self._current and idle > self.job.settings.timeout_s:
                    return self._time_out(gang, self._current)
                if not self._current and idle > STARTUP_S:
                    raise LaunchError(
                        f"workers did not start within {STARTUP_S:.0f} s; see {self._log(0)}"
                    )
                time.sleep(min(max(POLL_S[0], idle / 20), POLL_S[1]))
        except TimeUp as stop:
            gang.kill()
            self._catch_up()
            if self._current and time.monotonic() - self._progress > stop.long_s:
                where = ", ".join(rank.where for rank in self._ranks)
                self._blame(self._ranks[0], "timeout", f"did not end before {stop}: {where}")
            raise
        finally:
            with suppress(OSError):
                (self.job.folder / join.OVER).touch()
            gang.kill()

    @property
    def _current(self) -> Case | None:
        """The case that rank 0 is in and that has no record yet."""
        case = self._ranks[0].case
        return None if case is None or case in self.recorded else self._cases[case]

    def _start(self) -> Gang:
        try:
            path, place = self.job.save(), self.plan.place(self.size)
            if self._peers is not None:
                join.gather(path, self.size, place, WORKER)
            commands = self._launcher.commands(path, self.size, place, module=WORKER)
            return Gang([self.plan.wrapped(command) for command in commands])
        except OSError as error:
            check_writable(self.plan.out)
            raise LaunchError(f"cannot start workers: {error}") from error

    def _catch_up(self) -> None:
        """Take in what rank 0 has noted and recorded since the last time."""
        for case in self._ranks[0].catch_up():
            if case not in self.recorded:
                self._progress = time.monotonic()
                self._oom_kills = failure_cause.oom_kills()
                self._starting(self._cases[case])
        for table in self._records.read():
            if table.get("kind") == "environment":
                self._environment = table["id"]
            else:
                self._announce(Record.from_json(table))

    def _announce(self, record: Record) -> None:
        self.recorded.add(record.case.id)
        self._progress = time.monotonic()
        self._finished(record)

    def _has_failed(self, codes: Sequence[int | None]) -> bool:
        """Whether a process has ended other than by coming to the end of its job."""
        each = self.size // len(codes)  # torchrun is one process for all ranks
        for process, code in enumerate(codes):
            if code == 0:
                ranks = self._ranks[process * each : (process + 1) * each]
                for rank in ranks:
                    rank.catch_up()
                code = not all(rank.ended for rank in ranks)
            if code:
                return True
        return False

    def _bury(self, codes: Sequence[int | None]) -> str:
        """A rank has died: find out which was first and why, and record it."""
        self._catch_up()
        for rank in self._ranks:
            rank.catch_up()
        failure_cause.tell_codes(self._ranks, codes, self._launcher.failures, self._log(0))
        check_writable(self.plan.out)
        if any(rank.lost_its_disk for rank in self._ranks):
            raise StoreError(f"cannot write results to {self.plan.out}: a rank found no room")
        killed = failure_cause.oom_kills() > self._oom_kills
        found = failure_cause.cause(self._ranks, killed)
        if found is None:  # the launcher itself
            ended = failure_cause.describe_end(codes[0])
            found = self._ranks[0], "crash", f"{self.plan.launcher} {ended}"
        return self._blame(*found)

    def _blame(self, rank: failure_cause.Rank, status: str, reason: str) -> str:
        """Record the case that a rank failed in.  A rank may fail once its case is recorded, or
        before its first: then no case is to blame, and the next gang tries again."""
        if rank.case is not None and rank.case not in self.recorded:
            self._record(self._cases[rank.case], rank, status, reason)
        return f"{reason}; see {self._log(rank.number)}"

    def _time_out(self, gang: Gang, case: Case) -> str:
        """End a case that takes too long; its record says what each rank was at."""
        for rank in self._ranks[1:]:
            rank.catch_up()
        where = ", ".join(rank.where for rank in self._ranks)
        reason = f"no result after {self.job.settings.timeout_s:g} s: {where}"
        self._ask_for_stacks(gang)
        gang.kill()
        self._catch_up()  # it may have come to an end in this very moment
        late = [rank for rank in self._ranks if rank.case != case.id]
        if case.id in self.recorded or late:
            return f"{reason}; see {self._log(late[0].number if late else 0)}"
        return self._blame(self._ranks[0], "timeout", reason)

    def _ask_for_stacks(self, gang: Gang) -> None:
        """Have every rank that still answers print where it is to its log."""
        gang.pass_on(signal.SIGUSR1, {rank.pid for rank in self._ranks if rank.pid})
        time.sleep(STACKS_S)

    def _log(self, rank: int) -> Path:
        """Where a rank's output goes."""
        return self.job.folder / f"rank{0 if self._launcher.failures else rank}.log"

    def _record(self, case: Case, rank: failure_cause.Rank, status: str, reason: str) -> None:
        record = Record(case=case, status=status, reason=reason, started=rank.since)
        record.conditions = self.job.settings.conditions(self.job.device)
        record.seconds = time.time() - rank.since
        record.environment = self._environment
        record.writer = f"parent-{self.job.writer}"
        record.log = str(self._log(rank.number).relative_to(self.plan.out))
        with RecordWriter(self.plan.out / "records" / f"{record.writer}.jsonl") as writer:
            writer.append(record.to_json())
        self._announce(record)
