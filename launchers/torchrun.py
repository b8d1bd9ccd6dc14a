"""Launcher ``torchrun`` (torch.distributed.run), on one node or several.

On several, each node runs an agent that joins the rendezvous.  The command of this module starts
that of the first node; ``cpbench join`` starts the others, or ``srun`` starts all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from cpbench.core.subprocess_call import MODULE
from cpbench.launchers.protocol import Command, GangSpec, Launcher

JOIN_TIMEOUT_S = 300  # for all agents to join
RENDEZVOUS_FILE = "gathering.json"  # beside the job file: tells ``cpbench join`` how to join


def agent_command(
    spec: GangSpec, endpoint: str, local_address: str = "", host: bool | None = None
) -> tuple[str, ...]:
    """The command of one node's agent.

    Args:
        endpoint: host and port of the rendezvous.
        host: whether this node hosts the rendezvous; None lets torchrun find out, for which the
            name of the machine must resolve to exactly that address.
    """
    place = spec.place
    multi_node = place.nodes > 1
    conf = f"join_timeout={JOIN_TIMEOUT_S}"
    conf += "" if host is None else f",is_host={str(host).lower()}"
    return (
        *spec.python, *MODULE, "torch.distributed.run",
        "--nnodes", str(place.nodes),
        "--nproc-per-node", str(place.ranks_per_node(spec.world_size)),
        "--rdzv-backend", "c10d",
        "--rdzv-endpoint", endpoint,
        *(("--rdzv-id", spec.job.parent.name) if multi_node else ()),
        *(("--rdzv-conf", conf) if multi_node else ()),
        *(("--local-addr", local_address) if local_address else ()),
        "--no-python", *spec.program,
    )  # fmt: skip


def commands(spec: GangSpec) -> list[Command]:
    """One torchrun for all ranks of this node.

    On one machine the rendezvous picks a port; on several, ``place.address`` is its host and port.
    """
    address = spec.place.address
    endpoint = address if spec.place.nodes > 1 else f"{address}:0"
    local = endpoint.rpartition(":")[0]
    argv = agent_command(spec, endpoint, local, host=True)
    return [Command(argv, spec.env, spec.log)]


def parse_exit_codes(log: str, ranks_by_pid: Mapping[int, int]) -> dict[int, int]:
    """Exit codes by rank from the failures that torchrun reports at the end of its output."""
    report = log.rpartition("FAILED\n")[2]
    return {
        int(rank): int(code)
        for rank, code in re.findall(r"rank\s*: (\d+).*\n\s*exitcode\s*: (-?\d+)", report)
    }


LAUNCHER = Launcher("torchrun", commands, parse_exit_codes, multi_node=True)
