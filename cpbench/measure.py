"""Time and memory of one prepared computation on every rank.

Each iteration starts from a barrier and a flushed cache; phases are timed apart; the figure of an
iteration is that of its slowest rank.  Iterations go on until the 95 % interval of the median is
narrow enough, within a floor and a ceiling; rank 0 decides and tells the others.  Memory is taken
in a pass of its own, since looking costs time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.record import relative_half_width
from cpbench.settings import MeasureSettings

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.comm import Comm, Control
    from cpbench.device import Device


@dataclass(frozen=True)
class Timing:
    """What one rank saw: microseconds by phase and iteration, and the first call's."""

    times_us: dict[str, list[float]]
    first_call_us: float
    bytes_sent: dict[str, int]
    messages: dict[str, int]


class Workload:
    """The phases of one rank's computation, ready to be called again and again."""

    def __init__(self, work: Attention, inputs: dict[str, torch.Tensor], comm: Comm) -> None:
        self._work, self._inputs, self._comm = work, inputs, comm
        self._saved: Any = None
        direction = work.problem.direction
        self.phases = {"fwd": ("fwd",), "bwd": ("bwd",), "fwd_bwd": ("fwd", "bwd")}[direction]

    def fwd(self) -> Any:
        x = self._inputs
        out, lse, self._saved = self._work.forward(
            x["q"], x["k"], x["v"], self._comm, need_lse=False
        )
        return out, lse

    def bwd(self) -> Any:
        if self._saved is None:
            self.fwd()
        return self._work.backward(self._inputs["dout"], self._saved, self._comm)

    def call(self, phase: str) -> Any:
        return self.fwd() if phase == "fwd" else self.bwd()

    def whole(self) -> Any:
        """All phases, results held: what memory is measured of."""
        return [self.call(phase) for phase in self.phases]

    def forget(self) -> None:
        """Drop what the forward pass left for the backward pass."""
        self._saved = None


def measure_time(
    workload: Workload, device: Device, comm: Comm, control: Control, settings: MeasureSettings
) -> Timing:
    """Timed iterations on this rank; collective over all ranks."""
    traffic: dict[str, tuple[int, int]] = {}
    first_call_us = 0.0
    if workload.phases == ("bwd",):
        workload.fwd()  # its result serves every backward iteration, untimed
    for warmup in range(max(settings.warmup, 1)):
        control.barrier()
        for phase in workload.phases:
            before = comm.traffic.bytes_sent, comm.traffic.messages
            took_us = device.time_us(lambda phase=phase: workload.call(phase))  # type: ignore[misc]
            traffic[phase] = (
                comm.traffic.bytes_sent - before[0],
                comm.traffic.messages - before[1],
            )
            if warmup == 0:
                first_call_us += took_us
    times_us: dict[str, list[float]] = {phase: [] for phase in workload.phases}
    slowest: list[float] = []
    started = time.monotonic()
    going = True
    while going:
        device.flush_cache()
        control.barrier()
        total = 0.0
        for phase in workload.phases:
            took_us = device.time_us(lambda phase=phase: workload.call(phase))  # type: ignore[misc]
            times_us[phase].append(took_us)
            total += took_us
        slowest.append(control.slowest(total))
        going = control.decide(_go_on(slowest, time.monotonic() - started, settings))
    return Timing(
        times_us,
        first_call_us,
        {phase: sent for phase, (sent, _) in traffic.items()},
        {phase: count for phase, (_, count) in traffic.items()},
    )


def measure_memory(
    workload: Workload, device: Device, comm: Comm, control: Control
) -> dict[str, int]:
    """Peak bytes of one pass over all phases on this rank, on top of its inputs.

    The pass is unhurried: Gloo's threads let go of a buffer a moment after its transfer has ended,
    and if they were the last to hold it, the profiler would not see it freed.
    """
    workload.forget()
    control.barrier()
    if workload.phases == ("bwd",):
        workload.fwd()
    comm.pause_s = 0.002
    peak = device.peak_bytes(workload.whole)
    comm.pause_s = 0.0
    workload.forget()
    return peak


def _go_on(samples: list[float], seconds: float, settings: MeasureSettings) -> bool:
    if len(samples) < settings.min_iterations:
        return True
    if len(samples) >= settings.max_iterations or seconds > settings.max_seconds:
        return False
    width = relative_half_width(samples)
    return width is None or width > settings.precision
