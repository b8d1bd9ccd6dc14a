"""Statistics, the stopping rule, FLOPs, peak memory and flags."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import numpy as np
import pytest
import torch

from cpbench import masks
from cpbench.core.problem import Case, Problem
from cpbench.core.settings import MeasureSettings
from cpbench.measure.device.cpu import Cpu
from cpbench.measure.device.opening import open_device
from cpbench.measure.timing import needs_more
from cpbench.results.record import Record, median_interval, relative_half_width, slowest_us


def test_the_confidence_interval_of_the_median_has_its_nominal_coverage() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        samples = sorted(rng.expovariate(1.0) for _ in range(25))
        interval = median_interval(samples)
        assert interval is not None
        low, high = interval
        covered += low <= 0.6931 <= high
    assert 0.94 < covered / 2000 < 0.99


def test_fewer_than_six_samples_have_no_interval() -> None:
    assert relative_half_width([1.0] * 5) is None
    assert relative_half_width([1.0] * 6) == 0.0


def test_the_slowest_rank_is_taken_in_each_phase_of_an_iteration() -> None:
    times = {"fwd": [[1.0, 5.0], [4.0, 1.0]], "bwd": [[10.0, 10.0], [1.0, 1.0]]}
    assert slowest_us(times, ("fwd", "bwd")) == [14.0, 15.0]
    assert slowest_us(times, ("fwd",)) == [4.0, 5.0]


def test_iterations_stop_by_precision_number_and_time() -> None:
    settings = MeasureSettings(min_iterations=8, max_iterations=20, max_seconds=5, precision=0.05)
    steady, noisy = [1.0] * 30, [1.0, 9.0] * 15
    assert needs_more(steady[:7], 0, settings)
    assert not needs_more(steady[:8], 0, settings)
    assert needs_more(noisy[:8], 0, settings)
    assert not needs_more(noisy[:20], 0, settings)
    assert not needs_more(noisy[:8], 6, settings)
    assert needs_more(noisy[:7], 6, settings)


def test_flops_follow_the_area() -> None:
    mask = masks.build("causal", 100)
    problem = Problem(
        batch=2, seq_q=100, seq_k=100, heads_q=8, heads_kv=2, head_dim=64, dtype="float32"
    )
    flops = problem.flops(mask.area)
    assert flops["fwd"] == 4 * 64 * 2 * 8 * 5050
    assert flops["bwd"] == 2.5 * flops["fwd"]
    record = Record(
        case=Case(world_size=4),
        status="ok",
        flops=flops,
        times_us={"fwd": [[2.0] * 7] * 4, "bwd": [[6.0] * 7] * 4},
    )
    assert record.median_us == 8.0
    assert record.tflops_per_rank == pytest.approx(sum(flops.values()) / 4 / 8e-6 / 1e12)


def test_peak_memory_is_of_simultaneous_allocations() -> None:
    device = Cpu(1, "wall")

    def work() -> torch.Tensor:
        a = torch.ones(1 << 18)  # 1 MiB
        b = a + 1  # 2 MiB
        del a
        c = b * 2  # 2 MiB again
        return c

    peak = device.peak_bytes(work)["peak"]
    assert 2 << 20 <= peak <= (2 << 20) + 4096


def test_wall_time_includes_waiting_and_cpu_time_does_not() -> None:
    """The CPU time of a sleep does not depend on its length, nor on the load of the machine."""
    wall_us, cpu_us = (Cpu(1, clock).time_us(lambda: time.sleep(0.3)) for clock in ("wall", "cpu"))
    assert wall_us >= 300e3
    assert cpu_us < 300e3


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown device 'tpu'; available: cpu, cuda"):
        open_device("tpu", 0, 1)


def test_records_survive_json() -> None:
    record = Record(
        case=Case(seq_len=77),
        status="ok",
        times_us={"fwd": [[1.0] * 7]},
        errors={"small": {"out": {"rel_l2": 1e-7, "max_rms": 1e-6}}},
    )
    restored = Record.from_json(record.to_json())
    assert restored == record
    assert restored.worst_error == 1e-7
    assert restored.median_us == statistics.median([1.0] * 7)


@pytest.mark.parametrize("value", [np.float64("nan"), -1.0, "fast", True])
def test_invalid_settings_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"measure\.precision"):
        MeasureSettings.from_table({"precision": value})


def test_missing_nvml_is_an_oserror() -> None:
    import ctypes.util

    from cpbench.measure.device.cuda import _NvmlSession

    if ctypes.util.find_library("nvidia-ml"):
        pytest.skip("NVML is available")
    with pytest.raises(OSError, match="NVML"), _NvmlSession(0):
        raise AssertionError("not reached")
