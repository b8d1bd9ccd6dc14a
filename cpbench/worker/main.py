"""The worker process of one rank: runs the cases of a job file; rank 0 writes the records.

A launcher starts it; ranks join as described in ``cpbench.worker.rendezvous``.  Every rank writes
its current case and phase to its own journal, from which the parent knows the phase in which a
rank died or hung.

All ranks agree on refusals and wrong results, which become records.  Any other error ends the
rank: the parent reads the cause from its journal, ends the other ranks, writes the record and
starts a new gang for the remaining cases.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import itertools
import os
import platform
import random
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.core.environment import collect_environment, environment_id, node_facts, usable_cores
from cpbench.core.problem import Case
from cpbench.core.subprocess_call import collect_nothing_at_exit, collection_paused
from cpbench.core.user_files import count_from
from cpbench.measure.peaks import measure_peaks
from cpbench.measure.timeline_slices import chrome_trace
from cpbench.results.record import UNFINISHED, Record
from cpbench.results.store import (
    EXIT_STORE,
    Job,
    Journal,
    RecordWriter,
    StoreError,
    write_trace,
)
from cpbench.verify.fit import is_out_of_memory, one_line
from cpbench.worker import rendezvous
from cpbench.worker.rendezvous import RankPlace

if TYPE_CHECKING:
    from cpbench.measure.device.protocol import Device
    from cpbench.measure.telemetry import Telemetry
    from cpbench.parallel.comm import Control
    from cpbench.worker.evaluate import Evaluator

EXIT_FAILED = 70  # this rank failed on a case; the cause is in its journal
MPI_POLL_S = 50e-6  # interval of polling for MPI messages where there are more ranks than cores
UNSAVED_S = 30.0  # of measuring a case in turns, before its record is written as unfinished


class _Worker:
    """One rank of the gang that runs the cases of a job."""

    def __init__(self, job: Job, path: Path, journal: Journal, place: RankPlace) -> None:
        from cpbench.measure.device.opening import device_shortage, open_device

        self.job, self.path, self.journal, self.place = job, path, journal, place
        local_world_size = place.local_world_size
        self.writer = RecordWriter(job.record_path) if place.rank == 0 else None
        self.telemetry: Telemetry | None = None
        self.evaluator: Evaluator | None = None
        self.shortage = device_shortage(job.device, local_world_size)
        if self.shortage is None:
            threads = job.settings.threads or max(1, usable_cores() // local_world_size)
            self.device: Device = open_device(
                job.device, place.local_rank, threads, job.settings.clock
            )

    def run(self) -> None:
        try:
            self._run_cases()
        finally:
            if self.telemetry is not None:
                self.telemetry.close()

    def _run_cases(self) -> None:
        environment = collect_environment()
        evaluate = self._unsupported
        if self.shortage is None:
            control = self._join()
        if self.shortage is None:
            self.evaluator = evaluator = self._make_evaluator(control)
            evaluate = evaluator.evaluate
            environment["device"] = self.device.describe()
            environment |= self._gang_environment(evaluator.control)
            if self.job.settings.time:
                dtypes = [case.dtype for case in self.job.cases]
                evaluator.peaks = measure_peaks(self.device, evaluator.control, dtypes)
                environment["peaks"] = evaluator.peaks
            evaluator.telemetry = self.telemetry = self._start_telemetry(evaluator.control)
        self.environment = environment_id(environment)
        if self.writer is not None:
            self.writer.append({"kind": "environment", "id": self.environment, **environment})
        for group in self._interleaved_groups():
            self._measure_in_turn(group, evaluate)
            if self.evaluator is not None:
                self.evaluator.disconnect()
        if self.writer is not None:
            self.writer.close()
        self.journal.note("end")

    def _measure_in_turn(self, group: Sequence[Case], evaluate: Callable[..., Record]) -> None:
        """Measure cases in turn, in a random order each time: whatever disturbs the machine favours
        none of them, so that identical methods differ by chance alone.

        A record is written after the last turn.  Before that, it is written as unfinished where
        ``UNSAVED_S`` have passed, so that a killed run loses no more than that.
        """
        turns, records = self._turns(group[0]), dict[str, Record]()
        saved: dict[str, float] = {}
        for turn in range(turns):
            order = random.Random(f"{self.job.writer} {turn}")  # the same on all ranks
            for case in order.sample(group, len(group)):
                self.journal.note("start", case=case.id)
                started, begun = time.time(), time.monotonic()
                record = evaluate(case, records.get(case.id), turns)
                record.started = record.started or started
                record.seconds += time.monotonic() - begun
                self._write_trace(record)
                records[case.id] = record
                last = turn == turns - 1
                if last or time.monotonic() - saved.setdefault(case.id, begun) > UNSAVED_S:
                    saved[case.id] = time.monotonic()
                    self._write(record, finished=last)
                self.journal.note("done" if last else "paused", case=case.id)

    def _write(self, record: Record, finished: bool) -> None:
        """Write a record; on rank 0."""
        if self.writer is not None:
            record.environment, record.writer = self.environment, self.job.writer
            flags = () if finished else (UNFINISHED,)
            self.writer.append(replace(record, flags=[*record.flags, *flags]).to_json())

    def _write_trace(self, record: Record) -> None:
        """Write the timelines of the ranks, where they were traced; on rank 0."""
        timelines = self.evaluator.timelines if self.evaluator is not None else None
        if timelines is not None and self.writer is not None:
            metadata = {"case": record.case.id, "label": record.case.label,
                        "measured ms": record.median_us and record.median_us / 1e3}  # fmt: skip
            write_trace(self.job.out, record.case.id, chrome_trace(timelines, metadata))

    def _join(self) -> Control:
        """Join the process group, and see whether ranks share a GPU; collective."""
        from cpbench.measure.device.opening import shared_gpu
        from cpbench.parallel.comm import Control

        rendezvous.join_process_group(self.device.backend, self.place, self.path)
        control = Control(timeout_s=rendezvous.GROUP_TIMEOUT_S)
        self.shortage = shared_gpu(control.all_gather((platform.node(), self.device.gpu_uuid())))
        return control

    def _make_evaluator(self, control: Control) -> Evaluator:
        """Make the evaluator; collective."""
        from cpbench.parallel.comm import Transport
        from cpbench.parallel.comm_torch import TorchComm
        from cpbench.worker.evaluate import Evaluator

        settings, note = self.job.settings, self.journal.note
        comm: Transport = TorchComm()
        if settings.transport == "mpi":
            from cpbench.parallel.comm_mpi import MpiComm

            oversubscribed = self.place.local_world_size > usable_cores()
            comm = MpiComm(poll_interval_s=MPI_POLL_S if oversubscribed else 0.0)
        local_world_size = self.place.local_world_size
        launch_seed = zlib.crc32(self.job.writer.encode())
        return Evaluator(self.device, comm, control, settings, local_world_size, launch_seed, note)

    def _gang_environment(self, control: Control) -> dict[str, Any]:
        """The host and GPU of each rank and the facts of each node, on every rank; collective."""
        first = self.place.local_rank == 0
        node = {**node_facts(), "gpus": _gpu_topology()} if first else None
        place = (platform.node(), self.place.local_rank, self.device.gpu_uuid())
        gathered = control.all_gather((*place, node))
        ranks = [
            {"host": host, "local_rank": local_rank, **({"gpu": gpu} if gpu else {})}
            for host, local_rank, gpu, _ in gathered
        ]
        return {"ranks": ranks, "nodes": [facts for *_, facts in gathered if facts is not None]}

    def _start_telemetry(self, control: Control) -> Telemetry | None:
        """A sampler of the ranks' GPUs, or None on CPUs or where it is switched off; collective."""
        from cpbench.measure.telemetry import Telemetry

        uuid, seconds = self.device.gpu_uuid(), self.job.settings.telemetry_s
        if uuid is None or not seconds:
            return None
        first = self.place.local_rank == 0
        return Telemetry(uuid, seconds, control, platform.node(), first)

    def _interleaved_groups(self) -> Iterator[list[Case]]:
        """Groups of cases that are measured in turn: the adjacent cases of one problem with several
        turns; other cases alone."""

        def key(case: Case) -> object:
            return (case.problem_key, self._turns(case)) if self._turns(case) > 1 else case.id

        for _, group in itertools.groupby(self.job.cases, key):
            yield list(group)

    def _turns(self, case: Case) -> int:
        return self.job.turns.get(case.id, 1)

    def _unsupported(self, case: Case, previous: Record | None, turns: int) -> Record:
        """The record of a case on a machine with too few devices."""
        return previous or Record(case=case, status="unsupported", reason=self.shortage)


def _gpu_topology() -> dict[str, Any] | str:
    """The GPUs of this machine and their links, or why they are not known."""
    from cpbench.measure.telemetry import Nvml

    try:
        nvml = Nvml()
    except OSError as error:
        return str(error)
    topology = nvml.topology()
    nvml.close()
    return topology


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that no worker is left."""
    with suppress(OSError, AttributeError):  # Linux only; elsewhere the parent ends its workers
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if _launcher_has_exited():
            print(
                "cpbench.worker.main: the process that started this rank has exited",
                file=sys.stderr,
            )
            os._exit(EXIT_FAILED)


def _launcher_has_exited() -> bool:
    """Whether the process CPBENCH_PARENT is no longer an ancestor: it may have exited before
    :func:`die_with_parent` took effect."""
    launcher, pid = os.environ.get("CPBENCH_PARENT"), str(os.getpid())
    while launcher is not None and pid != launcher:
        if pid in ("0", "1"):
            return True
        pid = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[1]
    return False


def failure_status(error: BaseException) -> tuple[str, str]:
    """Status (``store``, ``oom`` or ``crash``) and reason, one line, of a failure."""
    if isinstance(error, StoreError):
        return "store", str(error)
    return "oom" if is_out_of_memory(error) else "crash", one_line(error)


def main(argv: list[str]) -> int:
    """Run the job file named in ``argv``."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    collect_nothing_at_exit()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    path = Path(argv[0])
    try:
        job = Job.load(path)
        count_from(job.files_from)
        place = rendezvous.rank_place()
    except ValueError as error:
        print(f"cpbench.worker.main: {error}", file=sys.stderr)
        return EXIT_FAILED
    try:
        journal = Journal(job.journal_path(place.rank))
        journal.note("boot", pid=os.getpid())
        with collection_paused():
            importlib.import_module("cpbench.worker.evaluate")  # and torch
        _Worker(job, path, journal, place).run()
    except BaseException as error:
        # Other ranks may not respond: no communication from here on, and no step has to succeed.
        with suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
        with suppress(OSError, NameError):
            status, reason = failure_status(error)
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
