"""Evaluation of one case on one rank: prepare or refuse, check, measure; all ranks get the same
record.

All ranks go through the same steps.  Refusals, errors and times of single ranks are gathered, so
that all ranks agree on the next step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cpbench import masks
from cpbench.api import Attention, require_agreement
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.inputs import Recipe
from cpbench.measure import exposure, timeline, timing
from cpbench.parallel.world import World
from cpbench.results.record import APPROXIMATE, UNCHECKED, Record
from cpbench.verify import at_size, check, quality
from cpbench.verify import selection as check_selection

if TYPE_CHECKING:
    import torch

    from cpbench.measure.device import Device
    from cpbench.measure.telemetry import Telemetry
    from cpbench.measure.timeline_slices import RankTimeline
    from cpbench.parallel.comm import Comm, Control


class Evaluator:
    """Evaluates cases on one rank of a gang.

    Args:
        device, comm, control: of this rank.
        settings: how to measure.
        local_world_size: ranks on this machine.
        report_phase: called with the name of each phase at its start.

    Attributes:
        timelines: of all ranks in the last case, where it was traced.
    """

    def __init__(
        self,
        device: Device,
        comm: Comm,
        control: Control,
        settings: MeasureSettings,
        local_world_size: int,
        report_phase: Callable[[str], None],
    ) -> None:
        self._device, self._comm, self.control = device, comm, control
        self._settings, self._local_world_size = settings, local_world_size
        self._report_phase = report_phase
        self.telemetry: Telemetry | None = None
        self.timelines: list[RankTimeline] | None = None
        # Nodes with different numbers of ranks form no mesh: treated as one rank per node.
        local_world_sizes = set(control.all_gather(local_world_size))
        self._ranks_per_node = local_world_size if len(local_world_sizes) == 1 else 1
        self._context = check.RankContext(device.type, comm, control)

    def evaluate(self, case: Case, previous: Record | None = None, turns: int = 1) -> Record:
        """The record of a case, without the start time and environment, which the worker adds.

        Args:
            previous: the record of earlier turns of this case, to which another turn is added.
            turns: in which the case is measured.
        """
        self.timelines = None
        if previous is not None:
            return self._add_turn(case, previous, turns)
        self._report_phase("prepare")
        work, record = self._prepare(case)
        record.conditions = self._settings.conditions(self._device.type)
        if work is None:
            return record
        inputs = check.rank_inputs(work, recipe_of(case), self._device.type)
        input_checksums = check.checksums(inputs)
        workload = timing.Workload(work, inputs, self._comm)
        if self._settings.check_small:
            self._report_phase("check")
            self._store_errors("small", self._check_small(case, work), record)
        if self._settings.time:
            self._report_phase("first call")
            first_us = timing.measure_first_call(workload, self._device, self.control)
            record.first_call_us = self.control.max(first_us)
        work.op.pairs = 0
        if work.op.info.selects:
            checked = self._check_selection(work, inputs, record)
        else:
            results = check.run_pass(work, inputs, self._comm)
            record.balance = self._gather(work.op.pairs)
            checked = check.checksums(results)
            if self._settings.check_sampled and case.seq_len > check.SMALL_TOKENS:
                self._report_phase("check at size")
                errors = at_size.check_sampled(
                    work, inputs, results, recipe_of(case), self._context
                )
                self._store_errors("sampled", errors, record)
            del results
        if record.status == "ok" and self._settings.time:
            self._measure(workload, record, checked, self._settings.of_turn(turns, 0))
            record.turns = [record.iterations] if turns > 1 else []
            if work.op.info.selects and case.direction != "bwd":
                self._report_phase("selection steps")
                steps_us = timing.measure_selection_steps(
                    workload, self._device, self._comm, self.control, self._settings
                )
                ranks = self.control.all_gather(steps_us)
                record.parts_us = {name: [rank[name] for rank in ranks] for name in ranks[0]}
            if record.status == "ok" and work.info.traced:
                self._measure_communication(work, inputs, workload, record)
            record.memory_bytes["inputs"] = self._gather(sum(x.nbytes for x in inputs.values()))
        changed = "the operator overwrote its input"
        self._check_unchanged(input_checksums, check.checksums(inputs), changed, record)
        return record

    def _check_selection(
        self, work: Attention, inputs: dict[str, torch.Tensor], record: Record
    ) -> check.Tensors:
        """Check the results of a selector given its selection, and measure the quality of the
        selection.  Returns the checksums of the results."""
        case = record.case
        results, selection = check_selection.run_pass_with_selection(work, inputs)
        area = sum(branch.mask.area for branch in selection.branches)
        flops = case.problem.flops(area)
        record.flags.append(APPROXIMATE)
        record.area, record.flops = area, {phase: flops[phase] for phase in record.flops}
        if self._settings.check_sampled and case.seq_len > check.SELECTION_TOKENS:
            self._report_phase("check at size")
            errors = check_selection.check_sampled(
                work, inputs, results, selection, case.seed, self._context
            )
            self._store_errors("sampled", errors, record)
        if self._settings.quality and record.status == "ok":
            self._report_phase("quality")
            figures = quality.measure_quality(work, inputs, results, selection)
            record.quality = {name: x for name, x in figures.items() if math.isfinite(x)}
        return check.checksums(results)

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
        if self._settings.exposure and comm.size > 1:
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
        inputs = check.rank_inputs(work, recipe_of(case), self._device.type)
        checked = check.checksums(check.run_pass(work, inputs, self._comm))
        settings = replace(self._settings.of_turn(turns, record.iterations), memory=False)
        workload = timing.Workload(work, inputs, self._comm)
        self._measure(workload, turn, checked, settings, record.samples_us)
        if turn.status != "ok":
            return turn
        record.turns = [*record.turns, turn.iterations]
        for phase, ranks in turn.times_us.items():
            record.times_us[phase] = [
                [*old, *new] for old, new in zip(record.times_us[phase], ranks, strict=True)
            ]
        paces_us = zip(record.pace_us, turn.pace_us, strict=True)
        record.pace_us = [[*old, *new] for old, new in paces_us]
        record.flags = sorted({*record.flags, *turn.flags})
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
        flops = case.problem.flops(work.mask.area)
        record = Record(
            case=case,
            status="ok",
            mask_us=max(us for _, us, _, _ in ranks),
            plan_us=max(us for _, _, us, _ in ranks),
            area=work.mask.area,
            ranks_per_node=work.world.ranks_per_node,
            flops={phase: flops[phase] for phase in case.direction.split("_")},
        )
        return work, record

    def _plan_reduced(self, case: Case, work: Attention) -> Attention:
        return self._plan(case, check.reduced_world(work))

    def _check_small(self, case: Case, work: Attention) -> check.Errors:
        reduced = self._plan_reduced(case, work)
        if reduced.op.info.selects:
            inputs = check.rank_inputs(reduced, recipe_of(case), self._device.type)
            return check_selection.check_small(reduced, inputs, self._context)
        return check.check_small(reduced, recipe_of(case), self._context)

    def _store_errors(self, name: str, errors: check.Errors, record: Record) -> None:
        """Store the errors of a check; the record becomes ``wrong`` if one exceeds its limit."""
        record.errors[name] = _finite(errors)
        violation = check.tolerance_violation(errors, record.case.dtype)
        if violation is not None and record.status == "ok":
            record.status, record.reason = "wrong", violation

    def _check_unchanged(
        self, before: check.Tensors, after: check.Tensors, message: str, record: Record
    ) -> None:
        """Make the record ``wrong``, without its times, if checksums differ on any rank."""
        changed = self.control.all_gather(check.changed_tensor(before, after, record.case.dtype))
        names = [name for name in changed if name]
        if names and record.status == "ok":
            record.status, record.reason = "wrong", f"{message} {names[0]}"
            record.times_us, record.exposure_us, self.timelines = {}, {}, None

    def _measure(
        self,
        workload: timing.Workload,
        record: Record,
        checked: check.Tensors,
        settings: MeasureSettings,
        earlier_us: Sequence[float] = (),
    ) -> None:
        """Measure times, memory, traffic and flags of every rank, and check that the last timed
        call returned results with the checksums ``checked``."""
        device, control = self._device, self.control
        self._report_phase("measure")
        flags = set(device.flags(self._local_world_size))
        start = time.time()
        own_timing = timing.measure_time(
            workload, device, self._comm, control, settings, earlier_us
        )
        if self.telemetry is not None:
            record.telemetry = control.all_gather(self.telemetry.between(start, time.time()))
        flags.update(device.flags(self._local_world_size))
        if not (settings.check_small and settings.check_sampled):
            flags.add(UNCHECKED)
        timed = check.checksums(workload.results)
        memory: dict[str, int] = {}
        if settings.memory:
            self._report_phase("memory")
            memory = timing.measure_memory(workload, device, self._comm, control)
            memory |= workload.predicted_peak()
        workload.reset()
        predicted = workload.predicted_bytes()
        ranks = control.all_gather((own_timing, memory, sorted(flags), predicted))
        timings: list[timing.Timing] = [rank_timing for rank_timing, *_ in ranks]
        record.times_us = {p: [t.times_us[p] for t in timings] for p in workload.phases}
        record.pace_us = [t.pace_us for t in timings if t.pace_us]
        traffic = {p: [t.traffic[p] for t in timings] for p in workload.phases}
        per_node = record.ranks_per_node
        record.bytes_sent = {p: [t.bytes_sent for t in traffic[p]] for p in traffic}
        record.bytes_across = {
            p: [t.bytes_across_nodes(rank, per_node) for rank, t in enumerate(traffic[p])]
            for p in traffic
        }
        record.messages = {p: [t.messages for t in traffic[p]] for p in traffic}
        record.largest_message = {p: max(t.largest_message for t in traffic[p]) for p in traffic}
        record.predicted_bytes = {p: [nbytes[p] for *_, nbytes in ranks] for p in predicted}
        record.memory_bytes = {kind: [nbytes[kind] for _, nbytes, *_ in ranks] for kind in memory}
        rank_flags = {flag for *_, flags_of_rank, _ in ranks for flag in flags_of_rank}
        record.flags = sorted({*record.flags, *rank_flags})
        if predicted and record.predicted_bytes != record.bytes_sent:
            record.flags.append("mispredicted")
        changed = "a timed call returned a result that differs from the checked one:"
        self._check_unchanged(checked, timed, changed, record)


def recipe_of(case: Case) -> Recipe:
    """The recipe of a case's inputs."""
    return Recipe(case.seed, case.inputs)


def _finite(errors: check.Errors) -> dict[str, dict[str, float | None]]:
    """The errors with infinite and undefined ones as None, since JSON has neither."""
    return {
        tensor: {metric: x if math.isfinite(x) else None for metric, x in metrics.items()}
        for tensor, metrics in errors.items()
    }
