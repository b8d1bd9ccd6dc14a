"""Processor time of timed work, and how long its threads waited for a core (Linux).

The scheduler keeps both per thread: ``/proc/self/task/*/schedstat`` has the nanoseconds on a core
and those spent ready on a run queue.  Threads of Gloo are counted apart: they move data while the
threads of the operator compute, and a rank has several.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

TASKS = Path("/proc/self/task")
TRANSPORT_THREADS = ("gloo_", "pt_gloo_")  # beginnings of their names
MIN_SHARE = 0.05  # of the time that a thread must run for its delay to count
MAX_DELAY = 0.05
MAX_THREADS_EXCESS = 1.1


class ProcessorUse(NamedTuple):
    """Seconds of one piece of work on one rank.

    Attributes:
        wall_s: from before it to after it, including the reading of the others.
        busy_s: processor time of all threads but Gloo's.
        delay_s: time that those threads were ready and waited for a core, summed over threads;
            None where the system does not tell.
        transport_s: processor time of Gloo's threads.
    """

    wall_s: float
    busy_s: float
    delay_s: float | None = None
    transport_s: float = 0.0


class ThreadTimes(NamedTuple):
    """Nanoseconds of one thread since it started."""

    on_core: int
    waiting: int
    is_transport: bool


class Reading(NamedTuple):
    """The counters at one moment; ``threads`` is empty where the system has none.

    Attributes:
        begun_s, ended_s: before and after the counters were read: a process may lose its core
            meanwhile, so the wall time between two readings is that which encloses the counters.
    """

    begun_s: float
    ended_s: float
    processor_s: float
    threads: dict[str, ThreadTimes]

    def since(self, before: Reading) -> ProcessorUse:
        """What was used between the readings.

        A thread's wait is only known when it ends: one that hardly ran afterwards may have begun to
        wait before, and computed nothing.
        """
        wall_s, busy_s = self.ended_s - before.begun_s, self.processor_s - before.processor_s
        if not self.threads:
            return ProcessorUse(wall_s, busy_s)
        delay_s = transport_s = 0.0
        for name, (on_core, waiting, is_transport) in self.threads.items():
            first = before.threads.get(name, ThreadTimes(0, 0, is_transport))
            ran_s = (on_core - first.on_core) / 1e9
            if is_transport:
                transport_s += ran_s
            elif ran_s > MIN_SHARE * wall_s:
                delay_s += min((waiting - first.waiting) / 1e9, wall_s)
        return ProcessorUse(wall_s, busy_s - transport_s, delay_s, transport_s)


def more_threads(uses: Sequence[ProcessorUse], threads: int) -> bool:
    """Whether more threads than allowed ran or waited for a core, on average over timed work."""
    wanted_s = sum(use.busy_s + (use.delay_s or 0.0) for use in uses)
    return wanted_s > MAX_THREADS_EXCESS * threads * sum(use.wall_s for use in uses)


def contended(uses: Sequence[ProcessorUse], threads: int) -> bool:
    """Whether threads waited for a core for more than 5 % of the timed work.  Delays up to the
    processor time of Gloo's threads may be due to these."""
    waited_s = sum((use.delay_s or 0.0) - use.transport_s for use in uses)
    return waited_s > MAX_DELAY * threads * sum(use.wall_s for use in uses)


class ProcessorMeter:
    """Reads the counters of this process.  Files stay open, so that a reading takes 20 us."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._is_transport: dict[str, bool] = {}

    @property
    def sees_delays(self) -> bool:
        """Whether the system keeps these counters."""
        return self._list_threads()

    def read(self) -> Reading:
        begun_s, threads = time.perf_counter(), {}
        for thread, file in list(self._files.items()) if self.sees_delays else ():
            try:
                time.clock_gettime(_clock_of(int(thread)))
                on_core, waiting, _ = map(int, os.pread(file, 64, 0).split())
            except OSError:  # it has ended
                os.close(self._files.pop(thread))
                continue
            is_transport = self._is_transport.get(thread, False)
            threads[thread] = ThreadTimes(on_core, waiting, is_transport)
        processor_s = time.process_time()
        return Reading(begun_s, time.perf_counter(), processor_s, threads)

    def _list_threads(self) -> bool:
        """Open the files of new threads, whose names are read the next time: a thread names itself
        once it runs.  False where there are none."""
        with suppress(OSError):
            for thread in os.listdir(TASKS):  # noqa: PTH208 -- Path.iterdir is slow
                if thread not in self._files:
                    self._is_transport.pop(thread, None)
                    self._files[thread] = os.open(TASKS / thread / "schedstat", os.O_RDONLY)
                elif thread not in self._is_transport:
                    name = (TASKS / thread / "comm").read_text("utf-8")
                    self._is_transport[thread] = name.startswith(TRANSPORT_THREADS)
        return bool(self._files)


def _clock_of(thread: int) -> int:
    """The processor clock of a thread.  Reading it brings the sums of the process up to date, which
    a thread on another core does at ticks only: every 1 to 10 ms.

    Source: ``make_thread_cpuclock`` of glibc.
    """
    return ~thread << 3 | 6
