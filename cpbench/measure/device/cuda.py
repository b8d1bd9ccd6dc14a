"""A GPU as a rank's device, through documented APIs of torch and NVML."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from cpbench.measure.device.protocol import HostTime
from cpbench.measure.processor_use import ProcessorUse
from cpbench.parallel.process_group import stream_priority

_LATE_SHARE = 0.3  # of the time of a call, that may pass after it
_AHEAD = 1.5  # work is queued so many times as long ahead as the host took for the last call
_MAX_AHEAD_US = 20_000.0
_HOST_SHARE = 1.1  # of the host's time, below which the device's is bound by it


class Cuda:
    """One CUDA device.

    Work is queued while the device still evicts its cache, so that it runs back to back however
    slowly Python launches it; where it does not, the host's time is what was measured.
    """

    type = "cuda"
    backend = "cpu:gloo,cuda:nccl"
    last_use: ProcessorUse | None = None
    last_host: HostTime | None = None
    warmup_s = 1.0

    def __init__(self, index: int) -> None:
        import torch

        torch.cuda.set_device(index)
        self.index, self._late = index, False
        self._flush_us = 0.0
        flush_bytes = 2 * torch.cuda.get_device_properties(index).L2_cache_size
        self._flush_buffer = torch.zeros(
            max(flush_bytes, 1 << 20), dtype=torch.uint8, device="cuda"
        )

    def time_us(self, work: Callable[[], Any], meet: Callable[[], None] | None = None) -> float:
        import torch

        torch.cuda.synchronize()
        first, flushed, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(4))
        first.record()
        flushes = self._flushes()
        for _ in range(flushes):
            self._flush_buffer.zero_()
        flushed.record()
        if meet is not None:
            meet()
        start.record()
        queueing = time.perf_counter()
        work()
        host_us = (time.perf_counter() - queueing) * 1e6
        started_first = start.query()  # before the last of it was queued
        end.record()
        end.synchronize()
        ended = time.perf_counter()
        torch.cuda.synchronize()  # other streams
        elapsed_us = float(start.elapsed_time(end)) * 1e3
        self._flush_us = float(first.elapsed_time(flushed)) * 1e3 / flushes
        self._late = (time.perf_counter() - ended) * 1e6 > _LATE_SHARE * elapsed_us + 100
        self.last_host = HostTime(host_us, started_first and elapsed_us < _HOST_SHARE * host_us)
        return elapsed_us

    def _flushes(self) -> int:
        """How often to evict the cache before a call, so that it takes longer than the host took to
        queue the last call, within bounds."""
        if self.last_host is None or not self._flush_us:
            return 1
        ahead_us = min(_AHEAD * self.last_host.us, _MAX_AHEAD_US)
        return max(1, math.ceil(ahead_us / self._flush_us))

    def works_late(self) -> bool:
        return self._late

    def pace_us(self) -> float | None:
        return None

    def flush_cache(self) -> None:
        """Nothing: :meth:`time_us` does it, to queue work meanwhile."""

    def peak_bytes(self, work: Callable[[], Any]) -> dict[str, int]:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # drop what the checks left in the allocator's cache
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = work()
        torch.cuda.synchronize()
        del results
        free, total = torch.cuda.mem_get_info()
        return {
            "peak": torch.cuda.max_memory_allocated() - before,
            "reserved": torch.cuda.max_memory_reserved(),
            "device": total - free,
        }

    def process_peak_bytes(self, work: Callable[[], Any]) -> dict[str, int]:
        """Torch's peak and what the device lost meanwhile to others than torch's allocator."""
        import torch

        def taken_elsewhere() -> int:
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            return total - free - torch.cuda.memory_reserved()

        before, elsewhere = torch.cuda.memory_allocated(), taken_elsewhere()
        torch.cuda.reset_peak_memory_stats()
        results = work()
        elsewhere = max(taken_elsewhere() - elsewhere, 0)
        del results
        return {"process": torch.cuda.max_memory_allocated() - before + elsewhere}

    def describe(self) -> dict[str, Any]:
        import torch

        properties = torch.cuda.get_device_properties(self.index)
        facts = {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "uuid": self.gpu_uuid(),
        }
        if (priority := stream_priority()) is not None:
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
            facts["nccl_streams"] = priority
        with suppress(OSError), _NvmlSession(self.index) as (nvml, handle):
            facts["driver"] = nvml.nvmlSystemGetDriverVersion()
            facts["power_limit_mw"] = nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        return facts

    def gpu_uuid(self) -> str | None:
        import torch

        return f"GPU-{torch.cuda.get_device_properties(self.index).uuid}"

    def flags(self, local_world_size: int, uses: Sequence[ProcessorUse] | None = None) -> list[str]:
        with suppress(OSError), _NvmlSession(self.index) as (nvml, handle):
            reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
            slowdown = (
                nvml.nvmlClocksEventReasonSwThermalSlowdown
                | nvml.nvmlClocksThrottleReasonHwSlowdown
                | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
                | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
            )
            flags = ["throttled"] if reasons & slowdown else []
            if reasons & nvml.nvmlClocksThrottleReasonSwPowerCap:
                flags.append("power-capped")
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            return flags + (["contended"] if len(processes) > 1 else [])
        return ["nvml-missing"]


class _NvmlSession:
    """A context manager that opens NVML for one device; NVML errors become ``OSError``."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __enter__(self) -> tuple[Any, Any]:
        import pynvml
        import torch

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(self._index).uuid}"
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._nvml.nvmlShutdown()
        if isinstance(error, self._nvml.NVMLError):
            raise OSError(f"NVML: {error}") from error
