"""Statistics, stopping, and what is timed and weighed."""

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
from cpbench.measure.device import Cpu, open_device
from cpbench.measure.timing import _go_on
from cpbench.results.record import Record, median_interval, relative_half_width, slowest_us


def test_the_interval_of_the_median_covers_it_as_often_as_it_says() -> None:
    chance = random.Random(0)
    covered = 0
    for _ in range(2000):
        samples = sorted(chance.expovariate(1.0) for _ in range(25))
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


def test_stopping_has_a_floor_a_ceiling_and_a_budget() -> None:
    settings = MeasureSettings(min_iterations=8, max_iterations=20, max_seconds=5, precision=0.05)
    steady, noisy = [1.0] * 30, [1.0, 9.0] * 15
    assert _go_on(steady[:7], 0, settings)
    assert not _go_on(steady[:8], 0, settings)
    assert _go_on(noisy[:8], 0, settings)
    assert not _go_on(noisy[:20], 0, settings)
    assert not _go_on(noisy[:8], 6, settings)
    assert _go_on(noisy[:7], 6, settings)


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


def test_peak_memory_counts_what_is_held_at_once() -> None:
    device = Cpu(1, "wall")

    def work() -> torch.Tensor:
        a = torch.ones(1 << 18)  # 1 MiB
        b = a + 1  # 2 MiB held
        del a
        c = b * 2  # still 2 MiB
        return c

    peak = device.peak_bytes(work)["peak"]
    assert 2 << 20 <= peak <= (2 << 20) + 4096


def test_processor_time_shared_with_others_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Cpu(1, "wall")
    monkeypatch.setattr(device, "_canary_ratio", lambda: 1.0)
    device.time_us(lambda: time.sleep(0.05))  # waits as if descheduled
    assert device.flags(1) == ["contended"]
    assert device.flags(1) == []  # each reading starts anew


def test_more_threads_than_cores_are_flagged() -> None:
    assert "oversubscribed" in Cpu(1, "wall").flags(4096)


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ValueError, match="no device 'tpu'; there are: cpu, cuda"):
        open_device("tpu", 0, 1)


def test_records_survive_json() -> None:
    record = Record(
        case=Case(seq_len=77),
        status="ok",
        times_us={"fwd": [[1.0] * 7]},
        errors={"small": {"out": {"rel_l2": 1e-7, "max_rms": 1e-6}}},
    )
    again = Record.from_json(record.to_json())
    assert again == record
    assert again.worst_error == 1e-7
    assert again.median_us == statistics.median([1.0] * 7)


@pytest.mark.parametrize("value", [np.float64("nan"), -1.0, "fast", True])
def test_settings_name_what_is_wrong(value: Any) -> None:
    with pytest.raises(ValueError, match=r"measure\.precision"):
        MeasureSettings.from_table({"precision": value})


def test_nvml_that_is_not_there_is_an_oserror_and_nothing_else_is_hidden() -> None:
    import ctypes.util

    from cpbench.measure.device import _nvml

    if ctypes.util.find_library("nvidia-ml"):
        pytest.skip("NVML is here")
    with pytest.raises(OSError, match="NVML"), _nvml(0):
        raise AssertionError("not reached")
