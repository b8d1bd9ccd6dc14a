"""Operators that fail in the ways a worker can: ``faulty_operators.py:faulty:how=kill``.

They do not fail while CPBENCH_TEST_CALM is set, so that failed cases can be run again.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from cpbench.core.operator import QKV
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.reference import Plan, Reference
from cpbench.results.store import Journal

# Of torchrun and the local launcher, Open MPI, MPICH and srun; the first that is set counts.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


class Faulty(Reference):
    """The reference operator, which fails in the forward pass of one rank.

    Args:
        how: a key of ``FAULTS``, or ``"wrong"``.
        rank: the rank that fails.
    """

    def __init__(self, how: str, rank: int = 0) -> None:
        values = (os.environ.get(name) for name in RANK_VARIABLES)
        own_rank = next(int(value) for value in values if value is not None)
        fails = own_rank == rank and "CPBENCH_TEST_CALM" not in os.environ
        self.how = how if fails else "well"

    def forward(self, qkv: QKV, plan: Plan) -> Any:
        out, lse = super().forward(qkv, plan)
        if self.how == "wrong":
            return out * 1.01, lse
        FAULTS.get(self.how, lambda: None)()
        return out, lse


def _raise() -> NoReturn:
    raise RuntimeError("this is the root cause\nand more of it on a second line")


def _allocate() -> None:
    """Set the memory limit of the process a little above its current use, and exceed it."""
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.ones(1 << 30)


def _hang() -> None:
    while True:
        time.sleep(3600)


def _wait_for_the_gate() -> None:
    """Write ``at-gate`` in the folder of the job; wait for a file ``open`` in the run directory."""
    job = Path(sys.argv[1]).parent
    (job / "at-gate").touch()
    while not (job.parents[1] / "open").exists():
        time.sleep(0.05)


def _cut_connections() -> None:
    """Simulate a network failure: shut down every connection of this process."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def _fill_the_disk() -> None:
    """Fill the disk of the run directory, which contains the job file."""
    with open(Path(sys.argv[1]).parents[2] / "ballast", "ab", buffering=0) as ballast:
        for size in (4096, 1):
            try:
                while True:
                    ballast.write(bytes(size))
            except OSError:
                pass


def _die_once_recorded() -> None:
    """Finish the case, then die before the event ``done`` is written to the journal."""
    note = Journal.note

    def die_when_done(self: Journal, event: str, **details: Any) -> None:
        if event == "done":
            os.kill(os.getpid(), signal.SIGKILL)
        note(self, event, **details)

    Journal.note = die_when_done  # type: ignore[method-assign]


def _import_missing_module() -> Reference:
    if "CPBENCH_TEST_CALM" not in os.environ:
        import cpbench_no_such_module  # noqa: F401
    return Reference()


FAULTS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": _raise,
    "oom": _allocate,
    "hang": _hang,
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(0),
    "late": _die_once_recorded,
    "gate": _wait_for_the_gate,
    "cut": _cut_connections,
    "fill": _fill_the_disk,
}

faulty = OperatorInfo(
    name="faulty", summary="fails", source="tests", load=Faulty, params=("how", "rank")
)
missing = OperatorInfo(
    name="missing", summary="cannot be imported", source="tests", load=_import_missing_module
)
