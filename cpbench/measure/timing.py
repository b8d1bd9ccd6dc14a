"""Time and memory of one prepared computation on every rank.

Each phase starts from a barrier and a flushed cache; the time of an iteration is the sum over its
phases of the slowest rank's time.  Iterations stop when the 95 % confidence interval of the median
is narrow enough, within a minimum and a maximum; rank 0 decides for all.  Memory is measured in a
separate pass, since profiling it takes time.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from cpbench.core.operator import QKV
from cpbench.core.registry import implementation, strategy_info
from cpbench.core.settings import MeasureSettings
from cpbench.measure.memory import HeldMemory, tensor_bytes
from cpbench.measure.processor_use import ProcessorUse
from cpbench.parallel.comm import Traffic
from cpbench.parallel.comm_torch import TorchComm
from cpbench.parallel.host_memory.account import MemoryAccount
from cpbench.parallel.tracing.memory_trace import peak_bytes
from cpbench.parallel.tracing.trace import trace_rank
from cpbench.results.record import relative_half_width
from cpbench.selectors.common.base import Selector
from cpbench.strategies.libraries.traffic import record_messages

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.measure.device.protocol import Device, HostTime
    from cpbench.parallel.comm import Comm, Control
    from cpbench.parallel.host_memory.account import PeakBytes
    from cpbench.parallel.tracing.trace import PhaseTrace

LATE_WORK_CALLS = 2  # first calls after which it is seen whether work goes on


@dataclass(frozen=True)
class Timing:
    """Measurements of one rank: microseconds by phase and iteration, traffic by phase, the time of
    the reference computation around each iteration where the device has one, the processor use of
    each phase on a CPU, the host's time to queue each phase on a GPU, and whether work went on
    after a call had returned."""

    times_us: dict[str, list[float]]
    traffic: dict[str, Traffic]
    pace_us: list[float] = field(default_factory=list)
    uses: dict[str, list[ProcessorUse]] = field(default_factory=dict)
    hosts: dict[str, list[HostTime]] = field(default_factory=dict)
    works_late: bool = False

    def delay_us(self, phase: str) -> list[int]:
        """Microseconds that threads waited for a core in each iteration; empty where unknown."""
        delays_s = [use.delay_s for use in self.uses.get(phase, ())]
        return [round(delay_s * 1e6) for delay_s in delays_s if delay_s is not None]

    @property
    def host_us(self) -> dict[str, list[float]]:
        """Microseconds that the host took to queue each phase, by iteration; empty on a CPU."""
        return {phase: [host.us for host in hosts] for phase, hosts in self.hosts.items()}

    @property
    def launch_bound(self) -> bool:
        """Whether the host decided the time of some phase in most iterations."""
        return any(
            2 * sum(host.bound for host in hosts) > len(hosts) for hosts in self.hosts.values()
        )

    @classmethod
    def empty(cls, workload: Workload) -> Timing:
        """A timing of no iterations."""
        return cls({phase: [] for phase in workload.phases}, {})


class Workload:
    """The phases of one rank's computation, which can be called repeatedly."""

    def __init__(self, work: Attention, inputs: dict[str, torch.Tensor], comm: Comm) -> None:
        self._work, self._inputs, self._comm = work, inputs, comm
        self._saved: Any = None
        direction = work.problem.direction
        self.phases = {"fwd": ("fwd",), "bwd": ("bwd",), "fwd_bwd": ("fwd", "bwd")}[direction]
        self.results: dict[str, torch.Tensor] = {}

    def run_phase(self, phase: str) -> Any:
        """Run one phase and keep what it returns in ``results``."""
        if phase == "fwd":
            inputs = self._work.inputs_of(self._inputs)
            out, _, self._saved = self._work.forward(inputs, self._comm, need_lse=False)
            self.results["out"] = out
        else:
            grads = self._work.backward(self._inputs["dout"], self._saved, self._comm)
            self.results.update(zip(self._work.result_names[2:], grads, strict=True))

    def run_all(self) -> dict[str, torch.Tensor]:
        """Run all phases; returns the results."""
        for phase in self.phases:
            self.run_phase(phase)
        return self.results

    def selection_steps(self) -> dict[str, Callable[[], None]]:
        """The steps of a forward pass of a selector, to be called in this order."""
        selector, plan = self._work.op.impl, self._work.plan.plan
        assert isinstance(selector, Selector)
        qkv = QKV.of(self._inputs)
        intermediate: dict[str, Any] = {}

        def select() -> None:
            intermediate.clear()
            intermediate["branches"] = selector.select_from(qkv, plan)

        def prepare() -> None:
            branches = intermediate["branches"]
            intermediate["prepared"] = selector.prepare_branches(branches, plan)

        def compute() -> None:
            intermediate["out"] = selector.compute(qkv, intermediate["prepared"])

        return {"select": select, "plan": prepare, "kernel": compute}

    def reset(self) -> None:
        """Drop the results of earlier calls.  Where only the backward pass is timed, the forward
        result that it starts from is kept, or computed."""
        self.results = {}
        if self.phases != ("bwd",):
            self._saved = None
        elif self._saved is None:
            self.run_phase("fwd")
            self.results = {}

    def release(self) -> None:
        """Drop all results."""
        self.results, self._saved = {}, None

    @property
    def offloaded(self) -> bool:
        """Whether inputs and results are in host memory."""
        return self._work.offloaded

    def allgather_phases(self) -> dict[str, PhaseTrace]:
        """What an all-gather of all keys would send, by phase, where the strategy sends those that
        the data select; else empty."""
        work = self._work
        if work.info.selectors != "pooled":
            return {}
        strategy = implementation(strategy_info("ring_allgather"), {"keep": True})
        trace = trace_rank(strategy, work.op.info, work.world, work.rank)
        return {phase: trace.phases[phase] for phase in self.phases}

    def traced_phases(self) -> dict[str, PhaseTrace]:
        """The trace of this rank by phase; empty without one."""
        trace = self._work.trace
        return {phase: trace.phases[phase] for phase in self.phases} if trace else {}

    def accounted_peak(self) -> PeakBytes:
        """Peak bytes that torch allocates for the device and in host memory in a pass."""
        account = MemoryAccount((self._inputs, self._saved))
        with account:
            self.run_all()
        return account.peak

    def predicted_peak(self) -> dict[str, int]:
        """Peak bytes of the strategy's own code beyond the inputs, by the memory trace."""
        work = self._work
        if work.trace is None:
            return {}
        peak = peak_bytes(work.strategy, work.op, work.world, work.rank)
        host = {"predicted_host": peak.host} if work.offloaded else {}
        return {"predicted": peak.device, **host}

    def held_bytes(self, memory: HeldMemory) -> dict[str, int]:
        """Bytes that operator and strategy hold beyond inputs and results: their plan, the forward
        result where only the backward pass is timed, and what else the operator keeps."""
        saved = () if self.phases != ("bwd",) else self._saved
        counted: set[int] = set()
        own = {key: value for key, value in vars(self).items() if key not in ("_work", "_comm")}
        tensor_bytes(own, counted)
        input_storages = {x.untyped_storage().data_ptr() for x in self._inputs.values()}
        sizes = {
            "plan": tensor_bytes(self._work.plan, set(input_storages)),
            "saved": tensor_bytes(saved, set(input_storages)),
        }
        tensor_bytes(self._work.plan, counted)
        return {**sizes, "held": memory.held_bytes(self._work.op.impl, counted)}


def measure_first_call(workload: Workload, device: Device, control: Control) -> float:
    """Microseconds of the first pass at the measured size, including compilation."""
    workload.reset()
    control.barrier()
    first_us = device.time_us(workload.run_all)
    workload.release()  # checks run a pass of their own
    return first_us


class CallObserver(Protocol):
    """Is told of every iteration, outside of the timer."""

    def before_call(self) -> None:
        """May change the inputs in place."""
        ...

    def after_call(self, results: dict[str, torch.Tensor]) -> None:
        """Receives the results of all phases."""
        ...


def measure_time(
    workload: Workload,
    device: Device,
    comm: Comm,
    control: Control,
    settings: MeasureSettings,
    observer: CallObserver,
    earlier_us: Sequence[float] = (),
) -> Timing:
    """Timed iterations on this rank; collective over all ranks.

    Args:
        earlier_us: iterations of earlier turns, which count for the precision and the bounds.
    """
    timing = Timing.empty(workload)

    calls, works_late = itertools.count(), False

    def observed_iteration(timing: Timing) -> float:
        nonlocal works_late
        workload.release()
        observer.before_call()
        total_us = iterate(workload, device, comm, control, timing)
        if next(calls) < LATE_WORK_CALLS and not earlier_us:
            works_late |= device.works_late()
        observer.after_call(workload.results)
        return total_us

    began = time.monotonic()
    warmup_s = 0.0 if earlier_us else device.warmup_s
    for number in itertools.count():
        if number >= settings.warmup and not control.broadcast(time.monotonic() - began < warmup_s):
            break
        observed_iteration(Timing.empty(workload))
    slowest_us = list(earlier_us)
    started = time.monotonic()
    more, paces_us = True, [device.pace_us()]
    while more:
        slowest_us.append(observed_iteration(timing))
        paces_us.append(device.pace_us())
        more = control.broadcast(needs_more(slowest_us, time.monotonic() - started, settings))
    measured_us = [pace_us for pace_us in paces_us if pace_us is not None]
    timing.pace_us.extend((before + after) / 2 for before, after in itertools.pairwise(measured_us))
    return replace(timing, works_late=works_late)


def iterate(
    workload: Workload, device: Device, comm: Comm, control: Control, timing: Timing
) -> float:
    """Run one iteration, each phase after a cache flush and a barrier, and append it to ``timing``.
    Returns the sum over phases of the slowest rank's microseconds."""
    workload.reset()
    total_us = 0.0
    for phase in workload.phases:
        device.flush_cache()
        comm.traffic.clear()
        control.barrier()
        phase_us = device.time_us(functools.partial(workload.run_phase, phase), comm.meet)
        timing.times_us[phase].append(phase_us)
        if device.last_use is not None:
            timing.uses.setdefault(phase, []).append(device.last_use)
        if device.last_host is not None:
            timing.hosts.setdefault(phase, []).append(device.last_host)
        timing.traffic[phase] = comm.traffic.snapshot()
        total_us += control.max(phase_us)
    return total_us


def record_traffic(
    workload: Workload, comm: Comm, control: Control
) -> tuple[dict[str, Traffic], bool]:
    """What this rank sends by phase, in a pass of its own: what passes through ``comm``, and what
    goes to torch.distributed behind it; and whether ``comm`` counted all of it."""
    import torch.distributed as dist

    traffic, complete = {}, True
    workload.reset()
    for phase in workload.phases:
        comm.traffic.clear()
        control.barrier()
        run = functools.partial(workload.run_phase, phase)
        _, messages = record_messages(dist.group.WORLD, run)
        counted = comm.traffic.bytes_to[:]
        if isinstance(comm, TorchComm):
            comm.traffic.clear_messages()  # they are among those recorded
        for message in messages:
            comm.traffic.add(*message)
        traffic[phase] = comm.traffic.snapshot()
        complete &= traffic[phase].bytes_to == counted
    workload.reset()
    return traffic, complete


def measure_steps(
    steps: Mapping[str, Callable[[], object]],
    workload: Workload,
    device: Device,
    control: Control,
    settings: MeasureSettings,
) -> dict[str, list[float]]:
    """Microseconds per iteration of steps beside the workload on this rank, such as those of a
    selector.  Runs ``settings.min_iterations``, fewer where they take over ``max_seconds``."""
    times_us: dict[str, list[float]] = {name: [] for name in steps}
    started = time.monotonic()
    for number in range(settings.warmup + settings.min_iterations):
        workload.reset()
        for name, step in steps.items():
            device.flush_cache()
            control.barrier()
            step_us = device.time_us(step)
            if number >= settings.warmup:
                times_us[name].append(step_us)
        out_of_time = time.monotonic() - started > settings.max_seconds
        if control.broadcast(out_of_time and number >= settings.warmup):
            break
    workload.release()
    return times_us


def measure_memory(
    workload: Workload, device: Device, comm: Comm, control: Control, memory: HeldMemory
) -> dict[str, int]:
    """Peak bytes of one pass over all phases on this rank, beyond those allocated before it, by
    torch and by the process; and the bytes held before it.

    Both passes pause after each wait: Gloo's threads release a buffer shortly after its transfer
    has ended, and if they held the last reference, it would not be seen to be freed.
    """
    workload.reset()
    held = workload.held_bytes(memory)
    comm.pause_s = 0.002
    control.barrier()
    peak = device.peak_bytes(workload.run_all)
    workload.reset()
    control.barrier()
    process = device.process_peak_bytes(workload.run_all)
    if workload.offloaded:
        workload.reset()
        control.barrier()
        accounted = workload.accounted_peak()
        peak["host"] = accounted.host
        if device.type == "cpu":  # both sides are main memory: the process's cannot be told apart
            peak["peak"], process = accounted.device, {}
    comm.pause_s = 0.0
    return {**peak, **process, **held}


def needs_more(samples: list[float], seconds: float, settings: MeasureSettings) -> bool:
    """Whether to run another iteration after these, which have taken ``seconds``."""
    if len(samples) < settings.min_iterations:
        return True
    if len(samples) >= settings.max_iterations or seconds > settings.max_seconds:
        return False
    width = relative_half_width(samples)
    return width is None or width > settings.precision
