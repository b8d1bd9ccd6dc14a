"""Time and memory of one prepared computation on every rank.

Each phase starts from a barrier and a flushed cache; the figure of an iteration is the slowest
rank's time in each phase, added up.  Iterations go on until the 95 % interval of the median is
narrow enough, within a floor and a ceiling; rank 0 decides and tells the others.  Memory is taken
in a pass of its own, since looking costs time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cpbench.core.settings import MeasureSettings
from cpbench.parallel.comm import Traffic
from cpbench.parallel.memory_trace import peak_bytes
from cpbench.results.record import relative_half_width
from cpbench.selectors.common.base import Selecting

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.measure.device import Device
    from cpbench.parallel.comm import Comm, Control


@dataclass(frozen=True)
class Timing:
    """What one rank saw: microseconds by phase and iteration, what it sent by phase, and the pace
    of the machine around each iteration where the device tells it."""

    times_us: dict[str, list[float]]
    traffic: dict[str, Traffic]
    pace_us: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, workload: Workload) -> Timing:
        """Of nothing yet."""
        return cls({phase: [] for phase in workload.phases}, {})


class Workload:
    """The phases of one rank's computation, ready to be called again and again."""

    def __init__(self, work: Attention, inputs: dict[str, torch.Tensor], comm: Comm) -> None:
        self._work, self._inputs, self._comm = work, inputs, comm
        self._saved: Any = None
        direction = work.problem.direction
        self.phases = {"fwd": ("fwd",), "bwd": ("bwd",), "fwd_bwd": ("fwd", "bwd")}[direction]
        self.results: dict[str, torch.Tensor] = {}

    def call(self, phase: str) -> Any:
        """Run one phase; ``results`` holds what it returned."""
        if phase == "fwd":
            x = self._inputs
            out, _, self._saved = self._work.forward(
                x["q"], x["k"], x["v"], self._comm, need_lse=False
            )
            self.results["out"] = out
        else:
            grads = self._work.backward(self._inputs["dout"], self._saved, self._comm)
            self.results.update(zip(("dq", "dk", "dv"), grads, strict=True))

    def whole(self) -> dict[str, torch.Tensor]:
        """All phases, results held: what memory is measured of."""
        for phase in self.phases:
            self.call(phase)
        return self.results

    def selecting(self) -> dict[str, Callable[[], None]]:
        """The steps of a forward pass of an operator that chooses, to be called in this order."""
        selector, plan = self._work.op.impl, self._work.plan.plan
        assert isinstance(selector, Selecting)
        q, k, v = (self._inputs[name] for name in ("q", "k", "v"))
        held: dict[str, Any] = {}

        def select() -> None:
            held.clear()
            held["branches"] = selector.select(q, k, plan)

        def arrange() -> None:
            held["arranged"] = selector.arrange(held["branches"], plan)

        def compute() -> None:
            held["out"] = selector.compute(q, k, v, held["arranged"])

        return {"select": select, "plan": arrange, "kernel": compute}

    def ready(self) -> None:
        """As before a first call: nothing of earlier ones is held, except, where the backward pass
        alone is asked for, the forward result that it starts from."""
        self.results = {}
        if self.phases != ("bwd",):
            self._saved = None
        elif self._saved is None:
            self.call("fwd")
            self.results = {}

    def release(self) -> None:
        """Hold nothing."""
        self.results, self._saved = {}, None

    def predicted_bytes(self) -> dict[str, int]:
        """What this rank sends by phase, according to its trace; empty where there is none."""
        trace = self._work.trace
        return {p: sum(trace.phases[p].bytes_to) for p in self.phases} if trace else {}

    def predicted_peak(self) -> dict[str, int]:
        """Bytes that the strategy's own code needs beside the inputs, by the memory trace."""
        work = self._work
        if work.trace is None:
            return {}
        return {"predicted": peak_bytes(work.strategy, work.op.info, work.world, work.rank)}

    def held_bytes(self) -> dict[str, int]:
        """What the operator and strategy hold beside inputs and results: their plan, and the
        forward result that a backward pass alone starts from."""
        saved = () if self.phases != ("bwd",) else self._saved
        known = {x.untyped_storage().data_ptr() for x in self._inputs.values()}
        return {
            "plan": tensor_bytes(self._work.plan, set(known)),
            "saved": tensor_bytes(saved, set(known)),
        }


def measure_first_call(workload: Workload, device: Device, control: Control) -> float:
    """Microseconds of the very first pass at the measured size, compilation included."""
    workload.ready()
    control.barrier()
    return device.time_us(workload.whole)


def measure_time(
    workload: Workload, device: Device, comm: Comm, control: Control, settings: MeasureSettings
) -> Timing:
    """Timed iterations on this rank; collective over all ranks."""
    timing = Timing.of(workload)
    for _ in range(settings.warmup):
        iterate(workload, device, comm, control, Timing.of(workload))
    slowest: list[float] = []
    started = time.monotonic()
    going, paces = True, [device.pace_us()]
    while going:
        slowest.append(iterate(workload, device, comm, control, timing))
        paces.append(device.pace_us())
        going = control.decide(_go_on(slowest, time.monotonic() - started, settings))
    known = [pace for pace in paces if pace is not None]
    timing.pace_us.extend((a + b) / 2 for a, b in itertools.pairwise(known))
    return timing


def iterate(
    workload: Workload, device: Device, comm: Comm, control: Control, timing: Timing
) -> float:
    """One iteration: every phase from a flushed cache and a barrier.  Returns the microseconds of
    the slowest rank in each phase, added up."""
    workload.ready()
    total = 0.0
    for phase in workload.phases:
        device.flush_cache()
        comm.traffic.clear()
        control.barrier()
        took_us = device.time_us(lambda phase=phase: workload.call(phase))  # type: ignore[misc]
        timing.times_us[phase].append(took_us)
        timing.traffic[phase] = comm.traffic.snapshot()
        total += control.slowest(took_us)
    return total


def measure_parts(
    workload: Workload, device: Device, comm: Comm, control: Control, settings: MeasureSettings
) -> dict[str, list[float]]:
    """Microseconds of choosing, of planning what was chosen and of the kernel, of each iteration,
    for an operator that chooses; as many iterations as ``settings`` ask for at least."""
    steps = workload.selecting()
    found: dict[str, list[float]] = {name: [] for name in steps}
    begun = time.monotonic()
    for number in range(settings.warmup + settings.min_iterations):
        workload.ready()
        for name, step in steps.items():
            device.flush_cache()
            control.barrier()
            took_us = device.time_us(step)
            if number >= settings.warmup:
                found[name].append(took_us)
        late = time.monotonic() - begun > settings.max_seconds and number >= settings.warmup
        if control.decide(late):
            break
    workload.release()
    return found


def measure_memory(
    workload: Workload, device: Device, comm: Comm, control: Control
) -> dict[str, int]:
    """Peak bytes of one pass over all phases on this rank, on top of what is held before it.

    The pass is unhurried: Gloo's threads let go of a buffer a moment after its transfer has ended,
    and if they were the last to hold it, the profiler would not see it freed.
    """
    workload.ready()
    control.barrier()
    comm.pause_s = 0.002
    peak = device.peak_bytes(workload.whole)
    comm.pause_s = 0.0
    return {**peak, **workload.held_bytes()}


def tensor_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of the tensors in a plan or other nest of objects, each storage once."""
    import torch

    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, dict):
        return sum(tensor_bytes(item, seen) for item in value.values())
    if isinstance(value, list | tuple | set):
        return sum(tensor_bytes(item, seen) for item in value)
    return tensor_bytes(vars(value), seen) if hasattr(value, "__dict__") else 0


def _go_on(samples: list[float], seconds: float, settings: MeasureSettings) -> bool:
    if len(samples) < settings.min_iterations:
        return True
    if len(samples) >= settings.max_iterations or seconds > settings.max_seconds:
        return False
    width = relative_half_width(samples)
    return width is None or width > settings.precision
