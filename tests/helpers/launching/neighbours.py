"""Processes that use cores, as those of other users do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_BURSTS = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
busy_s, idle_s = float(sys.argv[2]), float(sys.argv[3])
print("ready", flush=True)
while True:
    end = time.thread_time() + busy_s
    while time.thread_time() < end:
        pass
    time.sleep(idle_s)
"""


@contextmanager
def neighbours(cores: Iterable[int], share: float, period_s: float = 0.02) -> Iterator[None]:
    """One process on each of the cores, which uses this share of it in bursts."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _BURSTS, str(core),
             str(share * period_s), str((1 - share) * period_s)],
            stdout=subprocess.PIPE,
        )
        for core in cores
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()
