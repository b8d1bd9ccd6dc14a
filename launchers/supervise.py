"""Run cases through gangs of workers, and turn whatever happens to a gang into records.

One gang serves all cases of its world size.  When a rank dies or a case takes too long, the case
that was under way becomes a record with the reason, and a new gang goes on with the rest.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpbench.launchers import local, torchrun
from cpbench.launchers.gang import Command, Gang
from cpbench.problem import Case
from cpbench.record import Record
from cpbench.settings import MeasureSettings
from cpbench.store import Job, RecordWriter, StoreError, last_notes, read_lines

LAUNCHERS: dict[str, Callable[[Path, int], list[Command]]] = {
    "local": local.commands,
    "torchrun": torchrun.commands,
}
STARTUP_S = 300.0  # importing torch on a cold network file system can take minutes
POLL_S = 0.05
EXIT_STORE = 74


class LaunchError(RuntimeError):
    """Workers cannot be started at all; the message says where to look."""


@dataclass(frozen=True)
class Plan:
    """How cases are run.

    Attributes:
        out: run directory.
        launcher: a name in ``LAUNCHERS``.
        device: ``"cpu"`` or ``"cuda"``.
        settings: the ``[measure]`` table.
    """

    out: Path
    launcher: str
    device: str
    settings: MeasureSettings

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
    """
    stamp = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    for group in gangs(cases):
        remaining = group
        for attempt in itertools.count():
            size = group[0].world_size
            job = plan.job(remaining, f"{plan.launcher}-p{size}-{stamp}-{attempt}")
            watch = _Watch(job, size, plan, starting, finished)
            try:
                watch.follow()
            except OSError as error:
                if isinstance(error, StoreError):
                    raise
                raise StoreError(f"cannot write results to {plan.out}: {error.strerror}") from error
            remaining = [case for case in remaining if case.id not in watch.recorded]
            if not remaining:
                break


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
        self._notes_read = self._records_read = 0
        self._current: tuple[Case, float] | None = None
        self._begun = time.time()

    def follow(self) -> None:
        ooms = _oom_kills()
        gang = Gang(LAUNCHERS[self.plan.launcher](self.job.save(), self.size))
        try:
            while True:
                self._catch_up()
                codes = gang.codes()
                if all(code == 0 for code in codes):
                    self._catch_up()
                    self._expect_all()
                    return
                if any(code not in (None, 0) for code in codes):
                    codes = gang.wait(2.0)  # the others' last words may name the cause
                    self._catch_up()
                    gang.kill()
                    self._record_death(codes, _oom_kills() > ooms)
                    return
                if self._current and time.time() - self._current[1] > self.job.settings.timeout_s:
                    reason = self._who_is_where()
                    gang.kill()
                    self._catch_up()
                    if self._current:
                        self._record("timeout", reason, 0)
                    return
                if not self._current and time.time() - self._begun > STARTUP_S:
                    raise LaunchError(f"workers did not start within {STARTUP_S:.0f} s; "
                                      f"see {self._log(0)}")
                time.sleep(POLL_S)
        finally:
            gang.kill()

    def _catch_up(self) -> None:
        """Take in what rank 0 has noted and recorded since the last time."""
        notes = last_notes(self.job.journal_path(0))
        for note in notes[self._notes_read :]:
            if note["event"] == "start":
                self._current = self._cases[note["case"]], note["time"]
                self._starting(self._current[0])
            if note["event"] == "done":
                self._current, self._begun = None, time.time()
        self._notes_read = len(notes)
        if self.job.record_path.exists():
            records = [t for _, t in read_lines(self.job.record_path) if t.get("kind") == "case"]
            for table in records[self._records_read :]:
                self._announce(Record.from_json(table))
            self._records_read = len(records)

    def _announce(self, record: Record) -> None:
        self.recorded.add(record.case.id)
        if self._current and self._current[0].id == record.case.id:
            self._current = None
            self._begun = time.time()
        self._finished(record)

    def _expect_all(self) -> None:
        missing = [case for case in self.job.cases if case.id not in self.recorded]
        if missing:
            raise LaunchError(f"workers ended without a record for {missing[0].label}; "
                              f"see {self._log(0)}")

    def _record_death(self, codes: Sequence[int | None], oom_killed: bool) -> None:
        """A rank died: find out which was first and why, and record it."""
        words = {r: self._note(r, "failed") for r in range(self.size)}
        spoken = {rank: note for rank, note in words.items() if note}
        if EXIT_STORE in codes or any("No space left" in n["reason"] for n in spoken.values()):
            raise StoreError(f"cannot write results to {self.plan.out}: No space left on device")
        rank, code = self._first_killed(codes)
        if rank is not None:
            name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
            status = "oom" if oom_killed and name == "SIGKILL" else "crash"
            killer = " by the kernel, out of memory" if status == "oom" else ""
            reason = f"rank {rank} was killed by {name}{killer}"
        elif spoken:
            rank = min(spoken, key=lambda r: (spoken[r]["status"] != "oom", spoken[r]["time"]))
            status, reason = spoken[rank]["status"], f"rank {rank}: {spoken[rank]['reason']}"
        else:
            rank, status, reason = 0, "crash", f"workers ended with codes {list(codes)}"
        if self._current is None:
            raise LaunchError(f"workers failed before any case: {reason}; see {self._log(rank)}")
        self._record(status, reason, rank)

    def _first_killed(self, codes: Sequence[int | None]) -> tuple[int | None, int]:
        """The rank that a signal ended, and minus that signal; SIGABRT last, since Gloo aborts
        when a peer is lost."""
        if self.plan.launcher == "torchrun":
            with suppress(OSError):
                log = self._log(0).read_text(errors="replace")
                root = log.rpartition("Root Cause")[2]
                rank, code = (re.search(rf"{key}\s*:\s*(-?\d+)", root) for key in
                              ("rank", "exitcode"))
                if rank and code and int(code[1]) < 0:
                    return int(rank[1]), int(code[1])
            return None, 0
        killed = [(rank, code) for rank, code in enumerate(codes) if code is not None and code < 0]
        killed.sort(key=lambda item: item[1] == -signal.SIGABRT)
        return killed[0] if killed else (None, 0)

    def _who_is_where(self) -> str:
        """One line on a case that took too long: what each rank was at."""
        assert self._current is not None
        phases = []
        for rank in range(self.size):
            notes = last_notes(self.job.journal_path(rank))
            pid = next((note["pid"] for note in reversed(notes) if "pid" in note), None)
            halted = " (stopped)" if pid and _is_stopped(pid) else ""
            phases.append(f"rank {rank} {notes[-1]['event'] if notes else 'silent'}{halted}")
        return f"no result after {self.job.settings.timeout_s:g} s: {', '.join(phases)}"

    def _note(self, rank: int, event: str) -> dict[str, Any] | None:
        notes = [n for n in last_notes(self.job.journal_path(rank)) if n["event"] == event]
        return notes[-1] if notes else None

    def _log(self, rank: int) -> Path:
        return self.job.folder / ("rank0.log" if self.plan.launcher == "torchrun"
                                  else f"rank{rank}.log")

    def _record(self, status: str, reason: str, rank: int) -> None:
        assert self._current is not None
        case, begun = self._current
        record = Record(case=case, status=status, reason=reason, started=begun)
        record.seconds, record.writer = time.time() - begun, f"parent-{self.job.writer}"
        record.log = str(self._log(rank).relative_to(self.plan.out))
        writer = RecordWriter(self.plan.out / "records" / f"{record.writer}.jsonl")
        try:
            writer.append(record.to_json())
        finally:
            writer.close()
        self._announce(record)


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _oom_kills() -> int:
    """How often the kernel has killed for memory in this process's cgroup (v2 or v1)."""
    total = 0
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "":
                files = [Path(f"/sys/fs/cgroup{path}/memory.events")]
            elif "memory" in kinds.split(","):
                files = [Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control")]
            else:
                continue
            for file in files:
                with suppress(OSError):
                    found = re.search(r"^oom_kill (\d+)", file.read_text(), re.MULTILINE)
                    total += int(found[1]) if found else 0
    return total
