"""Worker processes under torchrun (torch.distributed.run), on one machine or several.

On several, each runs an agent that joins the rendezvous: the command of here starts the first
node's; the others come from ``cpbench join`` (by hand), or all of them from ``srun``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from cpbench.launchers.protocol import Command, Launcher, Place, python_of, shared_variables

HERE = Place()
JOIN_S = 300  # for all agents to have come
GATHERING = "gathering.json"  # beside the job file: what other nodes run to join


def agent(
    job: Path,
    world_size: int,
    place: Place,
    endpoint: str,
    module: str,
    local_address: str = "",
    host: bool | None = None,
) -> tuple[str, ...]:
    """The words of one node's agent.

    Args:
        host: whether the endpoint is this node's; torchrun's own guess, None, needs the name of the
            machine to resolve to that very address.
    """
    several = place.nodes > 1
    conf = f"join_timeout={JOIN_S}" + ("" if host is None else f",is_host={str(host).lower()}")
    return (
        *python_of(place), "-m", "torch.distributed.run",
        "--nnodes", str(place.nodes),
        "--nproc-per-node", str(place.per_node(world_size)),
        "--rdzv-backend", "c10d",
        "--rdzv-endpoint", endpoint,
        *(("--rdzv-id", job.parent.name) if several else ()),
        *(("--rdzv-conf", conf) if several else ()),
        *(("--local-addr", local_address) if local_address else ()),
        "-m", module, str(job),
    )  # fmt: skip


def commands(
    job: Path,
    world_size: int,
    place: Place = HERE,
    environ: Mapping[str, str] = os.environ,
    module: str = "cpbench.worker.main",
) -> list[Command]:
    """One torchrun for all ranks of this node.

    On one machine its rendezvous picks a port; on several, ``place.address`` names host and port.
    """
    endpoint = place.address if place.nodes > 1 else f"{place.address}:0"
    local = endpoint.rpartition(":")[0]
    argv = agent(job, world_size, place, endpoint, module, local, host=True)
    return [Command(argv, shared_variables(place, environ), job.parent / "rank0.log")]


def failures(log: str, ranks: Mapping[int, int]) -> dict[int, int]:
    """Exit codes by rank of the failures that torchrun reports at the end of its output."""
    report = log.rpartition("FAILED\n")[2]
    return {
        int(rank): int(code)
        for rank, code in re.findall(r"rank\s*: (\d+).*\n\s*exitcode\s*: (-?\d+)", report)
    }


LAUNCHER = Launcher("torchrun", commands, failures, nodes=True)
