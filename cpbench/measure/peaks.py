"""What a rank's device can do at best, for a roofline: a large matrix product, a large copy.

Measured by all ranks at once, as they work at once; the best of a few, in place of data sheets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpbench.measure.device import Device
    from cpbench.parallel.comm import Control

TRIES = 7
SIDE = {"cpu": 512, "cuda": 8192}  # of the matrices
COPIED = {"cpu": 64 << 20, "cuda": 512 << 20}  # bytes: more than caches hold


def measure(device: Device, control: Control, dtypes: Iterable[str]) -> dict[str, float]:
    """TFLOP/s of a rank by dtype, and ``copy_gb_s`` (10^9 bytes a second, read and written); of the
    slowest rank.  Collective over all ranks."""
    import torch

    def best_us(work: object) -> float:
        assert callable(work)
        work()
        control.barrier()
        return control.slowest(min(device.time_us(work) for _ in range(TRIES)))

    side, found = SIDE[device.type], {}
    for name in sorted(set(dtypes)):
        a, b, c = (torch.ones(side, side, dtype=getattr(torch, name), device=device.type)
                   for _ in range(3))  # fmt: skip
        us = best_us(lambda a=a, b=b, c=c: torch.mm(a, b, out=c))
        found[name] = 2 * side**3 / us / 1e6
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device.type)
    target = torch.empty_like(source)
    found["copy_gb_s"] = 2 * source.nbytes / best_us(lambda: target.copy_(source)) / 1e3
    return found
