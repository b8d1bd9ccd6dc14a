"""All launchers by name; a new one is a module with a ``LAUNCHER``, and a line here."""

from __future__ import annotations

from cpbench.launchers import local, mpi, srun, torchrun
from cpbench.launchers.protocol import Launcher

LAUNCHERS: dict[str, Launcher] = {
    launcher.name: launcher
    for launcher in (
        local.LAUNCHER,
        torchrun.LAUNCHER,
        mpi.LAUNCHER,
        srun.DIRECT,
        srun.TORCHRUN,
        srun.MPI,
    )
}
