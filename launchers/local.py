"""Worker processes on this machine, one per rank, meeting through a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from cpbench.launchers.gang import Command


def commands(
    job: Path,
    world_size: int,
    environ: Mapping[str, str] = os.environ,
    module: str = "cpbench.worker",
) -> list[Command]:
    """One command per rank.

    Args:
        job: the job file; logs and the meeting point are put beside it.
        world_size: ranks.
        environ: what the user has set, which is not overridden.
        module: what each rank runs.
    """
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "CPBENCH_STORE": str(job.parent / "store"),
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", "1"),
        # Host names of containers often do not resolve, and Gloo would ask.
        "GLOO_SOCKET_IFNAME": environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    return [
        Command(
            argv=(sys.executable, "-m", module, str(job)),
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=job.parent / f"rank{rank}.log",
        )
        for rank in range(world_size)
    ]
