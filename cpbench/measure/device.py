"""What differs between CPUs and CUDA devices: clocks, synchronisation, memory, cache.

All CUDA calls of the harness are in :class:`Cuda`, against documented API of torch and NVML.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from cpbench.core.environment import usable_cores

if TYPE_CHECKING:
    import torch

_CPU_FLUSH_BYTES = 64 << 20  # above the last-level cache share of most cores


class Device(Protocol):
    """One rank's device."""

    type: str
    backend: str

    def time_us(self, work: Callable[[], Any]) -> float:
        """Microseconds that ``work`` takes on the device, from an idle start."""
        ...

    def pace_us(self) -> float | None:
        """Microseconds of a fixed piece of work: how fast the machine is at the moment.  None but
        for processor time, which a neighbour on the same core stretches too."""
        ...

    def flush_cache(self) -> None:
        """Evict what earlier iterations left in the last-level cache."""
        ...

    def peak_bytes(self, work: Callable[[], Any]) -> dict[str, int]:
        """Bytes that ``work`` holds at most beyond what was held before (``peak``), and where the
        device knows it the allocator's ``reserved`` and the whole ``device``'s use."""
        ...

    def describe(self) -> dict[str, Any]:
        """The device for the environment record."""
        ...

    def gpu(self) -> str | None:
        """What NVML calls the rank's GPU (its UUID); None for a processor."""
        ...

    def flags(self, ranks_here: int) -> list[str]:
        """Caveats of this moment: a contended processor, a throttled clock."""
        ...


class Cpu:
    """The processor; one rank has ``threads`` of its threads."""

    type = "cpu"
    backend = "gloo"

    def __init__(self, threads: int, clock: str = "wall") -> None:
        import torch

        torch.set_num_threads(threads)
        self.threads, self.clock = threads, clock
        self._canary = torch.ones(192, 192)
        self._flush: torch.Tensor | None = None
        self._wall = self._used = 0.0

    def time_us(self, work: Callable[[], Any]) -> float:
        used, start = time.process_time(), time.perf_counter()
        work()
        wall, used = time.perf_counter() - start, time.process_time() - used
        self._wall += wall
        self._used += used
        return (used if self.clock == "cpu" else wall) * 1e6

    def pace_us(self) -> float | None:
        if self.clock != "cpu":
            return None
        self._fixed_work()  # what ran before may have left caches cold and vector units asleep
        begun = time.process_time()
        self._fixed_work()
        return (time.process_time() - begun) * 1e6

    def _fixed_work(self) -> None:
        for _ in range(4):
            self._canary.mm(self._canary)

    def flush_cache(self) -> None:
        import torch

        if self._flush is None:
            self._flush = torch.zeros(_CPU_FLUSH_BYTES // 8, dtype=torch.int64)
        self._flush.add_(1)

    def peak_bytes(self, work: Callable[[], Any]) -> dict[str, int]:
        """From the profiler's allocation events, which see every allocation of torch."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            kept = work()
        assert seen.profiler is not None
        assert seen.profiler.kineto_results is not None
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        del kept
        now = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        return {"peak": peak}

    def describe(self) -> dict[str, Any]:
        return {"type": "cpu", "threads": self.threads}

    def gpu(self) -> str | None:
        return None

    def flags(self, ranks_here: int) -> list[str]:
        found = []
        if ranks_here * self.threads > usable_cores():
            found.append("oversubscribed")
        # Alone, one thread has nobody to wait for: its own work shows whether the core was shared.
        shared = self._wall / self._used if ranks_here == self.threads == 1 and self._used else 1.0
        self._wall = self._used = 0.0
        if max(shared, self._canary_ratio()) > 1.15:
            found.append("contended")
        return found

    def _canary_ratio(self) -> float:
        """Wall time over processor time of a fixed piece of work: 1 on a core of one's own."""
        ratios = []
        for _ in range(9):
            wall, used = time.perf_counter(), time.thread_time()
            self._fixed_work()
            wall, used = time.perf_counter() - wall, time.thread_time() - used
            ratios.append(wall / used if used else 1.0)
        return statistics.median(ratios)


class Cuda:
    """One CUDA device."""

    type = "cuda"
    backend = "cpu:gloo,cuda:nccl"

    def __init__(self, index: int) -> None:
        import torch

        torch.cuda.set_device(index)
        self.index = index
        size = 2 * torch.cuda.get_device_properties(index).L2_cache_size
        self._flush = torch.zeros(max(size, 1 << 20), dtype=torch.uint8, device="cuda")

    def time_us(self, work: Callable[[], Any]) -> float:
        import torch

        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    def pace_us(self) -> float | None:
        return None

    def flush_cache(self) -> None:
        self._flush.zero_()

    def peak_bytes(self, work: Callable[[], Any]) -> dict[str, int]:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the checks have cached is not the method's
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = work()
        torch.cuda.synchronize()
        del kept
        free, total = torch.cuda.mem_get_info()
        return {
            "peak": torch.cuda.max_memory_allocated() - before,
            "reserved": torch.cuda.max_memory_reserved(),
            "device": total - free,
        }

    def describe(self) -> dict[str, Any]:
        import torch

        properties = torch.cuda.get_device_properties(self.index)
        about = {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
        about["uuid"] = self.gpu()
        with suppress(OSError), _nvml(self.index) as (nvml, handle):
            about["driver"] = nvml.nvmlSystemGetDriverVersion()
            about["power_limit_mw"] = nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        return about

    def gpu(self) -> str | None:
        import torch

        return f"GPU-{torch.cuda.get_device_properties(self.index).uuid}"

    def flags(self, ranks_here: int) -> list[str]:
        with suppress(OSError), _nvml(self.index) as (nvml, handle):
            reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
            held_down = (
                nvml.nvmlClocksEventReasonSwThermalSlowdown
                | nvml.nvmlClocksThrottleReasonHwSlowdown
                | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
                | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
            )
            found = ["throttled"] if reasons & held_down else []
            if reasons & nvml.nvmlClocksThrottleReasonSwPowerCap:
                found.append("power-capped")
            others = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            return found + (["contended"] if len(others) > 1 else [])
        return ["nvml-missing"]


class _nvml:
    """NVML opened for one device, and closed again; what it cannot do is an ``OSError``."""

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


def shortage(kind: str, ranks_here: int) -> str | None:
    """Why this machine cannot give each of its ranks a device, or None.  All ranks agree."""
    if kind != "cuda":
        return None
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= ranks_here:
        return None
    return f"{ranks_here} CUDA devices are needed here, one for each rank; torch sees {found}"


def open_device(kind: str, local_rank: int, threads: int, clock: str = "wall") -> Device:
    """The device of a rank; :func:`shortage` says beforehand whether there are enough.

    Args:
        threads, clock: of a CPU, see ``cpbench.core.settings``.

    Raises:
        ValueError: for a kind that there is not.
    """
    if kind == "cuda":
        return Cuda(local_rank)
    if kind == "cpu":
        return Cpu(threads, clock)
    raise ValueError(f"no device {kind!r}; there are: cpu, cuda")
