"""NVIDIA's profilers around the ranks of one case: what is put before their commands.

On GPUs they look at the watched passes alone, which an NVTX range marks
(``cpbench.measure.timeline``).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

from cpbench.launchers.protocol import Command
from cpbench.measure.timeline_slices import RANGE

REPORT_S = 600.0  # for a profiler to write its report when all is done


def wrapper(name: str, device: str, ranks: int) -> Callable[[Command], Command]:
    """A command as it is run under a profiler, whose report lies beside the command's log.

    Raises:
        ValueError: when the profiler is not there, or of no use for the case.
    """
    if name == "ncu" and device != "cuda":
        raise ValueError("--profiler ncu looks into CUDA kernels: it needs --device cuda")
    if name == "ncu" and ranks > 1:
        raise ValueError(
            "--profiler ncu runs the kernels of each rank one at a time and again, while those of "
            f"NCCL wait for each other: choose a case of 1 rank, not {ranks}"
        )
    if shutil.which(name) is None:
        raise ValueError(f"--profiler {name}: there is no {name} on PATH; it comes with CUDA")

    def wrapped(command: Command) -> Command:
        report = command.log.resolve().with_suffix("")
        if name == "nsys":
            watched = (
                "--capture-range=nvtx",
                f"--nvtx-capture={RANGE}",
                "--capture-range-end=none",
            )
            words: tuple[str, ...] = (
                "nsys", "profile", "--trace=cuda,nvtx,osrt", "--force-overwrite=true",
                *(watched if device == "cuda" else ()), f"--output={report}",
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
