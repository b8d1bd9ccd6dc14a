"""The CPU as a rank's device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from cpbench.core.environment import usable_cores
from cpbench.inputs.normal import initialise_vector_math
from cpbench.measure import memory
from cpbench.measure.device.protocol import HostTime
from cpbench.measure.processor_use import ProcessorMeter, ProcessorUse, contended, more_threads

# Threads of OpenMP may spin for a while after their work, for longer if others have their cores.
_SPIN_S, _WATCH_S = 0.005, 0.01
_LATE_SHARE = 0.3  # of processor time after a call
_CPU_FLUSH_BYTES = 64 << 20  # more than the last-level cache share of most cores


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
        busy_s, spinning_s = 0.0, (self.threads - 1) * _SPIN_S
        while True:
            before = self._meter.read()
            time.sleep(_WATCH_S)
            use = self._meter.read().since(before)
            busy_s += use.busy_s
            if use.busy_s <= _LATE_SHARE * use.wall_s:
                return False
            if busy_s > spinning_s:
                return True

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
        """The peak according to torch's profiler, whose events cover every allocation by torch.

        That of ``torch.profiler`` is built on this one, and imports torch's compiler, which takes a
        second.
        """
        from torch.autograd.profiler import profile

        with profile(profile_memory=True) as profiled:
            results = work()
        assert profiled.kineto_results is not None
        events = [e for e in profiled.kineto_results.events() if e.name() == "[memory]"]
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
