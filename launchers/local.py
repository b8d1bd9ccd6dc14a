"""Launcher ``local``: one process per rank on this machine, with a rendezvous through a file."""

from __future__ import annotations

from cpbench.launchers.protocol import Command, GangSpec, Launcher


def commands(spec: GangSpec) -> list[Command]:
    """One command per rank; the logs and the rendezvous file are beside the job file."""
    environment = {
        **spec.env,
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_WORLD_SIZE": str(spec.world_size),
        "CPBENCH_STORE": str(spec.job.parent / "store"),
    }
    return [
        Command(
            argv=spec.program,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=spec.job.parent / f"rank{rank}.log",
        )
        for rank in range(spec.world_size)
    ]


LAUNCHER = Launcher("local", commands)
