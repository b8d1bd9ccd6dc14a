"""One case on one rank: refuse or prepare, check, measure; every rank ends with the same record.

All ranks go through the same steps; what one of them learns (a refusal, an error, its times) is
gathered, so that they agree on what comes next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cpbench import masks
from cpbench.api import Attention, agree
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.inputs import Recipe
from cpbench.measure import exposure, timeline
from cpbench.measure import timing as measure
from cpbench.parallel.world import World
from cpbench.results.record import APPROXIMATE, Record
from cpbench.verify import at_size as check_at_size
from cpbench.verify import check, quality
from cpbench.verify import selection as check_choice

if TYPE_CHECKING:
    import torch

    from cpbench.measure.device import Device
    from cpbench.measure.telemetry import Telemetry
    from cpbench.measure.timeline_slices import Rank
    from cpbench.parallel.comm import Comm, Control


class Evaluation:
    """Evaluates cases on one rank of a gang.

    Args:
        device, comm, control: of this rank.
        settings: how to measure.
        ranks_here: ranks on this machine.
        note: told the name of each phase as it begins.
    """

    def __init__(
        self,
        device: Device,
        comm: Comm,
        control: Control,
        settings: MeasureSettings,
        ranks_here: int,
        note: Callable[[str], None],
    ) -> None:
        self._device, self._comm, self.control = device, comm, control
        self._settings, self._ranks_here, self._note = settings, ranks_here, note
        self.telemetry: Telemetry | None = None
        self.timeline: list[Rank] | None = None  # of the last case, where it was traced
        # Where nodes have unequal numbers of ranks, no mesh of nodes can be: as one rank a node.
        everywhere = set(control.gather(ranks_here))
        self._per_node = ranks_here if len(everywhere) == 1 else 1
        self._rank = check.Rank(device.type, comm, control)

    def record(self, case: Case, before: Record | None = None) -> Record:
        """The record of a case, without what only the writer knows (times of day, environment).

        Args:
            before: what an earlier turn of the same case gave, to be measured once more.
        """
        self.timeline = None
        if before is not None:
            return self._again(case, before)
        self._note("prepare")
        work, record = self._prepared(case)
        record.conditions = self._settings.conditions(self._device.type)
        if work is None:
            return record
        inputs = check.inputs_of(work, recipe_of(case), self._device.type)
        given = check.fingerprint(inputs)
        workload = measure.Workload(work, inputs, self._comm)
        if self._settings.check_small:
            self._note("check")
            self._judge("small", self._small(case, work), record)
        if self._settings.time:
            self._note("first call")
            first_us = measure.measure_first_call(workload, self._device, self.control)
            record.first_call_us = self.control.slowest(first_us)
        work.op.pairs = 0
        if work.op.info.selects:
            checked = self._choice(work, inputs, record)
        else:
            found = check.run(work, inputs, self._comm)
            record.balance = self._gather(work.op.pairs)
            checked = check.fingerprint(found)
            if self._settings.check_sampled and case.seq_len > check.SMALL_TOKENS:
                self._note("check at size")
                errors = check_at_size.sampled(work, inputs, found, recipe_of(case), self._rank)
                self._judge("sampled", errors, record)
            del found
        if record.status == "ok" and self._settings.time:
            self._measure(workload, record, checked)
            if work.op.info.selects and case.direction != "bwd":
                self._note("parts")
                told = (self._device, self._comm, self.control, self._settings)
                ranks = self.control.gather(measure.measure_parts(workload, *told))
                record.parts_us = {name: [rank[name] for rank in ranks] for name in ranks[0]}
            if record.status == "ok" and work.info.traced:
                self._look_closer(work, inputs, workload, record)
            record.memory_bytes["inputs"] = self._gather(sum(x.nbytes for x in inputs.values()))
        self._hold(given, check.fingerprint(inputs), "the operator overwrote its input", record)
        return record

    def _choice(
        self, work: Attention, inputs: dict[str, torch.Tensor], record: Record
    ) -> check.Tensors:
        """Check what was computed for what an operator chose, and tell what the choice is worth.
        Returns the fingerprint of the results."""
        case = record.case
        found, choice = check_choice.run_and_tell(work, inputs)
        area = sum(branch.seen.area for branch in choice.branches)
        flops = case.problem.flops(area)
        record.flags.append(APPROXIMATE)
        record.area, record.flops = area, {phase: flops[phase] for phase in record.flops}
        if self._settings.check_sampled and case.seq_len > check.CHOOSING_TOKENS:
            self._note("check at size")
            errors = check_choice.sampled(work, inputs, found, choice, case.seed, self._rank)
            self._judge("sampled", errors, record)
        if self._settings.quality and record.status == "ok":
            self._note("quality")
            told = quality.measure(work, inputs, found, choice)
            record.quality = {name: value for name, value in told.items() if math.isfinite(value)}
        return check.fingerprint(found)

    def _look_closer(
        self,
        work: Attention,
        inputs: dict[str, torch.Tensor],
        workload: measure.Workload,
        record: Record,
    ) -> None:
        """Where the time goes: what communication adds, and who does what when."""
        workload.release()
        device, comm, control = self._device, self._comm, self.control
        if self._settings.exposure and comm.size > 1:
            self._note("exposure")
            found = exposure.measure_exposure(work, inputs, device, comm, control, self._settings)
            ranks = control.gather(found)
            record.exposure_us = {
                way: {phase: [rank[way][phase] for rank in ranks] for phase in workload.phases}
                for way in found
            }
        if self._settings.trace:
            self._note("trace")
            self.timeline = timeline.watch(work, inputs, device, comm, control)

    def _again(self, case: Case, record: Record) -> Record:
        """Another turn: more iterations, on inputs and plans made anew, with the same care for what
        they return."""
        if record.status != "ok" or not self._settings.time:
            return record
        self._note("prepare")
        work, fresh = self._prepared(case)
        if work is None:
            return fresh
        inputs = check.inputs_of(work, recipe_of(case), self._device.type)
        checked = check.fingerprint(check.run(work, inputs, self._comm))
        self._measure(measure.Workload(work, inputs, self._comm), fresh, checked)
        if fresh.status != "ok":
            return fresh
        record.turns = [*(record.turns or [record.iterations]), fresh.iterations]
        for phase, ranks in fresh.times_us.items():
            record.times_us[phase] = [
                [*old, *new] for old, new in zip(record.times_us[phase], ranks, strict=True)
            ]
        pairs = zip(record.pace_us, fresh.pace_us, strict=True)
        record.pace_us = [[*old, *new] for old, new in pairs]
        record.flags = sorted({*record.flags, *fresh.flags})
        return record

    def _attention(self, case: Case, world: World) -> Attention:
        return Attention(case.operator, case.strategy, world, self._comm.rank, self._device.type)

    def _gather(self, value: int) -> list[int]:
        return list(self.control.gather(value))

    def _prepared(self, case: Case) -> tuple[Attention | None, Record]:
        """The computation and a record begun; None when some rank refuses."""
        work, refusal = None, None
        begun = time.perf_counter()
        masks.rebuild(case.mask, case.seq_len, case.num_heads_q)
        mask_us = (time.perf_counter() - begun) * 1e6
        deal_us = 0.0
        try:
            begun = time.perf_counter()
            world = World.of_case(case, self._per_node)
            deal_us = (time.perf_counter() - begun) * 1e6
            work = self._attention(case, world)
            # The small problem is refused here too, before any rank sends anything.
            self._small_attention(case, work)
        except ValueError as error:  # Unsupported, or a layout that does not fit
            refusal = str(error)
        answers = self.control.gather(
            (
                refusal,
                mask_us,
                deal_us + work.plan_us if work else 0.0,
                work.digest if work else ("", 0),
            )
        )
        refusals = [reason for reason, *_ in answers if reason]
        if work is None or refusals:
            return None, Record(case=case, status="unsupported", reason=refusals[0])
        agree(self.control, work, [digest for *_, digest in answers])
        flops = case.problem.flops(work.mask.area)
        record = Record(
            case=case,
            status="ok",
            mask_us=max(us for _, us, _, _ in answers),
            plan_us=max(us for _, _, us, _ in answers),
            area=work.mask.area,
            ranks_per_node=work.world.ranks_per_node,
            flops={phase: flops[phase] for phase in case.direction.split("_")},
        )
        return work, record

    def _small_attention(self, case: Case, work: Attention) -> Attention:
        return self._attention(case, check.small_world(work))

    def _small(self, case: Case, work: Attention) -> check.Errors:
        small = self._small_attention(case, work)
        if small.op.info.selects:
            inputs = check.inputs_of(small, recipe_of(case), self._device.type)
            return check_choice.small(small, inputs, self._rank)
        return check.small(small, recipe_of(case), self._rank)

    def _judge(self, name: str, errors: check.Errors, record: Record) -> None:
        """Keep the errors of a check; too large ones make the record ``wrong``."""
        record.errors[name] = _finite(errors)
        verdict = check.verdict(errors, record.case.dtype)
        if verdict is not None and record.status == "ok":
            record.status, record.reason = "wrong", verdict

    def _hold(
        self, before: check.Tensors, after: check.Tensors, words: str, record: Record
    ) -> None:
        """A tensor that changed on any rank makes the record ``wrong``, without its times."""
        changed = self.control.gather(check.changed(before, after, record.case.dtype))
        names = [name for name in changed if name]
        if names and record.status == "ok":
            record.status, record.reason = "wrong", f"{words} {names[0]}"
            record.times_us, record.exposure_us, self.timeline = {}, {}, None

    def _measure(self, workload: measure.Workload, record: Record, checked: check.Tensors) -> None:
        """Times, memory, traffic and caveats of every rank; what the last timed call returned must
        be what was checked."""
        device, control, settings = self._device, self.control, self._settings
        self._note("measure")
        flags = set(device.flags(self._ranks_here))
        begun = time.time()
        timing = measure.measure_time(workload, device, self._comm, control, settings)
        if self.telemetry is not None:
            record.telemetry = control.gather(self.telemetry.between(begun, time.time()))
        flags.update(device.flags(self._ranks_here))
        if not (settings.check_small and settings.check_sampled):
            flags.add("unchecked")
        timed = check.fingerprint(workload.results)
        memory: dict[str, int] = {}
        if settings.memory:
            self._note("memory")
            memory = measure.measure_memory(workload, device, self._comm, control)
            memory |= workload.predicted_peak()
        workload.ready()
        traced = workload.predicted_bytes()
        ranks = control.gather((timing, memory, sorted(flags), traced))
        timings: list[measure.Timing] = [timing for timing, *_ in ranks]
        record.times_us = {p: [t.times_us[p] for t in timings] for p in workload.phases}
        record.pace_us = [t.pace_us for t in timings if t.pace_us]
        sent = {p: [t.traffic[p] for t in timings] for p in workload.phases}
        nodes = record.ranks_per_node
        record.bytes_sent = {p: [t.bytes_sent for t in sent[p]] for p in sent}
        record.bytes_across = {
            p: [t.across(rank, nodes) for rank, t in enumerate(sent[p])] for p in sent
        }
        record.messages = {p: [t.messages for t in sent[p]] for p in sent}
        record.largest_message = {p: max(t.largest for t in sent[p]) for p in sent}
        record.predicted_bytes = {p: [traced[p] for *_, traced in ranks] for p in traced}
        record.memory_bytes = {kind: [m[kind] for _, m, *_ in ranks] for kind in memory}
        record.flags = sorted({*record.flags, *(flag for *_, found, _ in ranks for flag in found)})
        if traced and record.predicted_bytes != record.bytes_sent:
            record.flags.append("mispredicted")
        self._hold(checked, timed, "a timed call returned another result than the checked:", record)


def recipe_of(case: Case) -> Recipe:
    """What a case's inputs are made of."""
    return Recipe(case.seed, case.inputs)


def _finite(errors: check.Errors) -> dict[str, dict[str, float | None]]:
    """JSON has no infinity: an infinite or undefined error is null."""
    return {
        tensor: {metric: x if math.isfinite(x) else None for metric, x in metrics.items()}
        for tensor, metrics in errors.items()
    }
