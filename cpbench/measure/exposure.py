"""Exposed communication of a strategy.

Three variants are timed in alternation, so that drift affects all of them: the whole run; the run
without communication (the strategy computes as usual, on buffers that hold normal numbers); and
communication alone (it sends as usual while the operator computes nothing).  Exposed communication
is the time of the whole run minus that without communication; hidden, the share of communication
alone that does not add to the whole run.  Waiting for ranks with more work does not count as
communication: in all three variants the time of a phase is the slowest rank's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpbench.measure.timing import Timing, Workload, iterate
from cpbench.parallel.comm import CompletedHandle, GroupedComm
from cpbench.parallel.host_memory.link import contiguous_pairs
from cpbench.parallel.tracing.traced_operator import TracedOperator

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.core.settings import MeasureSettings
    from cpbench.measure.device.protocol import Device
    from cpbench.parallel.comm import Comm, Control, Handle, Messages

ROUNDS = 7
FILL_ELEMENTS = 1 << 20  # normal numbers that are repeated
Times = dict[str, list[float]]  # microseconds by phase and round


class NullComm(GroupedComm):
    """A :class:`~cpbench.parallel.comm.Comm` that transfers nothing.  Receive buffers are filled
    with normal numbers: unwritten memory may be read, or computed with, at another speed, and
    constants take less power than data."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._normal: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def exchange(self, sends: Messages, recvs: Messages, what: str = "") -> Handle:
        for tensor, _ in recvs:
            self._fill(tensor)
        return CompletedHandle()

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        self._fill(out)
        return CompletedHandle()

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        self._fill(out)
        return CompletedHandle()

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        self._fill(out)
        return CompletedHandle()

    def _copy(
        self, out: torch.Tensor, x: torch.Tensor, to_device: bool, after: Sequence[Any] = ()
    ) -> Handle:
        for part, _ in contiguous_pairs(out, x) if to_device else ():
            self._fill(part)
        return CompletedHandle()

    def _fill(self, tensor: torch.Tensor) -> None:
        """Copy normal numbers, which are made once, over a contiguous tensor."""
        import torch

        key = (tensor.dtype, tensor.device)
        normal = self._root._normal.get(key)
        if normal is None:
            numbers = torch.randn(FILL_ELEMENTS, device=tensor.device)
            normal = self._root._normal[key] = numbers.to(tensor.dtype)
        for part in tensor.flatten().split(FILL_ELEMENTS):
            part.copy_(normal[: len(part)])

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        return CompletedHandle()


def measure_exposure(
    work: Attention,
    inputs: dict[str, torch.Tensor],
    device: Device,
    comm: Comm,
    control: Control,
    settings: MeasureSettings,
) -> dict[str, Times]:
    """Times of the variants ``whole``, ``compute`` and ``transfer`` on this rank; collective."""
    null_comm = NullComm(comm.rank, comm.size)
    transfer_only = copy.copy(work)
    transfer_only.op = TracedOperator(work.op, work.op.device)
    transfer_only.plan = work.strategy.prepare(transfer_only.op, work.world, work.rank)
    variants: dict[str, tuple[Workload, Comm]] = {
        "whole": (Workload(work, inputs, comm), comm),
        "compute": (Workload(work, inputs, null_comm), null_comm),
        "transfer": (Workload(transfer_only, inputs, comm), comm),
    }
    timings: dict[str, Timing] = {}
    started = time.monotonic()
    for number in range(1 + ROUNDS):
        if number <= 1:  # round 0 is warmup; its times are kept only if it uses up the time limit
            timings = {name: Timing.empty(workload) for name, (workload, _) in variants.items()}
        for name, (workload, variant_comm) in variants.items():
            iterate(workload, device, variant_comm, control, timings[name])
            workload.release()
        if not control.broadcast(time.monotonic() - started < settings.max_seconds):
            break
    return {name: timing.times_us for name, timing in timings.items()}
