"""NVIDIA's profilers around the ranks of one case: what is put before their commands.

They look at the watched passes alone, which an NVTX range marks (``cpbench.timeline``).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from cpbench.launchers.protocol import Command

RANGE = "cpbench"  # the NVTX range
REPORTS = "profiles"  # in the run directory
PROFILERS = ("nsys", "ncu")


def wrapper(name: str, out: Path, device: str) -> Callable[[Command], Command]:
    """A command as it is run under a profiler, whose report goes to ``out / REPORTS``.

    Raises:
        ValueError: when the profiler is not there, or of no use on the device.
    """
    if name == "ncu" and device != "cuda":
        raise ValueError("--profiler ncu looks into CUDA kernels: it needs --device cuda")
    if shutil.which(name) is None:
        raise ValueError(f"--profiler {name}: there is no {name} on PATH; it comes with CUDA")
    folder = out.resolve() / REPORTS

    def wrapped(command: Command) -> Command:
        folder.mkdir(parents=True, exist_ok=True)
        report = folder / f"{command.log.parent.name}-{command.log.stem}"
        words: tuple[str, ...]
        if name == "nsys":
            words = (
                "nsys", "profile", "--trace=cuda,nvtx,osrt", "--force-overwrite=true",
                "--capture-range=nvtx", f"--nvtx-capture={RANGE}", "--capture-range-end=none",
                f"--output={report}",
            )  # fmt: skip
        else:
            words = (
                "ncu", "--target-processes=all", "--nvtx", f"--nvtx-include={RANGE}/",
                "--force-overwrite", f"--export={report}",
            )  # fmt: skip
        # Ranges are named by plain strings, not registered ones.
        env = {**command.env, "NSYS_NVTX_PROFILER_REGISTER_ONLY": "0"}
        return Command((*words, *command.argv), env, command.log, command.remote)

    return wrapped
