"""Which device a rank gets, and what keeps it from having one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpbench.measure.device.protocol import Device


def device_shortage(kind: str, local_world_size: int) -> str | None:
    """Why this machine has too few devices for its ranks, or None; the same on all its ranks."""
    if kind != "cuda":
        return None
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    bound = available == 1 and len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    if bound or available >= local_world_size:
        return None
    return (
        f"this machine needs {local_world_size} CUDA devices, one per rank; torch sees {available}"
    )


def shared_gpu(gpus: Sequence[tuple[str, str | None]]) -> str | None:
    """Why ranks cannot run on the GPUs that they see: several have the same one; None otherwise.

    Args:
        gpus: host and UUID of each rank's; no UUID on CPUs.
    """
    (host, uuid), count = Counter(gpus).most_common(1)[0]
    if count == 1 or uuid is None:
        return None
    return (
        f"{count} ranks on {host} see only the same GPU, {uuid}: CUDA_VISIBLE_DEVICES must name "
        "all GPUs of a machine, or one for each of its ranks"
    )


def gpu_index(local_rank: int) -> int:
    """The index of a rank's GPU among those that it sees: its own number on the machine, or 0 where
    it sees a single one, which its launcher has bound to it (``gpu_bind`` of a site profile)."""
    import torch

    return 0 if torch.cuda.device_count() == 1 else local_rank


def open_device(kind: str, local_rank: int, threads: int, clock: str = "wall") -> Device:
    """Open the device of a rank; :func:`device_shortage` checks beforehand that there are enough.

    Args:
        threads, clock: for a CPU, see ``cpbench.core.settings``.

    Raises:
        ValueError: for an unknown kind of device.
    """
    if kind == "cuda":
        from cpbench.measure.device.cuda import Cuda

        return Cuda(gpu_index(local_rank))
    if kind == "cpu":
        from cpbench.measure.device.cpu import Cpu

        return Cpu(threads, clock)
    raise ValueError(f"unknown device {kind!r}; available: cpu, cuda")
