"""Launchers inside a Slurm allocation: ranks under srun directly, under torchrun, or over MPI.

Directly, each task is a rank, given by Slurm's variables, and the rendezvous is at an address that
rank 0 writes beside the job file.  Under torchrun, each task is the agent of a node.
"""

from __future__ import annotations

import functools
import re
import signal
from collections.abc import Mapping

from cpbench.launchers import torchrun
from cpbench.launchers.protocol import Command, GangSpec, Launcher, Place


def _srun(place: Place, tasks: int, tasks_per_node: int | None) -> tuple[str, ...]:
    """The srun command of a job step, in which the failure of one task ends all."""
    distribution = () if tasks_per_node is None else ("--ntasks-per-node", str(tasks_per_node))
    return (
        "srun", "--nodes", str(place.nodes), "--ntasks", str(tasks), *distribution,
        "--kill-on-bad-exit=1", "--export=ALL", "--input=none", *place.options,
    )  # fmt: skip


def direct(spec: GangSpec, rank_source: str = "slurm") -> list[Command]:
    """One task per rank; ranks need not divide evenly over the nodes.

    Args:
        rank_source: where a rank gets its number from: ``"slurm"``, or ``"mpi"`` (with
            ``--mpi=pmi2`` or ``--mpi=pmix`` among the options).
    """
    ranks, nodes = spec.world_size, spec.place.nodes
    tasks_per_node = None if ranks % nodes else ranks // nodes
    argv = (*_srun(spec.place, ranks, tasks_per_node), *spec.program)
    env = {**spec.env, "CPBENCH_RANKS": rank_source, "CPBENCH_SIZE": str(ranks)}
    return [Command(argv, env, spec.log, remote=True)]


def agents(spec: GangSpec) -> list[Command]:
    """One torchrun agent per node; ``place.address`` is host and port of the rendezvous."""
    place = spec.place
    agent = torchrun.agent_command(spec, place.address)
    return [Command((*_srun(place, place.nodes, 1), *agent), spec.env, spec.log, remote=True)]


def parse_exit_codes(log: str, ranks_by_pid: Mapping[int, int]) -> dict[int, int]:
    """Exit codes by task from the messages of srun.

    Once srun ends the step, it reports the other tasks as terminated or exited, which is ignored;
    other signals reported after that have ended their tasks before it.
    """
    codes: dict[int, int] = {}
    task_end = re.compile(
        r"srun: error: \S+: tasks? ([\d,-]+): (?:Exited with exit code (\d+)|(Killed|Aborted"
        r"|Segmentation fault|Bus error|Terminated|Out Of Memory)[^\n]*)"
    )
    step_end = re.search(r"Terminating StepId|STEP \S+ ON \S+ CANCELLED", log)
    for match in task_end.finditer(log):
        tasks, code, signal_text = match.groups()
        after_step_end = step_end is not None and match.start() > step_end.start()
        if after_step_end and signal_text in (None, "Terminated"):
            continue
        for rank in _parse_tasks(tasks):
            codes.setdefault(rank, int(code) if code else -_SIGNALS[signal_text])
    return codes


_SIGNALS = {
    "Killed": signal.SIGKILL, "Aborted": signal.SIGABRT, "Segmentation fault": signal.SIGSEGV,
    "Bus error": signal.SIGBUS, "Terminated": signal.SIGTERM, "Out Of Memory": signal.SIGKILL,
}  # fmt: skip


def _parse_tasks(text: str) -> list[int]:
    """``"0-2,5"`` as numbers."""
    tasks: list[int] = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        tasks += range(int(first), int(last or first) + 1)
    return tasks


DIRECT = Launcher("srun", direct, parse_exit_codes, multi_node=True)
TORCHRUN = Launcher("srun-torchrun", agents, torchrun.parse_exit_codes, multi_node=True)
MPI = Launcher(
    "srun-mpi", functools.partial(direct, rank_source="mpi"), parse_exit_codes, multi_node=True
)
