"""The process of one rank of ``cpbench links``.

Started like ``cpbench.worker.main``: ``python -m cpbench.tools.links_worker JOBFILE``, with the
same environment variables.  Rank 0 appends to ``links.jsonl`` beside the job file: first a line on
the ranks and their hosts, then one for each link class, operation and size, with every sample of
every group of ranks.

- Point-to-point: pairs of neighbours inside each node (all nodes at the same time), and the first
  ranks of consecutive nodes (a node is in one pair at a time).  A sample is half of the round-trip
  time, as in osu_latency of the OSU micro-benchmarks.
- Rings: every rank of a node sends to the next one and receives from the one before, at once (all
  nodes at the same time); so do the first ranks of all nodes; and ``cross``, where a node has
  several ranks: each rank with those in its place on the next node and the one before, all ranks of
  all nodes at once.  A sample is the time of the slowest rank.
- Collectives: inside each node, over the first rank of every node, and over all ranks.  A sample is
  the time of the slowest rank.  As in nccl-tests (doc/PERFORMANCE.md), the size is that of the
  whole array: a rank's input (all-to-all, reduce-scatter, all-reduce) or output (all-gather).

Short operations are repeated back to back in a sample, which is their mean.  The received data is
checked after every sample, outside the timed region.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import platform
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.core.subprocess_call import collect_nothing_at_exit
from cpbench.results.store import Journal, JsonLinesWriter
from cpbench.tools.links_operations import (
    OPERATIONS,
    LinkError,
    LinkOperation,
    actual_bytes,
    element_count,
)
from cpbench.worker import rendezvous
from cpbench.worker.main import EXIT_FAILED, die_with_parent, failure_status
from cpbench.worker.rendezvous import RankPlace

if TYPE_CHECKING:
    from cpbench.measure.device.protocol import Device
    from cpbench.parallel.comm import Comm, Control

COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
NODE, ACROSS, ALL = "node", "across", "all"
MIN_SAMPLES, MAX_SAMPLES = 5, 100
SAMPLE_US = 1000.0  # operations shorter than this are repeated in a sample
MAX_REPEATS = 20

Groups = list[tuple[int, ...]]


@dataclass(frozen=True)
class LinkJob:
    """The parameters of a measurement, in a file that all ranks read.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        sizes: bytes.
        ranks_per_node: 0 to find it from host names.
        seconds: sampling time per operation, size and round of groups; at least ``MIN_SAMPLES``
            are taken however long they take.
    """

    device: str
    sizes: tuple[int, ...]
    ranks_per_node: int
    seconds: float

    def save(self, folder: Path) -> Path:
        """Write the job file and return its path."""
        path = folder / "job.json"
        path.write_text(json.dumps(asdict(self)), "utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> LinkJob:
        """Read a job file."""
        return cls(**json.loads(path.read_text("utf-8")))


def journal_path(job: Path, rank: int) -> Path:
    """The journal of a rank: its current phase and operation."""
    return job.parent / f"rank{rank}.jsonl"


def results_path(job: Path) -> Path:
    """The file of results, written by rank 0."""
    return job.parent / "links.jsonl"


def plan_measurements(size: int, per_node: int) -> list[tuple[str, str, list[Groups]]]:
    """The link classes and operations to measure, each with its rounds of concurrent groups.

    Args:
        size: number of ranks.
        per_node: ranks of each node.
    """
    nodes = [tuple(range(first, first + per_node)) for first in range(0, size, per_node)]
    firsts = tuple(node[0] for node in nodes)
    measurements: list[tuple[str, str, list[Groups]]] = []
    if per_node > 1:
        neighbours: list[Groups] = [
            [node[i : i + 2] for node in nodes] for i in range(per_node - 1)
        ]
        measurements.append((NODE, "p2p", neighbours))
        measurements += [(NODE, name, [list(nodes)]) for name in ("ring", *COLLECTIVES)]
    if len(nodes) > 1:
        chain: Groups = list(itertools.pairwise(firsts))
        alternating = [pairs for pairs in (chain[::2], chain[1::2]) if pairs]
        measurements.append((ACROSS, "p2p", alternating))
        measurements += [(ACROSS, name, [[firsts]]) for name in ("ring", *COLLECTIVES)]
    if 1 < per_node < size:
        measurements.append((ALL, "cross", [list(zip(*nodes, strict=True))]))
        measurements += [(ALL, operation, [[tuple(range(size))]]) for operation in COLLECTIVES]
    return measurements


class LinkBenchmark:
    """One rank's part of all measurements."""

    def __init__(
        self, job: LinkJob, device: Device, comm: Comm, control: Control, journal: Journal
    ) -> None:
        self._job, self._device, self._comm = job, device, comm
        self._control, self._journal = control, journal

    def run(self, results: JsonLinesWriter | None) -> None:
        """Run all measurements.

        Args:
            results: where to write them, on rank 0; None on other ranks.

        Raises:
            LinkError: if this rank received wrong data.
        """
        control, job = self._control, self._job
        per_node = job.ranks_per_node or control.ranks_per_node()
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", control.size))
        host_flags = control.all_gather((os.uname().nodename, self._device.flags(local_world_size)))
        if results is not None:
            world = {
                "ranks": control.size,
                "ranks_per_node": per_node,
                "hosts": [host for host, _ in host_flags],
                "flags": sorted({flag for _, flags in host_flags for flag in flags}),
            }
            results.append({"kind": "world", **world, "device": self._device.describe()})
        for link, operation, rounds in plan_measurements(control.size, per_node):
            ranks = len(rounds[0][0])
            for nbytes in sorted({actual_bytes(operation, n, ranks) for n in job.sizes}):
                label = f"{operation} ({link}) of {nbytes} bytes"
                groups = [
                    group
                    for concurrent in rounds
                    for group in self._run_round(label, operation, concurrent, nbytes)
                ]
                if results is not None:
                    row = {"link": link, "operation": operation, "bytes": nbytes, "ranks": ranks}
                    results.append({"kind": "times", **row, "groups": groups})
                self._journal.note("done", case=label)

    def _run_round(self, label: str, name: str, groups: Groups, nbytes: int) -> list[Any]:
        """Measure one operation in concurrent groups; the samples of each, in microseconds."""
        self._journal.note("start", case=label)
        control, operation = self._control, None
        own_group = next((group for group in groups if control.rank in group), None)
        if own_group is not None:
            length = element_count(name, nbytes, len(own_group))
            operation = OPERATIONS[name](self._comm, own_group, length, self._device.type)
        self._sample(operation, label, 1)  # warmup: connections are opened
        time_us = max(control.max(self._sample(operation, label, 1)), 1e-3)
        repeats = min(max(int(SAMPLE_US / time_us), 1), MAX_REPEATS)
        count = int(self._job.seconds * 1e6 / (time_us * repeats))
        count = min(max(count, MIN_SAMPLES), MAX_SAMPLES)
        times_us = [self._sample(operation, label, repeats) for _ in range(count)]
        by_rank = control.all_gather(times_us)
        return [
            {
                "ranks": list(group),
                "times_us": [max(by_rank[rank][i] for rank in group) for i in range(count)],
            }
            for group in groups
        ]

    def _sample(self, operation: LinkOperation | None, label: str, repeats: int) -> float:
        """Microseconds of an operation on this rank, after a barrier of all; 0 for no operation."""
        if operation is None:
            self._control.barrier()
            return 0.0
        operation.reset(repeats)

        def run() -> None:
            for repeat in range(repeats):
                operation.run(repeat)

        self._control.barrier()
        time_us = self._device.time_us(run)
        operation.check(label)
        return time_us * operation.time_share / repeats


def _measure(job_path: Path, journal: Journal, place: RankPlace) -> None:
    import torch.distributed as dist

    from cpbench.measure.device.opening import device_shortage, open_device, shared_gpu
    from cpbench.parallel.comm import Control
    from cpbench.parallel.comm_torch import TorchComm

    job = LinkJob.load(job_path)
    if (reason := device_shortage(job.device, place.local_world_size)) is not None:
        raise LinkError(reason)
    device = open_device(job.device, place.local_rank, threads=1)
    rendezvous.join_process_group(device.backend, place, job_path)
    control = Control()
    gpus = control.all_gather((platform.node(), device.gpu_uuid()))
    if (reason := shared_gpu(gpus)) is not None:
        raise LinkError(reason)
    benchmark = LinkBenchmark(job, device, TorchComm(), control, journal)
    if place.rank == 0:
        with JsonLinesWriter(results_path(job_path), sync=False) as results:
            benchmark.run(results)
    else:
        benchmark.run(None)
    journal.note("end")
    dist.destroy_process_group()


def main(argv: list[str]) -> int:
    """Run the job file named in ``argv``; on an error, write it to the journal and exit."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    collect_nothing_at_exit()
    faulthandler.enable()
    path, place = Path(argv[0]), rendezvous.rank_place()
    journal = Journal(journal_path(path, place.rank))
    journal.note("boot", pid=os.getpid())
    try:
        _measure(path, journal, place)
    except BaseException as error:
        # Other ranks may never answer, so nothing from here on communicates with them.
        with suppress(OSError):
            traceback.print_exc()
        with suppress(OSError):
            status, reason = failure_status(error)
            if isinstance(error, LinkError):
                reason = str(error)
            journal.note("failed", status=status, reason=reason)
        os._exit(EXIT_FAILED)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
