"""How a GPU is timed, on a simulated one."""

from __future__ import annotations

import pytest
from simulated_gpu import SimulatedGpu

from cpbench.measure.device.cuda import Cuda
from cpbench.measure.device.protocol import HostTime
from cpbench.measure.timing import Timing


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    return SimulatedGpu(monkeypatch)


def test_small_kernels_are_queued_ahead(gpu: SimulatedGpu) -> None:
    """Ten kernels of 5 us that take 20 us each to launch: 50 us, not 200."""
    device = Cuda(0)

    def work() -> None:
        for _ in range(10):
            gpu.launch("kernel", 20.0, 5.0)

    first = device.time_us(work)
    assert first == pytest.approx(185.0 - 12.0, abs=20)  # one flush ahead is not enough
    assert device.last_host == HostTime(pytest.approx(200.0), True)
    for _ in range(3):
        assert device.time_us(work) == pytest.approx(50.0)
        assert device.last_host == HostTime(pytest.approx(200.0), False)
    assert gpu.log[-12:] == ["event", *["kernel"] * 10, "event"]


def test_work_that_waits_for_the_device_is_launch_bound(gpu: SimulatedGpu) -> None:
    device = Cuda(0)

    def work() -> None:
        for _ in range(10):
            gpu.launch("kernel", 20.0, 5.0)
            gpu.synchronize()  # such as .item()

    for _ in range(4):
        time_us = device.time_us(work)
    assert time_us > 200.0
    assert device.last_host is not None
    assert device.last_host.bound


def test_long_kernels_are_not_bound_by_a_slow_host(gpu: SimulatedGpu) -> None:
    device = Cuda(0)

    def work() -> None:
        gpu.launch("kernel", 3000.0, 50_000.0)

    device.time_us(work)
    assert device.last_host == HostTime(pytest.approx(3000.0), False)
    assert device.time_us(work) == pytest.approx(50_000.0)
    assert device.last_host == HostTime(pytest.approx(3000.0), False)


def test_a_host_slower_than_the_longest_wait(gpu: SimulatedGpu) -> None:
    """200 ms to launch what runs in 50 ms: the limit of what is queued ahead is 20 ms."""
    device = Cuda(0)

    def work() -> None:
        for _ in range(1000):
            gpu.launch("kernel", 200.0, 50.0)

    for _ in range(3):
        assert device.time_us(work) == pytest.approx(200_000.0, rel=0.15)
        assert device.last_host is not None
        assert device.last_host.bound
    assert gpu.log.count("flush") < 3 * 20_000 / 30


def test_ranks_meet_on_the_device_right_before_the_start(gpu: SimulatedGpu) -> None:
    device = Cuda(0)
    device.time_us(lambda: gpu.launch("kernel", 10.0, 10.0))
    gpu.log.clear()
    time_us = device.time_us(
        lambda: gpu.launch("kernel", 10.0, 10.0), meet=lambda: gpu.launch("meet", 10.0, 400.0)
    )
    assert time_us == pytest.approx(10.0)  # waiting for other ranks is not timed
    assert gpu.log == ["event", "flush", "event", "meet", "event", "kernel", "event"]


def test_most_iterations_decide_whether_a_case_is_launch_bound() -> None:
    free, bound = HostTime(10.0, False), HostTime(10.0, True)
    assert not Timing({}, {}, hosts={"fwd": [bound, free, free]}).launch_bound
    assert Timing({}, {}, hosts={"fwd": [free] * 3, "bwd": [bound, bound, free]}).launch_bound
    assert Timing({}, {}, hosts={"fwd": [bound, free]}).host_us == {"fwd": [10.0, 10.0]}
