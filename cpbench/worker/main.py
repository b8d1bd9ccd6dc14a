"""One rank's process: takes a job file, works through its cases, rank 0 writes the records.

Started by a launcher; ``cpbench.worker.rendezvous`` says how ranks learn who they are.  Every rank
notes in its own journal what it is doing, so that the parent knows what a dead or silent rank was
at.

A refusal or a wrong result is agreed on by all ranks and becomes a record.  Anything else that
goes wrong on a rank ends the rank: the parent reads its last words, ends the others, writes the
record and starts a new gang for the cases that are left.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.core.environment import collect, environment_id, node_facts, usable_cores
from cpbench.core.problem import Case
from cpbench.measure import peaks
from cpbench.measure.timeline_slices import chrome_trace
from cpbench.results.record import Record
from cpbench.results.store import (
    EXIT_STORE,
    Job,
    Journal,
    RecordWriter,
    StoreError,
    write_trace,
)
from cpbench.worker import rendezvous
from cpbench.worker.rendezvous import Seat

if TYPE_CHECKING:
    from cpbench.measure.device import Device
    from cpbench.measure.telemetry import Telemetry
    from cpbench.parallel.comm import Control
    from cpbench.worker.evaluate import Evaluation

EXIT_FAILED = 70  # this rank failed on a case; its journal says how
NAP_S = 50e-6  # between looks for MPI messages, where ranks share cores
REASON_CHARS = 400  # the log has the whole of it


class _Rank:
    """One rank at work on the cases of a job."""

    def __init__(self, job: Job, path: Path, journal: Journal, seat: Seat) -> None:
        from cpbench.measure.device import open_device, shortage

        self.job, self.path, self.journal, self.seat = job, path, journal, seat
        local_size = seat.local_size
        self.writer = RecordWriter(job.record_path) if seat.rank == 0 else None
        self.telemetry: Telemetry | None = None
        self.evaluation: Evaluation | None = None
        self.shortage = shortage(job.device, local_size)
        if self.shortage is None:
            threads = job.settings.threads or max(1, usable_cores() // local_size)
            self.device: Device = open_device(
                job.device, seat.local_rank, threads, job.settings.clock
            )

    def run(self) -> None:
        try:
            self._work()
        finally:
            if self.telemetry is not None:
                self.telemetry.close()

    def _work(self) -> None:
        environment = collect()
        record_of = self._refuse
        if self.shortage is None:
            self.evaluation = evaluation = self._evaluation()
            record_of = evaluation.record
            environment["device"] = self.device.describe()
            environment |= self._everywhere(evaluation.control)
            if self.job.settings.time:
                dtypes = [case.dtype for case in self.job.cases]
                environment["peaks"] = peaks.measure(self.device, evaluation.control, dtypes)
            evaluation.telemetry = self.telemetry = self._telemetry(evaluation.control)
        self.environment = environment_id(environment)
        if self.writer is not None:
            self.writer.append({"kind": "environment", "id": self.environment, **environment})
        turns = self.job.settings.interleave
        for group in self._groups():
            found: dict[str, Record] = {}
            for turn, case in itertools.product(range(turns), group):
                self.journal.note("start", case=case.id)
                started = time.time()
                record = record_of(case, found.get(case.id))
                record.started = record.started or started
                record.seconds += time.time() - started
                self._write_trace(record)
                found[case.id] = record
                if turn < turns - 1:
                    self.journal.note("paused", case=case.id)
                    continue
                if self.writer is not None:
                    record.environment, record.writer = self.environment, self.job.writer
                    self.writer.append(record.to_json())
                self.journal.note("done", case=case.id)
        if self.writer is not None:
            self.writer.close()
        self.journal.note("end")

    def _write_trace(self, record: Record) -> None:
        """What ranks did when, where they were watched."""
        timeline = self.evaluation.timeline if self.evaluation is not None else None
        if timeline is not None and self.writer is not None:
            about = {"case": record.case.id, "label": record.case.label,
                     "measured ms": record.median_us and record.median_us / 1e3}  # fmt: skip
            write_trace(self.job.out, record.case.id, chrome_trace(timeline, about))

    def _evaluation(self) -> Evaluation:
        from cpbench.parallel.comm import Comm, Control, TorchComm
        from cpbench.worker.evaluate import Evaluation

        rendezvous.meet(self.device.backend, self.seat, self.path)
        control = Control(timeout_s=rendezvous.PATIENCE_S)
        settings, note = self.job.settings, self.journal.note
        comm: Comm = TorchComm()
        if settings.transport == "mpi":
            from cpbench.parallel.comm_mpi import MpiComm

            comm = MpiComm(nap_s=NAP_S if self.seat.local_size > usable_cores() else 0.0)
        return Evaluation(self.device, comm, control, settings, self.seat.local_size, note)

    def _everywhere(self, control: Control) -> dict[str, Any]:
        """Where each rank is, and what each machine is like, on every rank."""
        first = self.seat.local_rank == 0
        node = {**node_facts(), "gpus": _gpus()} if first else None
        told = control.gather((platform.node(), self.seat.local_rank, self.device.gpu(), node))
        ranks = [
            {"host": host, "local_rank": local, **({"gpu": gpu} if gpu else {})}
            for host, local, gpu, _ in told
        ]
        return {"ranks": ranks, "nodes": [facts for *_, facts in told if facts is not None]}

    def _telemetry(self, control: Control) -> Telemetry | None:
        """A sampler of the ranks' GPUs, where there are any."""
        from cpbench.measure.telemetry import Telemetry

        uuid, seconds = self.device.gpu(), self.job.settings.telemetry_s
        if uuid is None or not seconds:
            return None
        first = self.seat.local_rank == 0
        return Telemetry(uuid, seconds, control, platform.node(), first)

    def _groups(self) -> Iterator[list[Case]]:
        """What is measured in turn: the cases of a problem, which lie together, or each alone."""
        if self.job.settings.interleave == 1:
            yield from ([case] for case in self.job.cases)
        else:
            for _, group in itertools.groupby(self.job.cases, lambda case: case.problem_key):
                yield list(group)

    def _refuse(self, case: Case, before: Record | None) -> Record:
        return before or Record(case=case, status="unsupported", reason=self.shortage)


def _gpus() -> dict[str, Any] | str:
    """The GPUs of this machine and how they are joined, or why that is not known."""
    from cpbench.measure.telemetry import Nvml

    try:
        nvml = Nvml()
    except OSError as error:
        return str(error)
    found = nvml.topology()
    nvml.close()
    return found


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies, so that none is left behind."""
    with suppress(OSError, AttributeError):  # Linux only; elsewhere the parent's own care serves
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if _is_orphan():
            print("cpbench.worker.main: whoever started this is gone", file=sys.stderr)
            os._exit(EXIT_FAILED)


def _is_orphan() -> bool:
    """Whether who started all this was gone before it could be asked for."""
    wanted, pid = os.environ.get("CPBENCH_PARENT"), str(os.getpid())
    while wanted is not None and pid != wanted:
        if pid in ("0", "1"):
            return True
        pid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return False


def last_words(error: BaseException) -> tuple[str, str]:
    """Status and reason of a failure, in one line."""
    if isinstance(error, StoreError):
        return "store", str(error)
    lines = f"{type(error).__name__}: {error}".splitlines()
    line = " ".join(next(part for part in lines if part.strip()).split())[:REASON_CHARS]
    known = (
        "out of memory",
        "can't allocate memory",
        "cannot allocate memory",
        "bad_alloc",
        "alloc_failed",
    )
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in known):
        return "oom", line
    return "crash", line


def main(argv: list[str]) -> int:
    """Work through the job file named in ``argv``."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    path = Path(argv[0])
    job = Job.load(path)
    try:
        seat = rendezvous.seat()
    except ValueError as error:
        print(f"cpbench.worker.main: {error}", file=sys.stderr)
        return EXIT_FAILED
    try:
        journal = Journal(job.journal_path(seat.rank))
        journal.note("boot", pid=os.getpid())
        _Rank(job, path, journal, seat).run()
    except BaseException as error:
        # Other ranks may never answer: nothing from here on talks to them or must succeed.
        with suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
        with suppress(OSError, NameError):
            status, reason = last_words(error)
            journal.note("failed", status=status, reason=reason)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(EXIT_STORE if isinstance(error, StoreError) else EXIT_FAILED)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
