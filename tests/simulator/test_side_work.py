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


VIEWS = [
    lambda x: x, lambda x: x[1:3], lambda x: x[:, ::2], lambda x: x[-3:, 1:9, 0:0], lambda x: x[0],
    lambda x: x[..., 1:], lambda x: x[:, None], lambda x: x.narrow(1, 2, 3),
    lambda x: x.narrow(-1, 1, 0), lambda x: x.narrow(0, -2, 1), lambda x: x.transpose(0, 2),
    lambda x: x.transpose(-1, 1)[:, :1], lambda x: x[:, :1].transpose(0, 1), lambda x: x[:1, :, :1],
    lambda x: x[:1].expand(4, -1, -1),
]  # fmt: skip
OPERATIONS = [
    lambda x: x, lambda x: x.contiguous(), lambda x: x.float(), lambda x: x.to(torch.bfloat16),
    lambda x: x.to(torch.float64).transpose(0, 1).contiguous(), lambda x: x.new_empty(3, 2),
    lambda x: x.new_empty(()), lambda x: x.new_empty([2, 0, 5], dtype=torch.int64),
    lambda x: x.add_(x.to(torch.bfloat16)), lambda x: x.copy_(x.float()), lambda x: x.add_(1.0),
    lambda x: x.copy_(x[:1]), lambda x: x.add_(x, alpha=2),
]  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_written_out_is_what_torch_does(view: Any, operation: Any) -> None:
    """Shape, strides, dtype and side work, of the same operation on ``meta``."""
    expected, recorded = Recorder(), Recorder()
    x = torch.empty(6, 7, 4, device="meta")
    with SideWorkMode(expected):
        result = operation(view(x))
    with recording_side_work(recorded):
        same = operation(view(strided(x)))
    assert same is strided(result)
    assert recorded.take() == expected.take()


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
