"""Tensors without data whose operations are remembered: arguments of equal value but another type,
real tensors beside them, and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from cpbench.parallel.tracing.shape_tensor import without_data
from cpbench.simulator.events import Recorder, SideWork
from cpbench.simulator.side_work.launches import SideWorkMode
from cpbench.simulator.side_work.strided_tensor import recording_side_work, strided

INDICES = [
    (slice(0, 2, 1), 0), ([0, 2, 1], 0), (1, slice(None)), (slice(2, 4), 1), ([2, 4], 1), (1, 0),
]  # fmt: skip


@pytest.mark.parametrize("kind", [strided, without_data])
def test_equal_arguments_of_other_types_are_others(kind: Any) -> None:
    real = torch.empty(8, 5, 4)
    x = kind(torch.empty(8, 5, 4, device="meta"))
    for index in (*INDICES, *reversed(INDICES)):
        assert x[index].shape == real[index].shape, index
    assert (x * 2).dtype == (x * 2.0).dtype == torch.float32
    whole = kind(torch.empty(3, dtype=torch.int64, device="meta"))
    for number in (2, 2.0, True, 2.0, 2):
        assert (whole * number).dtype == (torch.ones(3, dtype=torch.int64) * number).dtype


def test_shapes_are_not_changed_in_place() -> None:
    x = without_data(torch.empty(2, 1, 3, device="meta"))
    assert x.nan_to_num_(0.0) is x
    with pytest.raises(TypeError, match="squeeze_ changes the shape"):
        x.squeeze_(1)


def test_real_tensors_are_changed_in_place() -> None:
    recorder = Recorder()
    with SideWorkMode(recorder):
        real = torch.empty(3).fill_(2.0).add_(1.0)
    assert real.tolist() == [3.0] * 3


def test_outside_of_a_recording_nothing_is_recorded() -> None:
    x = strided(torch.empty(3, device="meta"))
    assert (x + x).shape == (3,)


def test_threads_record_their_own_work() -> None:
    def work(count: int) -> SideWork:
        recorder = Recorder()
        x = strided(torch.empty(1000, device="meta"))
        with recording_side_work(recorder):
            for _ in range(200):
                x = x[:count] + 1
        (work,) = recorder.take()
        return work

    with ThreadPoolExecutor(4) as pool:
        counts = [10, 20, 30, 40] * 4
        for count, one in zip(counts, pool.map(work, counts), strict=True):
            assert one == SideWork(stream=200 * 2 * 4 * count, launches=200)
