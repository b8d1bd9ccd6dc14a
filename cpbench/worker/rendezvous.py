"""How the ranks of a gang learn who they are and meet: the first thing that each does.

CPBENCH_RANKS says who tells a rank its number: ``env`` (RANK, WORLD_SIZE and so on, as torchrun
sets them), ``slurm`` (what srun sets for each task) or ``mpi`` (mpi4py).  They meet through
the file CPBENCH_STORE where that is set, else at an address: MASTER_ADDR and MASTER_PORT, or one
that rank 0 opens and tells the others, by MPI or in the file ``meeting`` beside the job file.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

PATIENCE_S = 12 * 3600.0  # far above any timeout of a case: the parent ends what hangs
MEETING_S = 300.0  # for rank 0 to have opened an address


class Seat(NamedTuple):
    """A rank's place in its gang; ``local`` counts the ranks of this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def seat() -> Seat:
    """This process's.

    Raises:
        ValueError: when the environment does not say.
    """
    teller = os.environ.get("CPBENCH_RANKS", "env")
    if teller == "mpi":
        from mpi4py import MPI

        wanted = os.environ.get("CPBENCH_SIZE", "")
        if wanted and int(wanted) != MPI.COMM_WORLD.Get_size():
            raise ValueError(
                f"MPI counts {MPI.COMM_WORLD.Get_size()} ranks, not {wanted}: mpi4py has loaded "
                f"{MPI.get_vendor()[0]}, which is not whose mpiexec started this; set "
                "MPI4PY_LIBMPI to the right libmpi.so"
            )
        here = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        return Seat(
            MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), here.Get_rank(), here.Get_size()
        )
    try:
        if teller == "slurm":
            return slurm_seat(os.environ)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        return Seat(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    except KeyError as error:
        raise ValueError(
            f"{error.args[0]} is not set: a launcher starts this, see cpbench run"
        ) from None


def slurm_seat(environ: Any) -> Seat:
    """From the variables of a task of srun; SLURM_STEP_TASKS_PER_NODE is such as ``2(x3),1``."""
    each: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"]):
        each += [int(count)] * int(times or 1)
    return Seat(
        int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_LOCALID"]), each[int(environ["SLURM_NODEID"])],
    )  # fmt: skip


def meet(backend: str, here: Seat, job: Path) -> None:
    """Form the process group of all ranks (``torch.distributed``)."""
    import torch.distributed as dist

    patience = timedelta(seconds=PATIENCE_S)
    dist.init_process_group(
        backend, store=_store(here, job), rank=here.rank, world_size=here.size, timeout=patience
    )


def _store(here: Seat, job: Path) -> Store | None:
    import torch.distributed as dist

    path = os.environ.get("CPBENCH_STORE")
    if path:
        return dist.FileStore(path, here.size)  # type: ignore[attr-defined]
    teller = os.environ.get("CPBENCH_RANKS", "env")
    if teller == "env":
        return None  # MASTER_ADDR and MASTER_PORT
    address, opened = ("", 0), None
    if here.rank == 0:
        opened = dist.TCPStore(  # type: ignore[attr-defined]
            "0.0.0.0", 0, is_master=True, wait_for_workers=False
        )
        address = (own_address(os.environ.get("GLOO_SOCKET_IFNAME", "")), opened.port)
    if teller == "mpi":
        from mpi4py import MPI

        address = MPI.COMM_WORLD.bcast(address)
    else:
        address = _through_file(job.parent / "meeting", address)
    return opened or dist.TCPStore(*address, is_master=False)  # type: ignore[attr-defined]


def _through_file(path: Path, address: tuple[str, int]) -> tuple[str, int]:
    """Rank 0's address, on every rank: rank 0 writes it, the others wait for it."""
    if address[0]:
        hidden = path.with_name(f".{path.name}")
        hidden.write_text(f"{address[0]} {address[1]}\n")
        hidden.replace(path)
        return address
    deadline = time.monotonic() + MEETING_S
    while time.monotonic() < deadline:
        with suppress(OSError):
            list(path.parent.iterdir())  # makes network file systems look again
            host, port = path.read_text().split()
            return host, int(port)
        time.sleep(0.05)
    raise TimeoutError(f"rank 0 has not written {path} within {MEETING_S:.0f} s")


def own_address(interface: str) -> str:
    """An IPv4 address of this machine that others may reach: the interface's if one is named, else
    the one of the default route, else the loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in filter(None, interface.split(",")):
            with suppress(OSError):
                return interface_address(probe, name)
        with suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # nothing is sent: the system picks a route
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def interface_address(probe: socket.socket, name: str) -> str:
    """The IPv4 address of a network interface (SIOCGIFADDR)."""
    import fcntl

    request = struct.pack("256s", name.encode()[:15])
    return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24])
