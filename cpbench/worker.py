"""One rank's process: takes a job file, works through its cases, rank 0 writes the records.

Started by a launcher with RANK, WORLD_SIZE and LOCAL_RANK in the environment, and either
CPBENCH_STORE (a file that ranks meet through) or MASTER_ADDR and MASTER_PORT.  Every rank notes in
its own journal what it is doing, so that the parent knows what a dead or silent rank was at.

A refusal or a wrong result is agreed on by all ranks and becomes a record.  Anything else that
goes wrong on a rank ends the rank: the parent reads its last words, ends the others, writes the
record and starts a new gang for the cases that are left.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cpbench.environment import collect, environment_id, usable_cores
from cpbench.problem import Case
from cpbench.record import Record
from cpbench.store import EXIT_STORE, Job, Journal, RecordWriter, StoreError

if TYPE_CHECKING:
    from cpbench.device import Device
    from cpbench.evaluate import Evaluation

EXIT_FAILED = 70  # this rank failed on a case; its journal says how
REASON_CHARS = 400  # the log has the whole of it
PATIENCE_S = 12 * 3600.0  # far above any timeout of a case: the parent ends what hangs


class _Rank:
    """One rank at work on the cases of a job."""

    def __init__(
        self, job: Job, journal: Journal, rank: int, size: int, local_rank: int, local_size: int
    ) -> None:
        from cpbench.device import open_device, shortage

        self.job, self.journal = job, journal
        self.ranks = (rank, size, local_size)
        self.writer: RecordWriter | None = None
        environment = collect()
        self.shortage = shortage(job.device, local_size)
        if self.shortage is None:
            threads = job.settings.threads or max(1, usable_cores() // local_size)
            self.device: Device = open_device(job.device, local_rank, threads)
            environment["device"] = self.device.describe()
        self.environment = environment_id(environment)
        if rank == 0:
            self.writer = RecordWriter(job.record_path)
            self.writer.append({"kind": "environment", "id": self.environment, **environment})

    def run(self) -> None:
        record_of = self._refuse if self.shortage else self._evaluation().record
        for case in self.job.cases:
            self.journal.note("start", case=case.id)
            started = time.time()
            record = record_of(case)
            if self.writer is not None:
                record.started, record.seconds = started, time.time() - started
                record.environment, record.writer = self.environment, self.job.writer
                self.writer.append(record.to_json())
            self.journal.note("done", case=case.id)
        if self.writer is not None:
            self.writer.close()
        self.journal.note("end")

    def _evaluation(self) -> Evaluation:
        from cpbench.comm import Control, TorchComm
        from cpbench.evaluate import Evaluation

        rank, size, local_size = self.ranks
        init_process_group(self.device.backend, rank, size)
        control = Control(timeout_s=PATIENCE_S)
        settings, note = self.job.settings, self.journal.note
        return Evaluation(self.device, TorchComm(), control, settings, local_size, note)

    def _refuse(self, case: Case) -> Record:
        return Record(case=case, status="unsupported", reason=self.shortage)


def init_process_group(backend: str, rank: int, size: int) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    path = os.environ.get("CPBENCH_STORE")
    store = dist.FileStore(path, size) if path else None  # type: ignore[attr-defined]
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE_S)
    )


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies, so that none is left behind."""
    with suppress(OSError, AttributeError):  # Linux only; elsewhere the parent's own care serves
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if _is_orphan():
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
    job = Job.load(Path(argv[0]))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    try:
        journal = Journal(job.journal_path(rank))
        journal.note("boot", pid=os.getpid())
        _Rank(job, journal, rank, size, local_rank, local_size).run()
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
