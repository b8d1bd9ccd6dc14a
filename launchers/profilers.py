"""NVIDIA's profilers: commands of ranks wrapped in nsys or ncu.

On GPUs they profile only the traced passes, which are in an NVTX range
(``cpbench.measure.timeline``).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

from cpbench.launchers.protocol import Command
from cpbench.measure.timeline_slices import NVTX_RANGE

REPORT_TIMEOUT_S = 600.0  # for a profiler to write its report once the ranks have ended


def profiler_wrapper(name: str, device: str, ranks: int) -> Callable[[Command], Command]:
    """A function that wraps a command in a profiler, whose report is beside the command's log.

    Args:
        name: ``"nsys"`` or ``"ncu"``.

    Raises:
        ValueError: when the profiler is not installed, or cannot profile the case.
    """
    if name == "ncu" and device != "cuda":
        raise ValueError("--profiler ncu profiles CUDA kernels: it needs --device cuda")
    if name == "ncu" and ranks > 1:
        raise ValueError(
            "--profiler ncu serializes and replays the kernels of each rank, which deadlocks those "
            f"of NCCL: select a case of 1 rank, not {ranks}"
        )
    if shutil.which(name) is None:
        raise ValueError(f"--profiler {name}: {name} is not on PATH; it comes with CUDA")

    def wrap(command: Command) -> Command:
        report = command.log.resolve().with_suffix("")
        if name == "nsys":
            capture_range = (
                "--capture-range=nvtx",
                f"--nvtx-capture={NVTX_RANGE}",
                "--capture-range-end=none",
            )
            profiler: tuple[str, ...] = (
                "nsys", "profile", "--trace=cuda,nvtx,osrt", "--force-overwrite=true",
                *(capture_range if device == "cuda" else ()), f"--output={report}",
            )  # fmt: skip
        else:
            profiler = (
                "ncu", "--target-processes=all", "--nvtx", f"--nvtx-include={NVTX_RANGE}/",
                "--force-overwrite", f"--export={report}",
            )  # fmt: skip
        # The range is named by a plain string, not a registered one.
        env = {**command.env, "NSYS_NVTX_PROFILER_REGISTER_ONLY": "0"}
        return Command((*profiler, *command.argv), env, command.log, command.remote)

    return wrap
