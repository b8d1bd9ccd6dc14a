"""Worker processes on this machine, one per rank, meeting through a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from cpbench.launchers.protocol import Command, Launcher, Place, shared_variables

HERE = Place()


def commands(
    job: Path,
    world_size: int,
    place: Place = HERE,
    environ: Mapping[str, str] = os.environ,
    module: str = "cpbench.worker.main",
) -> list[Command]:
    """One command per rank; logs and the meeting point are put beside the job file."""
    shared = {
        **shared_variables(place, environ),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "CPBENCH_STORE": str(job.parent / "store"),
    }
    return [
        Command(
            argv=(sys.executable, "-m", module, str(job)),
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=job.parent / f"rank{rank}.log",
        )
        for rank in range(world_size)
    ]


LAUNCHER = Launcher("local", commands)
