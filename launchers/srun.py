"""Worker processes under srun, inside an allocation of Slurm: directly, under torchrun, over MPI.

Directly, each task is a rank and Slurm says which; they meet at an address that rank 0 writes
beside the job file.  Under torchrun, each task is a node's agent.
"""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path

from cpbench.launchers import torchrun
from cpbench.launchers.protocol import Command, Launcher, Place, python_of, shared_variables

HERE = Place()


def _srun(place: Place, tasks: int, per_node: int | None) -> tuple[str, ...]:
    """The step: as many tasks on as many nodes, all ended when one ends badly."""
    each = () if per_node is None else ("--ntasks-per-node", str(per_node))
    return (
        "srun", "--nodes", str(place.nodes), "--ntasks", str(tasks), *each,
        "--kill-on-bad-exit=1", "--export=ALL", "--input=none", *place.options,
    )  # fmt: skip


def direct(
    job: Path,
    world_size: int,
    place: Place = HERE,
    environ: Mapping[str, str] = os.environ,
    module: str = "cpbench.worker.main",
    teller: str = "slurm",
) -> list[Command]:
    """A task for each rank; they need not divide over the nodes.

    Args:
        teller: who tells ranks their numbers: ``"slurm"``, or ``"mpi"`` (give ``--mpi=pmi2`` or
            ``--mpi=pmix`` among the options).
    """
    even = None if world_size % place.nodes else world_size // place.nodes
    argv = (
        *_srun(place, world_size, even),
        *python_of(place), "-m", module, str(job),
    )  # fmt: skip
    env = {
        **shared_variables(place, environ),
        "CPBENCH_RANKS": teller,
        "CPBENCH_SIZE": str(world_size),
    }
    return [Command(argv, env, job.parent / "rank0.log", remote=True)]


def agents(
    job: Path,
    world_size: int,
    place: Place = HERE,
    environ: Mapping[str, str] = os.environ,
    module: str = "cpbench.worker.main",
) -> list[Command]:
    """A task for each node, its torchrun agent; ``place.address`` names host and port."""
    argv = (
        *_srun(place, place.nodes, 1),
        *torchrun.agent(job, world_size, place, place.address, module),
    )
    env = shared_variables(place, environ)
    return [Command(argv, env, job.parent / "rank0.log", remote=True)]


def failures(log: str, ranks: Mapping[int, int]) -> dict[int, int]:
    """Exit codes by task from srun's own words.  Once it ends the others they are told to be
    terminated, which says nothing; what else ended one by a signal was there before, even if it is
    told of later."""
    found: dict[int, int] = {}
    own = re.compile(
        r"srun: error: \S+: tasks? ([\d,-]+): (?:Exited with exit code (\d+)|(Killed|Aborted"
        r"|Segmentation fault|Bus error|Terminated|Out Of Memory)[^\n]*)"
    )
    ending = re.search(r"Terminating StepId|STEP \S+ ON \S+ CANCELLED", log)
    for match in own.finditer(log):
        tasks, code, words = match.groups()
        ended_by_srun = ending is not None and match.start() > ending.start()
        if ended_by_srun and words in (None, "Terminated"):
            continue
        for rank in _ranks(tasks):
            found.setdefault(rank, int(code) if code else -_SIGNALS[words])
    return found


_SIGNALS = {
    "Killed": signal.SIGKILL, "Aborted": signal.SIGABRT, "Segmentation fault": signal.SIGSEGV,
    "Bus error": signal.SIGBUS, "Terminated": signal.SIGTERM, "Out Of Memory": signal.SIGKILL,
}  # fmt: skip


def _ranks(text: str) -> list[int]:
    """``"0-2,5"`` as numbers."""
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


DIRECT = Launcher("srun", direct, failures, nodes=True)
TORCHRUN = Launcher("srun-torchrun", agents, torchrun.failures, nodes=True)
MPI = Launcher("srun-mpi", functools.partial(direct, teller="mpi"), failures, nodes=True)
