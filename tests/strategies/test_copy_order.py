"""Order of copies between host and device on a GPU: streams and events are simulated, and nothing
may race (see ``tests/helpers/devices/simulated_streams.py``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated_nccl import MetaOperator
from simulated_streams import SimulatedCuda, StreamComm

from cpbench import masks
from cpbench.core.problem import Problem
from cpbench.core.registry import operator_info
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.host_memory.link import Copy, HostLink
from cpbench.parallel.layout import build
from cpbench.parallel.tracing.trace import empty_inputs
from cpbench.parallel.world import World
from cpbench.strategies.offload.single import OffloadedSingle

TOKENS = 23
FULL, WINDOW = "full", "sliding_window_causal:window=7"


def races(mask_text: str, chunk: int = 8, dtype: str = "bfloat16", batch: int = 2) -> list[str]:
    """Of a forward and a backward pass of ``single:offload=host``, and of reading the results."""
    problem = Problem(
        batch=batch, seq_q=TOKENS, seq_k=TOKENS, heads_q=4, heads_kv=2, head_dim=8, dtype=dtype
    )
    mask = masks.build(mask_text, TOKENS)
    world = World.of(problem, mask, build("contiguous", TOKENS, 1, mask))
    strategy = OffloadedSingle(chunk)
    op = BoundOperator(operator_info("bands"), MetaOperator(), "meta")  # type: ignore[arg-type]
    plan = strategy.prepare(op, world, 0)
    qkv, dout = empty_inputs(world)
    with SimulatedCuda((*qkv, dout)) as cuda:
        comm: Any = StreamComm(cuda)
        out, lse, saved = strategy.forward(qkv, plan, op, comm, need_lse=True)
        gradients = strategy.backward(dout, saved, plan, op, comm)
        for result in (out, lse, *gradients):
            assert result is not None
            result.sum()  # by the CPU
        for x in (*qkv, dout):
            x.zero_()
    return cuda.races


@pytest.mark.parametrize("mask", [FULL, WINDOW, "causal_document:doc_lens=[3,9,11]"])
@pytest.mark.parametrize("chunk", [4, 8, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # float32 sums are written as they are
def test_nothing_races(mask: str, chunk: int, dtype: str) -> None:
    assert not races(mask, chunk, dtype)


def test_a_copy_that_does_not_wait_for_the_current_stream(monkeypatch: Any) -> None:
    """It overwrites the chunk before the last while that is computed with."""
    init = SimulatedCuda.__init__

    def without_wait(cuda: Any, host: Any) -> None:
        init(cuda, host)
        monkeypatch.setattr(cuda.Stream, "wait_stream", lambda stream, other: None)

    monkeypatch.setattr(SimulatedCuda, "__init__", without_wait)
    assert races(FULL)


def test_a_copy_that_does_not_start_after_the_one_that_reads_its_buffer(monkeypatch: Any) -> None:
    copy = HostLink.copy
    monkeypatch.setattr(
        HostLink, "copy", lambda link, out, x, to_device, after=(): copy(link, out, x, to_device)
    )
    assert races(FULL)


def test_results_that_are_read_before_they_arrive(monkeypatch: Any) -> None:
    monkeypatch.setattr(HostLink, "finish", lambda link: None)
    assert races(FULL)


def test_a_missing_wait_for_a_chunk_is_found(monkeypatch: Any) -> None:
    """Of every third copy to the device in turn: the chunk is used before it is there.  Each is on
    a stream of its own here, since a wait for a later one of the same stream covers it."""
    copy, wait = HostLink.copy, Copy.wait
    to_device: list[Copy] = []
    skipped = -1

    def recorded(link: HostLink, out: Any, x: Any, inward: bool, after: Any = ()) -> Copy:
        link._streams.pop(True, None)
        handle = copy(link, out, x, inward, after)
        if inward:
            to_device.append(handle)
        return handle

    def wait_for_others(handle: Copy) -> None:
        if not (0 <= skipped < len(to_device) and handle is to_device[skipped]):
            wait(handle)

    monkeypatch.setattr(HostLink, "copy", recorded)
    monkeypatch.setattr(Copy, "wait", wait_for_others)
    assert not races(FULL, batch=1)
    count = len(to_device)
    assert count > 40
    for number in range(0, count, 3):
        to_device.clear()
        skipped = number
        assert races(FULL, batch=1), f"copy {number} of {count}"


def test_batches_are_copied_one_by_one() -> None:
    """Torch stages what is not contiguous in pageable memory."""
    copied = []

    class Recorded(torch.Tensor):
        def copy_(self, source: Any, non_blocking: bool = False) -> Any:
            copied.append((self.is_contiguous(), source.is_contiguous(), non_blocking))
            return self

    x = torch.zeros(3, 10, 2)
    with SimulatedCuda(()) as cuda:
        link = HostLink(cuda)
        link.copy(torch.zeros(3, 4, 2).as_subclass(Recorded), x[:, 2:6], True).wait()
    assert copied == [(True, True, True)] * 3
