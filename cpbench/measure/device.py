"""CPU and CUDA devices: timing, synchronisation, peak memory, cache flushing, environment flags.

All CUDA calls of the measuring code are in :class:`Cuda`, through documented torch and NVML APIs.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from cpbench.core.environment import usable_cores
from cpbench.inputs.normal import initialise_vector_math
from cpbench.measure import memory
from cpbench.measure.processor_use import ProcessorMeter, ProcessorUse, contended, more_threads
from cpbench.parallel.process_group import stream_priority

_SPIN_S, _WATCH_S = 0.005, 0.01  # threads of OpenMP may spin for a while after their work
_LATE_SHARE = 0.3  # of processor time after a call, or of the time of the call itself
_CPU_FLUSH_BYTES = 64 << 20  # more than the last-level cache share of most cores
_AHEAD = 1.5  # work is queued so many times as long ahead as the host took for the last call
_MAX_AHEAD_US = 20_000.0
_HOST_SHARE = 1.1  # of the host's time, below which the device's is bound by it


class HostTime(NamedTuple):
    """How long the host took to queue a call.

    Attributes:
        us: microseconds.
        bound: whether the device had nothing to do for part of that time, and ended about when the
            host did: a faster host would have given another time.
    """

    us: float
    bound: bool


class Device(Protocol):
    """One rank's device.

    Attributes:
        last_use: of the last call of :meth:`time_us`; None where work runs on another processor.
        last_host: of that call: how long the host took to queue it; None where the host computes.
        warmup_s: seconds at load after which clocks are those of a long run.
    """

    type: str
    backend: str
    last_use: ProcessorUse | None
    last_host: HostTime | None
    warmup_s: float

    def time_us(self, work: Callable[[], Any], meet: Callable[[], None] | None = None) -> float:
        """Microseconds that ``work`` takes on the device, which is idle at the start.

        Args:
            meet: queues an operation in which the devices of all ranks wait for each other, so that
                they start together however late a host is; not timed.
        """
        ...

    def works_late(self) -> bool:
        """Whether the work of the last call of :meth:`time_us` went on after its end; to be asked
        right after it."""
        ...

    def pace_us(self) -> float | None:
        """Microseconds of a fixed reference computation, as a measure of the current machine speed.
        None unless times are CPU times, which other processes on the same core inflate too."""
        ...

    def flush_cache(self) -> None:
        """Evict the data of earlier iterations from the last-level cache."""
        ...

    def peak_bytes(self, work: Callable[[], Any]) -> dict[str, int]:
        """Peak bytes that ``work`` allocates beyond those allocated before (``peak``); on devices
        that report them, also the allocator's ``reserved`` bytes and the whole ``device``'s use."""
        ...

    def process_peak_bytes(self, work: Callable[[], Any]) -> dict[str, int]:
        """As :meth:`peak_bytes`, with what torch's allocator does not see (``process``); empty
        where the system does not tell."""
        ...

    def describe(self) -> dict[str, Any]:
        """Properties of the device for the environment record."""
        ...

    def gpu_uuid(self) -> str | None:
        """The UUID of the rank's GPU as NVML has it; None on a CPU."""
        ...

    def flags(self, local_world_size: int, uses: Sequence[ProcessorUse] | None = None) -> list[str]:
        """Record flags that apply now, such as ``throttled``, or to timed work (``contended``).

        Args:
            uses: of the timed work; a reference computation unless given.
        """
        ...


class Cpu:
    """The CPU, of which one rank uses ``threads`` threads."""

    type = "cpu"
    backend = "gloo"
    last_host: HostTime | None = None
    warmup_s = 0.0

    def __init__(self, threads: int, clock: str = "wall") -> None:
        import torch

        initialise_vector_math()
        torch.set_num_threads(threads)
        self.threads, self.clock = threads, clock
        self.last_use: ProcessorUse | None = None
        self._meter = ProcessorMeter()
        self._reference_matrix = torch.ones(192, 192)
        self._flush_buffer = torch.zeros(_CPU_FLUSH_BYTES // 8, dtype=torch.int64)

    def time_us(self, work: Callable[[], Any], meet: Callable[[], None] | None = None) -> float:
        before = self._meter.read()  # ranks meet in the barrier before: hosts compute
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        work()
        wall_s, cpu_s = time.perf_counter() - wall_start, time.process_time() - cpu_start
        self.last_use = self._meter.read().since(before)
        return (cpu_s if self.clock == "cpu" else wall_s) * 1e6

    def works_late(self) -> bool:
        time.sleep(_SPIN_S)
        before = self._meter.read()
        time.sleep(_WATCH_S)
        use = self._meter.read().since(before)
        return use.busy_s > _LATE_SHARE * use.wall_s

    def pace_us(self) -> float | None:
        if self.clock != "cpu":
            return None
        self._run_reference_work()  # warms up caches and vector units
        start = time.process_time()
        self._run_reference_work()
        return (time.process_time() - start) * 1e6

    def _run_reference_work(self) -> None:
        for _ in range(4):
            self._reference_matrix.mm(self._reference_matrix)

    def flush_cache(self) -> None:
        self._flush_buffer.add_(1)

    def peak_bytes(self, work: Callable[[], Any]) -> dict[str, int]:
        """The peak according to torch's profiler, whose events cover every allocation by torch."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            results = work()
        assert profiled.profiler is not None
        assert profiled.profiler.kineto_results is not None
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
        del results
        allocated = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            allocated += event.nbytes()
            peak = max(peak, allocated)
        return {"peak": peak}

    def process_peak_bytes(self, work: Callable[[], Any]) -> dict[str, int]:
        before = memory.resident_bytes() if memory.reset_resident_peak() else None
        results = work()
        after = memory.resident_bytes(peak=True)
        del results
        return {} if before is None or after is None else {"process": max(after - before, 0)}

    def describe(self) -> dict[str, Any]:
        return {"type": "cpu", "threads": self.threads}

    def gpu_uuid(self) -> str | None:
        return None

    def flags(self, local_world_size: int, uses: Sequence[ProcessorUse] | None = None) -> list[str]:
        judged_by_reference, uses = uses is None, uses or []
        flags: list[str] = []
        if more_threads(uses, self.threads) and (self._meter.sees_delays or local_world_size == 1):
            flags.append("more-threads")
        if local_world_size * self.threads > usable_cores():
            return [*flags, "oversubscribed"]  # and ranks wait for each other
        if judged_by_reference or not self._meter.sees_delays:
            # A single rank with one thread waits for nobody: its own times show a shared core.
            busy_s = sum(use.busy_s for use in uses) if local_world_size == self.threads == 1 else 0
            timed_ratio = sum(use.wall_s for use in uses) / busy_s if busy_s else 1.0
            disturbed = max(timed_ratio, self._reference_ratio()) > 1.15
        else:
            disturbed = contended(uses, self.threads)
        return [*flags, "contended"] if disturbed else flags

    def _reference_ratio(self) -> float:
        """Wall time over CPU time of the reference computation: 1 on an otherwise idle core."""
        ratios = []
        for _ in range(9):
            wall_start, cpu_start = time.perf_counter(), time.thread_time()
            self._run_reference_work()
            wall_s, cpu_s = time.perf_counter() - wall_start, time.thread_time() - cpu_start
            ratios.append(wall_s / cpu_s if cpu_s else 1.0)
        return statistics.median(ratios)


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
        first, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        first.record()
        flushes = self._flushes()
        for _ in range(flushes):
            self._flush_buffer.zero_()
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
        if meet is None:
            self._flush_us = float(first.elapsed_time(start)) * 1e3 / flushes
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
        return Cuda(gpu_index(local_rank))
    if kind == "cpu":
        return Cpu(threads, clock)
    raise ValueError(f"unknown device {kind!r}; available: cpu, cuda")
