"""Peak rates of a rank's device for a roofline: a large matrix product and a large copy.

All ranks measure at the same time, since they share machines when they run; the best of several
repeats stands in for data-sheet figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpbench.measure.device.protocol import Device
    from cpbench.parallel.comm import Control

REPEATS = 7
COPY = "copy_gb_s"
MATRIX_SIZE = {"cpu": 512, "cuda": 8192}
COPY_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # larger than the caches


def measure_peaks(device: Device, control: Control, dtypes: Iterable[str]) -> dict[str, float]:
    """TFLOP/s per rank by dtype, always of float32 too, and ``copy_gb_s`` (10^9 bytes read and
    written per second); of the slowest rank.  Collective over all ranks."""
    import torch

    def best_us(work: object) -> float:
        assert callable(work)
        work()
        control.barrier()
        return control.max(min(device.time_us(work) for _ in range(REPEATS)))

    size, rates = MATRIX_SIZE[device.type], {}
    for name in sorted({*dtypes, "float32"}):
        # Normal data, as cases have: constants take less power, so that clocks are higher.
        a, b, c = (torch.randn(size, size, device=device.type).to(getattr(torch, name))
                   for _ in range(3))  # fmt: skip
        us = best_us(lambda a=a, b=b, c=c: torch.mm(a, b, out=c))
        rates[name] = 2 * size**3 / us / 1e6
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device.type)
    target = torch.empty_like(source)
    rates[COPY] = 2 * source.nbytes / best_us(lambda: target.copy_(source)) / 1e3
    return rates
