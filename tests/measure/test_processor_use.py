"""Threads that run and wait: real neighbours on a core, and what follows from figures."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from neighbours import neighbours

from cpbench.measure import processor_use
from cpbench.measure.device.cpu import Cpu
from cpbench.measure.processor_use import (
    ProcessorMeter,
    ProcessorUse,
    Reading,
    ThreadTimes,
    contended,
    more_threads,
)


@pytest.fixture
def core() -> Iterator[int]:
    """The core on which this thread then runs, and those that it starts."""
    before = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(before)})
    yield min(before)
    os.sched_setaffinity(0, before)
    torch.set_num_threads(threads)


def compute(seconds: float = 0.3) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize("share", [0.37, 1.0])
def test_a_neighbour_on_the_core_is_flagged(core: int, share: float) -> None:
    device = Cpu(1)
    with neighbours([core], share):
        device.time_us(compute)
    assert device.last_use is not None
    assert device.flags(1, [device.last_use]) == ["contended"]


def test_waiting_for_anything_else_is_no_contention() -> None:
    meter = ProcessorMeter()
    before = meter.read()
    time.sleep(0.3)
    use = meter.read().since(before)
    assert use.wall_s >= 0.3
    assert use.delay_s is not None
    assert use.busy_s + use.delay_s < 0.2


def test_threads_that_run_or_wait_are_counted_together(core: int) -> None:
    """On one core, where two threads take turns, as on two."""
    meter, done, measured = ProcessorMeter(), threading.Barrier(3), threading.Event()

    def work() -> None:
        x = torch.ones(700, 700)
        for _ in range(5):
            torch.mm(x, x)  # without the interpreter's lock
        done.wait()
        measured.wait()

    before = meter.read()
    threads = [threading.Thread(target=work) for _ in "ab"]
    for thread in threads:
        thread.start()
    done.wait()
    use = meter.read().since(before)
    measured.set()
    for thread in threads:
        thread.join()
    assert more_threads([use], 1)
    assert not more_threads([use], 3)


def test_figures_of_quiet_and_disturbed_runs() -> None:
    """As measured with two ranks on two cores, 8 MB a message: alone, and beside a process that
    used 37 % of a core."""
    quiet = ProcessorUse(wall_s=1.0, busy_s=0.85, delay_s=0.08, transport_s=0.12)
    disturbed = quiet._replace(busy_s=0.77, delay_s=0.23)
    assert not contended([quiet], 1)
    assert contended([disturbed], 1)
    assert not more_threads([quiet, disturbed], 1)
    assert more_threads([quiet._replace(busy_s=1.1)], 1)


def test_ranks_that_share_cores_are_oversubscribed_only() -> None:
    use = ProcessorUse(wall_s=1.0, busy_s=0.3, delay_s=0.7)
    assert Cpu(1).flags(4096, [use]) == ["oversubscribed"]


def test_without_the_counters_wall_and_cpu_time_are_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processor_use, "TASKS", tmp_path / "none")
    device = Cpu(1)
    monkeypatch.setattr(device, "_reference_ratio", lambda: 1.0)
    device.time_us(lambda: time.sleep(0.05))  # waits as if descheduled
    assert device.last_use is not None
    assert device.last_use.delay_s is None
    assert device.flags(1, [device.last_use]) == ["contended"]
    assert device.flags(1, []) == []  # nothing has been timed


def test_a_reading_takes_little() -> None:
    """As processor time, which does not depend on the load of the machine: 20 us when idle."""
    meter = ProcessorMeter()
    meter.read()
    start = time.thread_time()
    for _ in range(200):
        meter.read()
    assert (time.thread_time() - start) / 200 < 1e-3


def test_a_core_lost_while_counters_are_read_is_no_second_thread() -> None:
    """Four milliseconds of waiting between the counters and the clock, around 0.1 ms of work."""
    before = Reading(0.0, 0.004, 1.0, {"7": ThreadTimes(0, 0, False)})
    after = Reading(0.0041, 0.0042, 1.0003, {"7": ThreadTimes(300_000, 4_000_000, False)})
    use = after.since(before)
    assert use.delay_s == pytest.approx(0.004)
    assert not more_threads([use], 1)
    two_threads = {str(i): ThreadTimes(4_000_000, 0, False) for i in range(2)}
    busy = Reading(0.004, 0.0041, 1.008, two_threads).since(Reading(0.0, 0.0, 1.0, {}))
    assert more_threads([busy], 1)
