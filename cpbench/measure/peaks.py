"""Peak rates of a rank's device, for a roofline and for the side work of strategies: a large matrix
product, a large copy, rows read and added by an index, and copies from and to pinned host memory.

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
COPY, GATHER, SCATTER, LAUNCH = "copy_gb_s", "gather_gb_s", "scatter_gb_s", "launch_us"
TO_DEVICE, TO_HOST, HOST_LATENCY = "to_device_gb_s", "to_host_gb_s", "host_copy_us"  # of GPUs only
NO_PRODUCTS = (COPY, GATHER, SCATTER, LAUNCH, TO_DEVICE, TO_HOST, HOST_LATENCY)
MATRIX_SIZE = {"cpu": 512, "cuda": 8192}
COPY_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # larger than the caches
ROW = 1024  # float32 elements of a row that an index names: a token of 8 heads of 128
LAUNCHES = 100


def measure_peaks(device: Device, control: Control, dtypes: Iterable[str]) -> dict[str, float]:
    """TFLOP/s per rank by dtype, always of float32 too; ``copy_gb_s`` (10^9 bytes read and written
    per second), ``gather_gb_s`` and ``scatter_gb_s`` (the same, of the rows that ``index_select``
    takes and that ``index_add_`` is given); ``launch_us``, the time of an operation on one element;
    of a GPU also ``to_device_gb_s`` and ``to_host_gb_s``, of copies from and to pinned host memory,
    and ``host_copy_us``, the time of a copy of one element.

    All are of the slowest rank.  Collective over all ranks.
    """
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
    source, target = source.view(-1, ROW), target.view(-1, ROW)
    index = torch.randperm(len(source), device=device.type)
    gather_us = best_us(lambda: torch.index_select(source, 0, index, out=target))
    rates[GATHER] = 2 * source.nbytes / gather_us / 1e3
    scatter_us = best_us(lambda: target.index_add_(0, index, source))
    rates[SCATTER] = 2 * source.nbytes / scatter_us / 1e3
    one = torch.zeros(1, device=device.type)

    def launch() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    rates[LAUNCH] = best_us(launch) / LAUNCHES
    if device.type != "cpu":
        host = torch.empty(source.shape, pin_memory=True)
        for name, pair in ((TO_DEVICE, (target, host)), (TO_HOST, (host, target))):
            us = best_us(lambda pair=pair: pair[0].copy_(pair[1], non_blocking=True))
            rates[name] = source.nbytes / us / 1e3
        rates[HOST_LATENCY] = best_us(lambda: one.copy_(host[0, :1], non_blocking=True))
    return rates
