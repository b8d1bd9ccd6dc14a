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

    def since(self, before: ProcessorUse) -> ProcessorUse:
        """What has been used since another reading."""
        delay_s = None
        if self.delay_s is not None and before.delay_s is not None:
            delay_s = max(self.delay_s - before.delay_s, 0.0)  # threads may have ended
        return ProcessorUse(
            self.wall_s - before.wall_s,
            self.busy_s - before.busy_s,
            delay_s,
            self.transport_s - before.transport_s,
        )


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

    def read(self) -> ProcessorUse:
        """Sums since the process started; ``wall_s`` is a clock."""
        busy_s, delay_ns, transport_ns = time.process_time(), 0, 0
        if not self.sees_delays:
            return ProcessorUse(time.perf_counter(), busy_s)
        for thread, file in list(self._files.items()):
            try:
                on_core, waiting, _ = os.pread(file, 64, 0).split()
            except OSError:  # it has ended
                os.close(self._files.pop(thread))
                continue
            if self._is_transport.get(thread):
                transport_ns += int(on_core)
            else:
                delay_ns += int(waiting)
        transport_s = transport_ns / 1e9
        return ProcessorUse(time.perf_counter(), busy_s - transport_s, delay_ns / 1e9, transport_s)

    def _list_threads(self) -> bool:
        """Open the files of new threads, whose names are read the next time: a thread names itself
        once it runs.  False where there are none."""
        with suppress(OSError):
            for thread in os.listdir(TASKS):  # noqa: PTH208 -- Path.iterdir takes several times as long
                if thread not in self._files:
                    self._is_transport.pop(thread, None)
                    self._files[thread] = os.open(TASKS / thread / "schedstat", os.O_RDONLY)
                elif thread not in self._is_transport:
                    name = (TASKS / thread / "comm").read_text()
                    self._is_transport[thread] = name.startswith(TRANSPORT_THREADS)
        return bool(self._files)
