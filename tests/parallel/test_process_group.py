"""Process groups of cpbench: streams on NCCL, and groups made again after they were destroyed."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from cpbench.parallel.comm_torch import TorchComm
from cpbench.parallel.process_group import (
    backend_options,
    create_group,
    is_alive,
    stream_priority,
)

TIMEOUT = timedelta(seconds=60)


def test_options_of_nccl_ask_for_streams_of_high_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in where torch is built without NCCL."""
    if not dist.is_nccl_available():
        nccl = SimpleNamespace(Options=SimpleNamespace)
        monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)
    options = backend_options("cpu:gloo,cuda:nccl", TIMEOUT)
    assert (options.is_high_priority_stream, options._timeout) == (True, TIMEOUT)
    assert backend_options("cpu:gloo", TIMEOUT) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_groups_of_nccl_have_streams_of_high_priority() -> None:
    backend = "cpu:gloo,cuda:nccl"
    options = backend_options(backend, TIMEOUT)
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT, pg_options=options
    )
    try:
        assert stream_priority() == "high"
        assert stream_priority(create_group(None, [0], "test")) == "high"
    finally:
        dist.destroy_process_group()


def _connected_twice(rank: int, size: int) -> list[Any]:
    """Sums in a sub-communicator, which is disconnected in between, and whether its groups live."""
    comm, results = TorchComm(), list[Any]()
    pair = (0, 2) if rank % 2 == 0 else (1, 3)
    groups = []
    for _ in range(2):
        comm.connect([(pair, "")])
        part = comm.sub(pair)
        groups.append(part.group)
        x = torch.tensor([float(rank)])
        part.all_reduce(x).wait()
        results.append(x.item())
        results.append([is_alive(group) for group in groups])
        comm.disconnect()
    return [*results, [is_alive(group) for group in groups], stream_priority()]


def test_a_part_is_connected_again_after_its_group_was_destroyed() -> None:
    ranks = run_ranks(4, _connected_twice)
    for rank, (first, one, again, two, after, priority) in enumerate(ranks):
        assert first == again == (2.0 if rank % 2 == 0 else 4.0)
        assert (one, two, after) == ([True], [False, True], [False, False])
        assert priority is None  # of Gloo
