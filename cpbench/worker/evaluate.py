"""Evaluation of one case on one rank: prepare or refuse, check, measure; all ranks get the same
record.

All ranks go through the same steps.  Refusals, errors and times of single ranks are gathered, so
that all ranks agree on the next step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from cpbench import masks
from cpbench.api import Attention, require_agreement
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.inputs.rope import warning_of
from cpbench.measure import exposure, timeline, timing
from cpbench.measure.memory import HeldMemory, memory_gap
from cpbench.measure.peaks import NO_PRODUCTS, measure_peaks
from cpbench.measure.process_state import ProcessState
from cpbench.measure.telemetry import telemetry_flags
from cpbench.parallel.world import World
from cpbench.results.record import UNCHECKED, Record
from cpbench.verify import check
from cpbench.verify.fingerprint import Fingerprinter, describe_difference
from cpbench.worker.checks import Checks, recipe_of
from cpbench.worker.steps import record_steps
from cpbench.worker.traffic_record import store_traffic

if TYPE_CHECKING:
    import torch

    from cpbench.measure.device.protocol import Device
    from cpbench.measure.telemetry import Telemetry
    from cpbench.measure.timeline_slices import RankTimeline
    from cpbench.parallel.comm import Control, Transport
    from cpbench.verify.variants import Expected, InputVariants

T = TypeVar("T")

# Of the rate of a matrix product: counted FLOPs are up to 7/6 of those computed, where a backward
# pass reuses probabilities.
MAX_OVER_PEAK = 1.2


class Evaluator:
    """Evaluates cases on one rank of a gang.

    Args:
        device, comm, control: of this rank.
        settings: how to measure.
        local_world_size: ranks on this machine.
        check_seed: of the choice of lines and tiles to check, another one for every launch.
        report_phase: called with the name of each phase at its start.

    Attributes:
        timelines: of all ranks in the last case, where it was traced.
        peaks: of ``measure_peaks``, where they have been measured.
    """

    def __init__(
        self,
        device: Device,
        comm: Transport,
        control: Control,
        settings: MeasureSettings,
        local_world_size: int,
        check_seed: int,
        report_phase: Callable[[str], None],
    ) -> None:
        self._device, self._comm, self.control = device, comm, control
        self._settings, self._local_world_size = settings, local_world_size
        self._report_phase = report_phase
        self.telemetry: Telemetry | None = None
        self.peaks: dict[str, float] | None = None
        self.timelines: list[RankTimeline] | None = None
        self._ranks_per_node = _ranks_per_node(control.all_gather(local_world_size))
        context = check.RankContext(device.type, comm, control)
        self._checks = Checks(context, settings, check_seed, report_phase)
        self._expected: dict[str, Expected] = {}  # of the results of the cases of one problem
        self._problem: tuple[object, ...] = ()
        self._state, self._held = ProcessState(), HeldMemory()
        self._changes: set[str] = set()

    def evaluate(self, case: Case, previous: Record | None = None, turns: int = 1) -> Record:
        """The record of a case, without the start time and environment, which the worker adds.

        The state of the process is put back; the record says what the case changed.

        Args:
            previous: the record of earlier turns of this case, to which another turn is added.
            turns: in which the case is measured.
        """
        import torch

        self._changes = set()
        if self._settings.time and self._settings.memory:
            self._held.begin(case.operator.name)
        record = self._evaluate(case, previous, turns)
        record.threads_after = self._gather(torch.get_num_threads())
        self._changes.update(self._state.restore())
        ranks = self.control.all_gather(self._changes)
        if changes := sorted(set().union(*ranks)):
            record.flags = sorted({*record.flags, "changed-state"})
            record.notes = sorted({*record.notes, f"changed-state: {', '.join(changes)}"})
        return record

    def disconnect(self) -> None:
        """Let go of the process groups of the cases so far, which hold memory; collective."""
        self._comm.disconnect()

    def _evaluate(self, case: Case, previous: Record | None, turns: int) -> Record:
        self.timelines = None
        if previous is not None:
            return self._add_turn(case, previous, turns)
        if case.problem_key != self._problem:
            self._problem = case.problem_key
            self._expected.clear()
        self._report_phase("prepare")
        work, record = self._prepare(case)
        record.conditions = self._settings.conditions(self._device.type)
        if work is None:
            return record
        inputs = check.rank_inputs(work, recipe_of(case), work.home)
        try:
            self._check_and_measure(case, work, inputs, record, turns)
        except check.WrongResult as error:
            record.fail_check(str(error))
        if record.status == "wrong":
            self.timelines = None
        return record

    def _check_and_measure(
        self, case: Case, work: Attention, inputs: check.Tensors, record: Record, turns: int
    ) -> None:
        """Check a prepared case and, if it passes, measure it.

        Raises:
            WrongResult: on all ranks, for results that break the contract of operators.
        """
        workload = timing.Workload(work, inputs, self._comm)
        untouched = Fingerprinter(work).take(inputs)
        if self._settings.check_small and not case.page_size:
            self._checks.check_small(self._plan_reduced(case, work), record)
        if self._settings.time:
            self._report_phase("first call")
            first_us = timing.measure_first_call(workload, self._device, self.control)
            record.first_call_us = self.control.max(first_us)
        expected = self._checks.check_at_size(work, inputs, record)
        if record.status == "ok" and self._settings.time:
            variants = self._checks.make_variants(work, inputs, expected, record)
            if turns > 1:
                self._expected[case.id] = variants.expected
        if record.status == "ok" and self._settings.time:
            self._measure(workload, record, variants, self._settings.of_turn(turns, 0))
            record.turns = [record.iterations] if turns > 1 and record.times_us else []
            record_steps(
                work, inputs, workload, record, self._device, self.control, self._settings,
                self._report_phase,
            )  # fmt: skip
            if record.status == "ok" and work.info.traced:
                self._measure_communication(work, inputs, workload, record)
            record.memory_bytes["inputs"] = self._gather(sum(x.nbytes for x in inputs.values()))
        changed = describe_difference(untouched, Fingerprinter(work).take(inputs), 0.0)
        self._fail_if_any(changed and f"the operator overwrote its input: {changed}", record)

    def _measure_communication(
        self,
        work: Attention,
        inputs: dict[str, torch.Tensor],
        workload: timing.Workload,
        record: Record,
    ) -> None:
        """Measure exposed communication and record timelines, where the settings ask for them."""
        workload.release()
        device, comm, control = self._device, self._comm, self.control
        if self._settings.exposure and (comm.size > 1 or work.offloaded):
            self._report_phase("exposure")
            variants = exposure.measure_exposure(
                work, inputs, device, comm, control, self._settings
            )
            ranks = control.all_gather(variants)
            record.exposure_us = {
                variant: {
                    phase: [rank[variant][phase] for rank in ranks] for phase in workload.phases
                }
                for variant in variants
            }
        if self._settings.trace:
            self._report_phase("trace")
            self.timelines = timeline.record_timelines(work, inputs, device, comm, control)

    def _add_turn(self, case: Case, record: Record, turns: int) -> Record:
        """Add the iterations of another turn, with new inputs and plans and the same checks."""
        if record.status != "ok" or not self._settings.time:
            return record
        self._report_phase("prepare")
        work, turn = self._prepare(case)
        turn.conditions = record.conditions
        if work is None:
            return turn
        inputs = check.rank_inputs(work, recipe_of(case), work.home)
        variants = self._checks.make_later_variants(work, inputs, turn, self._expected[case.id])
        settings = replace(self._settings.of_turn(turns, record.iterations), memory=False)
        workload = timing.Workload(work, inputs, self._comm)
        self._measure(workload, turn, variants, settings, record.samples_us)
        if turn.status != "ok":
            return turn
        record.turns = [*record.turns, turn.iterations]
        for phase, ranks in turn.times_us.items():
            record.times_us[phase] = [
                [*old, *new] for old, new in zip(record.times_us[phase], ranks, strict=True)
            ]
        _extend(record.delay_us, turn.delay_us)
        _extend(record.host_us, turn.host_us)
        paces_us = zip(record.pace_us, turn.pace_us, strict=True)
        record.pace_us = [[*old, *new] for old, new in paces_us]
        record.flags = sorted({*record.flags, *turn.flags})
        record.notes = sorted({*record.notes, *turn.notes})
        record.telemetry = [
            max(ranks, key=lambda summary: summary.get("samples", 0))
            for ranks in zip(record.telemetry, turn.telemetry, strict=True)
        ]
        return record

    def _plan(self, case: Case, world: World) -> Attention:
        return Attention(case.operator, case.strategy, world, self._comm.rank, self._device.type)

    def _gather(self, value: int) -> list[int]:
        return list(self.control.all_gather(value))

    def _prepare(self, case: Case) -> tuple[Attention | None, Record]:
        """Plan the case and begin its record; the plan is None when some rank refuses."""
        work, refusal = None, None
        start = time.perf_counter()
        masks.rebuild(case.mask, case.seq_len, case.num_heads_q)
        mask_us = (time.perf_counter() - start) * 1e6
        layout_us = 0.0
        try:
            start = time.perf_counter()
            world = World.of_case(case, self._ranks_per_node)
            layout_us = (time.perf_counter() - start) * 1e6
            work = self._plan(case, world)
            # The reduced problem is planned too, so that it is refused before any communication.
            if not case.page_size:
                self._plan_reduced(case, work)
        except ValueError as error:  # Unsupported, or a layout that does not fit
            refusal = str(error)
        ranks = self.control.all_gather(
            (
                refusal,
                mask_us,
                layout_us + work.plan_us if work else 0.0,
                work.fingerprint if work else ("", 0),
            )
        )
        refusals = [reason for reason, *_ in ranks if reason]
        if work is None or refusals:
            return None, Record(case=case, status="unsupported", reason=refusals[0])
        require_agreement(self.control, work, [fingerprint for *_, fingerprint in ranks])
        work.connect(self._comm)
        flops = work.flops
        record = Record(
            case=case,
            status="ok",
            mask_us=max(us for _, us, _, _ in ranks),
            plan_us=max(us for _, _, us, _ in ranks),
            computes=work.computes,
            area=work.mask.area,
            ranks_per_node=work.world.ranks_per_node,
            flops={phase: flops[phase] for phase in case.direction.split("_")},
            notes=[text] if (text := warning_of(case)) else [],
        )
        return work, record

    def _plan_reduced(self, case: Case, work: Attention) -> Attention:
        return self._plan(case, check.reduced_world(work))

    def _fail_if_any(self, reason: str | None, record: Record) -> None:
        """Make the record ``wrong`` if any rank has a reason."""
        reasons = [text for text in self.control.all_gather(reason) if text]
        if reasons and record.status == "ok":
            record.fail_check(reasons[0])

    def _measure(
        self,
        workload: timing.Workload,
        record: Record,
        variants: InputVariants,
        settings: MeasureSettings,
        earlier_us: Sequence[float] = (),
    ) -> None:
        """Measure times, memory, traffic and flags of every rank, and check that every timed call
        returned the checked results.

        Args:
            earlier_us: iterations of earlier turns.
        """
        device, control = self._device, self.control
        self._report_phase("measure")
        flags = set(device.flags(self._local_world_size, []))
        start = time.time()
        own_timing = timing.measure_time(
            workload, device, self._comm, control, settings, variants, earlier_us
        )
        if self.telemetry is not None:
            summary = self.telemetry.between(start, time.time())
            flags.update(telemetry_flags(summary))
            record.telemetry = control.all_gather(summary)
        self._changes.update(self._state.changes())
        uses = [use for phase in own_timing.uses.values() for use in phase]
        flags.update(device.flags(self._local_world_size, uses))
        if own_timing.works_late:
            flags.add("async")
        if own_timing.launch_bound:
            flags.add("launch-bound")
        if not (settings.check_small and settings.check_sampled):
            flags.add(UNCHECKED)
        mismatch = self._checks.finish(variants, record)
        memory: dict[str, int] = {}
        if settings.memory:
            self._report_phase("memory")
            memory = timing.measure_memory(workload, device, self._comm, control, self._held)
            if memory_gap(memory):
                flags.add("memory-gap")
            memory |= workload.predicted_peak()
        sent = own_timing.traffic
        if self._comm.size > 1 and not earlier_us:
            sent, complete = timing.record_traffic(workload, self._comm, control)
            if not complete:
                flags.add("untracked-traffic")
        workload.reset()
        traced = workload.traced_phases(), workload.allgather_phases()
        ranks = control.all_gather((own_timing, memory, sorted(flags), traced, sent))
        timings: list[timing.Timing] = [rank_timing for rank_timing, *_ in ranks]
        record.times_us = {p: [t.times_us[p] for t in timings] for p in workload.phases}
        record.pace_us = [t.pace_us for t in timings if t.pace_us]
        delays_us = {p: [t.delay_us(p) for t in timings] for p in workload.phases}
        record.delay_us = {p: ranks for p, ranks in delays_us.items() if all(ranks)}
        hosts_us = {p: [t.host_us.get(p, []) for t in timings] for p in workload.phases}
        record.host_us = {p: ranks for p, ranks in hosts_us.items() if all(ranks)}
        record.memory_bytes = {kind: [nbytes[kind] for _, nbytes, *_ in ranks] for kind in memory}
        rank_flags = {flag for _, _, flags_of_rank, *_ in ranks for flag in flags_of_rank}
        record.flags = sorted({*record.flags, *rank_flags})
        counted, by_trace = [rank[4] for rank in ranks], [rank[3] for rank in ranks]
        store_traffic(record, counted, by_trace, workload.offloaded)
        self._fail_if_any(mismatch, record)
        self._check_rate(record)

    def _check_rate(self, record: Record) -> None:
        """Make the record ``wrong`` if it claims more FLOP/s than a matrix product reaches."""
        rate = record.tflops_per_rank or 0.0
        if self.peaks is None or rate <= MAX_OVER_PEAK * _best_product(self.peaks):
            return
        # The machine may have been busier when they were measured.
        self.peaks = measure_peaks(self._device, self.control, [record.case.dtype])
        peak = _best_product(self.peaks)
        if record.status == "ok" and rate > MAX_OVER_PEAK * peak:
            record.fail_check(
                f"{rate:.3g} TFLOP/s per rank cannot be: a large matrix product reaches {peak:.3g}"
            )


def _extend(total: Mapping[str, list[list[T]]], more: Mapping[str, list[list[T]]]) -> None:
    """Add the iterations of another turn, by phase and rank."""
    for phase, ranks in more.items():
        for old, new in zip(total[phase], ranks, strict=True):
            old.extend(new)


def _ranks_per_node(local_world_sizes: Sequence[int]) -> int:
    """Ranks per node, of which the last may have fewer; 1 where others have, too.

    Args:
        local_world_sizes: of the node of each rank.
    """
    size, per_node = len(local_world_sizes), local_world_sizes[0]
    partial = size % per_node
    expected = [per_node] * (size - partial) + [partial] * partial
    return per_node if list(local_world_sizes) == expected else 1


def _best_product(peaks: dict[str, float]) -> float:
    """The highest rate of matrix products of any dtype."""
    return max(rate for name, rate in peaks.items() if name not in NO_PRODUCTS)
