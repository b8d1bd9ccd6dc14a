"""Times of messages between ranks: one rank's process of ``cpbench links``.

Started like ``cpbench.worker.main``: ``python -m cpbench.tools.links_worker JOBFILE``, with the
same variables in the environment.  Rank 0 appends to ``links.jsonl`` beside the job file: first who
is there, then a line for each link class, operation and size, with every sample of every group of
ranks.

- Point-to-point: pairs of neighbours inside each node (the nodes at the same time), and the first
  ranks of one node and the next (a node is in one pair at a time).  A sample is half of the way
  there and back, as in the OSU micro-benchmarks' osu_latency.
- Collectives: inside each node, over the first rank of every node, and over all ranks.  A sample is
  the time of the slowest rank; sizes are those of nccl-tests (doc/PERFORMANCE.md), the whole array:
  what a rank gives (all-to-all, reduce-scatter, all-reduce) or ends up with (all-gather).

Short operations are repeated in a sample, back to back, and their mean is taken.  What has arrived
is compared with what was sent after every sample, outside of its time.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.results.store import Journal, Lines
from cpbench.tools.links_operations import WORKS, LinkError, Work, actual_bytes, elements
from cpbench.worker import rendezvous
from cpbench.worker.main import EXIT_FAILED, die_with_parent, last_words
from cpbench.worker.rendezvous import Seat

if TYPE_CHECKING:
    from cpbench.measure.device import Device
    from cpbench.parallel.comm import Comm, Control

COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
NODE, ACROSS, ALL = "node", "across", "all"
FEWEST, MOST = 5, 100  # samples
SAMPLE_US = 1000.0  # shorter operations are repeated, but at most so often:
REPEATS = 20

Groups = list[tuple[int, ...]]


@dataclass(frozen=True)
class LinkJob:
    """What the ranks are told.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        sizes: bytes.
        ranks_per_node: 0 to find out from host names.
        seconds: of sampling for each operation, size and round of groups, after which only the
            fewest samples are taken.
    """

    device: str
    sizes: tuple[int, ...]
    ranks_per_node: int
    seconds: float

    def save(self, folder: Path) -> Path:
        path = folder / "job.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def load(cls, path: Path) -> LinkJob:
        return cls(**json.loads(path.read_text()))


def journal_path(job: Path, rank: int) -> Path:
    """Where a rank notes what it is at."""
    return job.parent / f"rank{rank}.jsonl"


def results_path(job: Path) -> Path:
    """Where rank 0 writes what was measured."""
    return job.parent / "links.jsonl"


def plan(size: int, per_node: int) -> list[tuple[str, str, list[Groups]]]:
    """What is measured: link class, operation, and rounds of groups that act at the same time."""
    nodes = [tuple(range(first, first + per_node)) for first in range(0, size, per_node)]
    firsts = tuple(node[0] for node in nodes)
    found: list[tuple[str, str, list[Groups]]] = []
    if per_node > 1:
        pairs: list[Groups] = [[node[i : i + 2] for node in nodes] for i in range(per_node - 1)]
        found.append((NODE, "p2p", pairs))
        found += [(NODE, operation, [list(nodes)]) for operation in COLLECTIVES]
    if len(nodes) > 1:
        chain: Groups = list(itertools.pairwise(firsts))
        found.append((ACROSS, "p2p", [some for some in (chain[::2], chain[1::2]) if some]))
        found += [(ACROSS, operation, [[firsts]]) for operation in COLLECTIVES]
    if 1 < per_node < size:
        found += [(ALL, operation, [[tuple(range(size))]]) for operation in COLLECTIVES]
    return found


class Links:
    """One rank's part in all measurements."""

    def __init__(
        self, job: LinkJob, device: Device, comm: Comm, control: Control, journal: Journal
    ) -> None:
        self._job, self._device, self._comm = job, device, comm
        self._control, self._journal = control, journal

    def run(self, results: Lines | None) -> None:
        """Measure everything; rank 0 has somewhere to write it.

        Raises:
            LinkError: when something else has arrived than was sent.
        """
        control, job = self._control, self._job
        per_node = job.ranks_per_node or control.ranks_per_node()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", control.size))
        all_there = control.gather((os.uname().nodename, self._device.flags(here)))
        if results is not None:
            about = {
                "ranks": control.size,
                "ranks_per_node": per_node,
                "hosts": [host for host, _ in all_there],
                "flags": sorted({flag for _, flags in all_there for flag in flags}),
            }
            results.append({"kind": "world", **about, "device": self._device.describe()})
        for link, operation, rounds in plan(control.size, per_node):
            ranks = len(rounds[0][0])
            for nbytes in sorted({actual_bytes(operation, n, ranks) for n in job.sizes}):
                what = f"{operation} ({link}) of {nbytes} bytes"
                groups = [
                    group
                    for at_once in rounds
                    for group in self._round(what, operation, at_once, nbytes)
                ]
                if results is not None:
                    row = {"link": link, "operation": operation, "bytes": nbytes, "ranks": ranks}
                    results.append({"kind": "times", **row, "groups": groups})
                self._journal.note("done", case=what)

    def _round(self, what: str, operation: str, at_once: Groups, nbytes: int) -> list[Any]:
        """The samples of each group, in microseconds."""
        self._journal.note("start", case=what)
        control, work = self._control, None
        mine = next((group for group in at_once if control.rank in group), None)
        if mine is not None:
            length = elements(operation, nbytes, len(mine))
            work = WORKS[operation](self._comm, mine, length, self._device.type)
        self._sample(work, what, 1)  # connections are made
        took_us = max(control.slowest(self._sample(work, what, 1)), 1e-3)
        repeats = min(max(int(SAMPLE_US / took_us), 1), REPEATS)
        count = int(self._job.seconds * 1e6 / (took_us * repeats))
        times_us = [self._sample(work, what, repeats) for _ in range(min(max(count, FEWEST), MOST))]
        of_all = control.gather(times_us)
        return [
            {
                "ranks": list(group),
                "times_us": [max(of_all[rank][i] for rank in group) for i in range(len(times_us))],
            }
            for group in at_once
        ]

    def _sample(self, work: Work | None, what: str, repeats: int) -> float:
        """Microseconds of one operation on this rank, all groups starting together."""
        if work is None:
            self._control.barrier()
            return 0.0
        work.reset(repeats)

        def run() -> None:
            for turn in range(repeats):
                work.once(turn)

        self._control.barrier()
        took_us = self._device.time_us(run)
        work.check(what)
        return took_us * work.share / repeats


def _measure(job_path: Path, journal: Journal, seat: Seat) -> None:
    import torch.distributed as dist

    from cpbench.measure.device import open_device, shortage
    from cpbench.parallel.comm import Control, TorchComm

    job = LinkJob.load(job_path)
    if (reason := shortage(job.device, seat.local_size)) is not None:
        raise LinkError(reason)
    device = open_device(job.device, seat.local_rank, threads=1)
    rendezvous.meet(device.backend, seat, job_path)
    links = Links(job, device, TorchComm(), Control(), journal)
    if seat.rank == 0:
        with Lines(results_path(job_path), sync=False) as results:
            links.run(results)
    else:
        links.run(None)
    journal.note("end")
    dist.destroy_process_group()


def main(argv: list[str]) -> int:
    """Measure what the job file named in ``argv`` asks for."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    faulthandler.enable()
    path, seat = Path(argv[0]), rendezvous.seat()
    journal = Journal(journal_path(path, seat.rank))
    journal.note("boot", pid=os.getpid())
    try:
        _measure(path, journal, seat)
    except BaseException as error:
        # Other ranks may never answer: nothing from here on talks to them or must succeed.
        with suppress(OSError):
            traceback.print_exc()
        with suppress(OSError):
            status, reason = last_words(error)
            if isinstance(error, LinkError):
                reason = str(error)
            journal.note("failed", status=status, reason=reason)
        os._exit(EXIT_FAILED)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
