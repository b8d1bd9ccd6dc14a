"""How much of a strategy's communication is exposed: its run, beside the same run without
communication, and communication alone.

Without communication, a strategy computes what it always does, on buffers that hold a constant;
alone, it sends what it always sends while its operator computes nothing.  The three take turns, so
that what drifts meanwhile meets all of them.  Exposed is the time that the run takes longer than
without communication; hidden, the part of communication alone that does not show in it.  Waiting
for ranks that have more work is no communication: the figure of a phase is the slowest rank's in
all three.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpbench.measure.timing import Timing, Workload, iterate
from cpbench.parallel.comm import Done, Grouped
from cpbench.parallel.trace import TracedOperator

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.core.settings import MeasureSettings
    from cpbench.measure.device import Device
    from cpbench.parallel.comm import Comm, Control, Handle

ROUNDS = 7
FILL = 0.125
Times = dict[str, list[float]]  # microseconds by phase and round


class SilentComm(Grouped):
    """:class:`~cpbench.parallel.comm.Comm` that moves nothing: what should arrive is a constant,
    since memory that nobody wrote would be read, or computed with, at another speed."""

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        recvs: Sequence[tuple[torch.Tensor, int]],
        what: str = "",
    ) -> Handle:
        for tensor, _ in recvs:
            tensor.fill_(FILL)
        return Done()

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        out.fill_(FILL)
        return Done()

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        out.fill_(FILL)
        return Done()

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        out.fill_(FILL)
        return Done()

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        return Done()


def measure_exposure(
    work: Attention,
    inputs: dict[str, torch.Tensor],
    device: Device,
    comm: Comm,
    control: Control,
    settings: MeasureSettings,
) -> dict[str, Times]:
    """``whole``, ``compute`` and ``transfer`` of this rank; collective over all ranks."""
    silent = SilentComm(comm.rank, comm.size)
    idle = copy.copy(work)
    idle.op = TracedOperator(work.op.info, work.op.device)
    idle.plan = work.strategy.prepare(idle.op, work.world, work.rank)
    ways: dict[str, tuple[Workload, Comm]] = {
        "whole": (Workload(work, inputs, comm), comm),
        "compute": (Workload(work, inputs, silent), silent),
        "transfer": (Workload(idle, inputs, comm), comm),
    }
    found: dict[str, Timing] = {}
    started = time.monotonic()
    for number in range(1 + ROUNDS):
        if number <= 1:  # the first round warms up, and is all there is where it takes too long
            found = {name: Timing.of(workload) for name, (workload, _) in ways.items()}
        for name, (workload, sends) in ways.items():
            iterate(workload, device, sends, control, found[name])
            workload.release()
        if not control.decide(time.monotonic() - started < settings.max_seconds):
            break
    return {name: timing.times_us for name, timing in found.items()}
