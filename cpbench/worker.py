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
from typing import TYPE_CHECKING, Any

from cpbench import masks
from cpbench.environment import collect, environment_id, usable_cores
from cpbench.problem import Case
from cpbench.record import Record
from cpbench.store import EXIT_STORE, Job, Journal, RecordWriter, StoreError

if TYPE_CHECKING:
    from cpbench.comm import Comm, Control
    from cpbench.device import Device

EXIT_FAILED = 70  # this rank failed on a case; its journal says how
REASON_CHARS = 400  # the log has the whole of it
PATIENCE_S = 12 * 3600.0  # far above any timeout of a case: the parent ends what hangs


class _Rank:
    """One rank at work on the cases of a job."""

    def __init__(
        self, job: Job, journal: Journal, rank: int, size: int, local_rank: int, local_size: int
    ) -> None:
        from cpbench.comm import Control, TorchComm
        from cpbench.device import open_device

        self.job, self.journal, self.rank, self.size = job, journal, rank, size
        self.local_size = local_size
        threads = job.settings.threads or max(1, usable_cores() // local_size)
        self.device: Device = open_device(job.device, local_rank, threads)
        _init_process_group(self.device.backend, rank, size)
        self.comm: Comm = TorchComm()
        self.control: Control = Control(timeout_s=PATIENCE_S)
        self.writer: RecordWriter | None = None
        environment = {**collect(), "device": self.device.describe()}
        self.environment = environment_id(environment)
        if rank == 0:
            self.writer = RecordWriter(job.record_path)
            self.writer.append({"kind": "environment", "id": self.environment, **environment})

    def run(self) -> None:
        for case in self.job.cases:
            self.journal.note("start", case=case.id)
            started = time.time()
            record = self._case(case)
            if self.writer is not None:
                record.started, record.seconds = started, time.time() - started
                record.environment, record.writer = self.environment, self.job.writer
                self.writer.append(record.to_json())
            self.journal.note("done", case=case.id)
        if self.writer is not None:
            self.writer.close()
        self.journal.note("end")

    def _case(self, case: Case) -> Record:
        from cpbench import check, measure
        from cpbench import layout as layouts
        from cpbench.api import Attention
        from cpbench.operator import Unsupported

        settings, control, comm = self.job.settings, self.control, self.comm
        device = self.device.type
        self.journal.note("prepare", case=case.id)
        problem = case.problem
        begun = time.perf_counter()
        work, refusal = None, None
        try:
            mask = masks.build(case.mask, case.seq_len)
            layout = layouts.build(case.layout, case.seq_len, self.size)
            work = Attention(
                case.operator, case.strategy, mask, layout, problem, self.rank, device
            )
        except Unsupported as error:
            refusal = str(error)
        plan_us = (time.perf_counter() - begun) * 1e6
        answers = control.gather((refusal, plan_us, work.digest if work else None))
        refusals = [reason for reason, _, _ in answers if reason]
        if refusals:
            return Record(case=case, status="unsupported", reason=refusals[0])
        assert work is not None
        if len({digest for _, _, digest in answers}) > 1:
            raise RuntimeError(f"ranks disagree on the problem: {answers}")

        record = Record(case=case, status="ok", plan_us=max(us for _, us, _ in answers))
        record.area = mask.area
        record.balance = layout.area_matrix(mask).sum(axis=1).tolist()
        record.flops = {
            phase: flops
            for phase, flops in problem.flops(mask.area).items()
            if phase in case.direction.split("_")
        }

        def prepared(small_mask: Any, small_layout: Any, small_problem: Any) -> Attention:
            return Attention(case.operator, case.strategy, small_mask, small_layout,
                             small_problem, self.rank, device)

        # Gradients are checked whenever they are timed; "fwd" cases check outputs alone.
        if settings.check_small:
            self.journal.note("check", case=case.id)
            errors = check.small(prepared, mask, problem, self.size, case.layout.name, case.seed,
                                 device, comm, control, self.rank)
            record.errors["small"] = errors
        inputs = check.make_inputs(problem, layout.positions(self.rank), case.seed, device)
        if settings.check_sampled and case.seq_len > check.SMALL_TOKENS:
            self.journal.note("check at size", case=case.id)
            record.errors["sampled"] = check.sampled(
                work, inputs, case.seed, device, comm, control
            )
        for found in record.errors.values():
            wrong = check.verdict(found, case.dtype)
            if wrong is not None:
                record.errors = _finite(record.errors)
                record.status, record.reason = "wrong", wrong
                return record
        if not settings.time:
            return record

        workload = measure.Workload(work, inputs, comm)
        self.journal.note("measure", case=case.id)
        flags = set(self.device.flags(self.local_size))
        timing = measure.measure_time(workload, self.device, comm, control, settings)
        flags.update(self.device.flags(self.local_size))
        memory: dict[str, int] = {"inputs": sum(x.nbytes for x in inputs.values())}
        if settings.memory:
            self.journal.note("memory", case=case.id)
            memory.update(measure.measure_memory(workload, self.device, control))
        ranks = control.gather((timing, memory, sorted(flags)))
        timings = [timing for timing, _, _ in ranks]
        record.times_us = {p: [t.times_us[p] for t in timings] for p in workload.phases}
        record.first_call_us = max(t.first_call_us for t in timings)
        record.bytes_sent = {p: [t.bytes_sent[p] for t in timings] for p in workload.phases}
        record.messages = {p: [t.messages[p] for t in timings] for p in workload.phases}
        record.memory_bytes = {kind: [m[kind] for _, m, _ in ranks] for kind in memory}
        record.flags = sorted({flag for _, _, found in ranks for flag in found})
        return record


def _finite(errors: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """JSON has no infinity: an infinite or undefined error is null."""
    return {
        check: {
            tensor: {m: (x if abs(x) < float("inf") else None) for m, x in metrics.items()}
            for tensor, metrics in tensors.items()
        }
        for check, tensors in errors.items()
    }


def _init_process_group(backend: str, rank: int, size: int) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    path = os.environ.get("CPBENCH_STORE")
    store = dist.FileStore(path, size) if path else None  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size,
                            timeout=timedelta(seconds=PATIENCE_S))


def _die_with_parent() -> None:
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


def _last_words(error: BaseException) -> tuple[str, str]:
    """Status and reason of a failure, in one line."""
    if isinstance(error, StoreError):
        return "store", str(error)
    lines = f"{type(error).__name__}: {error}".splitlines()
    line = " ".join(next(part for part in lines if part.strip()).split())[:REASON_CHARS]
    known = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc",
             "alloc_failed")
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in known):
        return "oom", line
    return "crash", line


def main(argv: list[str]) -> int:
    """Work through the job file named in ``argv``."""
    _die_with_parent()
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
            status, reason = _last_words(error)
            journal.note("failed", status=status, reason=reason)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(EXIT_STORE if isinstance(error, StoreError) else EXIT_FAILED)
    import torch.distributed as dist

    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
