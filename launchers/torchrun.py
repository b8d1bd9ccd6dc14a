"""Worker processes on this machine under torchrun (torch.distributed.run)."""

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
    """One torchrun for all ranks; arguments as for ``local``.  Its c10d rendezvous picks a port."""
    argv = (
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes", "1",
        "--nproc-per-node", str(world_size),
        "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0",
        "--local-addr", "127.0.0.1",
        "-m", module, str(job),
    )  # fmt: skip
    env = {
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", "1"),
        "GLOO_SOCKET_IFNAME": environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    return [Command(argv=argv, env=env, log=job.parent / "rank0.log")]
