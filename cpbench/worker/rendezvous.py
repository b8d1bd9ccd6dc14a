"""Rendezvous of the ranks of a gang: each finds its rank and joins the process group.

CPBENCH_RANKS names the source of ranks: ``env`` (RANK, WORLD_SIZE and so on, as torchrun sets
them), ``slurm`` (variables that srun sets per task) or ``mpi`` (mpi4py).  The process group uses
the file CPBENCH_STORE where that is set, else an address: MASTER_ADDR and MASTER_PORT, or one that
rank 0 opens and passes on by MPI or in the file ``meeting`` beside the job file.
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

GROUP_TIMEOUT_S = 12 * 3600.0  # far above any case's timeout: the parent ends gangs that hang
ADDRESS_TIMEOUT_S = 300.0  # for rank 0 to publish its address


class RankPlace(NamedTuple):
    """The position of a rank in its gang and on its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def rank_place() -> RankPlace:
    """The place of this process.

    Raises:
        ValueError: when the environment does not define it.
    """
    source = os.environ.get("CPBENCH_RANKS", "env")
    if source == "mpi":
        from mpi4py import MPI

        expected_size = os.environ.get("CPBENCH_SIZE", "")
        if expected_size and int(expected_size) != MPI.COMM_WORLD.Get_size():
            raise ValueError(
                f"MPI has {MPI.COMM_WORLD.Get_size()} ranks instead of {expected_size}: mpi4py "
                f"loaded {MPI.get_vendor()[0]}, but another MPI's mpiexec started this process; "
                "set MPI4PY_LIBMPI to the libmpi.so of that MPI"
            )
        node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        return RankPlace(
            MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), node.Get_rank(), node.Get_size()
        )
    try:
        if source == "slurm":
            return slurm_rank_place(os.environ)
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        return RankPlace(rank, world_size, local_rank, local_world_size)
    except KeyError as error:
        raise ValueError(
            f"{error.args[0]} is not set: start ranks by a launcher, see cpbench run"
        ) from None


def slurm_rank_place(environ: Any) -> RankPlace:
    """The place of a task of srun; SLURM_STEP_TASKS_PER_NODE has the form ``2(x3),1``."""
    tasks_per_node: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"]):
        tasks_per_node += [int(count)] * int(times or 1)
    return RankPlace(
        int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_LOCALID"]), tasks_per_node[int(environ["SLURM_NODEID"])],
    )  # fmt: skip


def join_process_group(backend: str, place: RankPlace, job: Path) -> None:
    """Initialise ``torch.distributed`` over all ranks.

    Args:
        job: path of the job file.
    """
    import torch.distributed as dist

    from cpbench.parallel.process_group import backend_options

    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group(
        backend, store=_open_store(place, job), rank=place.rank, world_size=place.world_size,
        timeout=timeout, pg_options=backend_options(backend, timeout),
    )  # fmt: skip


def _open_store(place: RankPlace, job: Path) -> Store | None:
    import torch.distributed as dist

    path = os.environ.get("CPBENCH_STORE")
    if path:
        return dist.FileStore(path, place.world_size)  # type: ignore[attr-defined]
    source = os.environ.get("CPBENCH_RANKS", "env")
    if source == "env":
        return None  # torch takes MASTER_ADDR and MASTER_PORT
    address, server = ("", 0), None
    if place.rank == 0:
        server = dist.TCPStore(  # type: ignore[attr-defined]
            "0.0.0.0", 0, is_master=True, wait_for_workers=False
        )
        address = (own_address(os.environ.get("GLOO_SOCKET_IFNAME", "")), server.port)
    if source == "mpi":
        from mpi4py import MPI

        address = MPI.COMM_WORLD.bcast(address)
    else:
        address = _share_address(job.parent / "meeting", address)
    return server or dist.TCPStore(*address, is_master=False)  # type: ignore[attr-defined]


def _share_address(path: Path, address: tuple[str, int]) -> tuple[str, int]:
    """Rank 0's address, on every rank: rank 0 writes it to a file, the others wait for that."""
    if address[0]:
        hidden = path.with_name(f".{path.name}")
        hidden.write_text(f"{address[0]} {address[1]}\n", "utf-8")
        hidden.replace(path)
        return address
    deadline = time.monotonic() + ADDRESS_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(OSError):
            list(path.parent.iterdir())  # makes network file systems refresh the directory
            host, port = path.read_text("utf-8").split()
            return host, int(port)
        time.sleep(0.05)
    raise TimeoutError(f"rank 0 did not write {path} within {ADDRESS_TIMEOUT_S:.0f} s")


def require_interface(interface: str) -> None:
    """Check the names of network interfaces of this machine, as for :func:`own_address`.

    Raises:
        ValueError: for one that does not exist or has no IPv4 address.
    """
    existing = [name for _, name in socket.if_nameindex()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in filter(None, interface.split(",")):
            if name not in existing:
                raise ValueError(
                    f"there is no network interface {name!r}; there are: {', '.join(existing)}"
                )
            try:
                interface_address(probe, name)
            except OSError:
                raise ValueError(f"network interface {name!r} has no IPv4 address") from None


def own_address(interface: str) -> str:
    """An IPv4 address of this machine for other machines to connect to: that of the interface if
    one is named, else of the default route, else the loopback address.

    Args:
        interface: a name, or comma-separated names of which the first with an address is used.
    """
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
