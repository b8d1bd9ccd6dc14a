"""One case on one rank: refuse or prepare, check, measure; every rank ends with the same record.

All ranks go through the same steps; what one of them learns (a refusal, an error, its times) is
gathered, so that they agree on what comes next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cpbench import check, masks, measure
from cpbench import layout as layouts
from cpbench.api import Attention
from cpbench.operator import Unsupported
from cpbench.problem import Case
from cpbench.record import Record
from cpbench.settings import MeasureSettings

if TYPE_CHECKING:
    from cpbench.comm import Comm, Control
    from cpbench.device import Device
    from cpbench.layout import Layout
    from cpbench.mask import AttnMask
    from cpbench.problem import Problem


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
        self._device, self._comm, self._control = device, comm, control
        self._settings, self._ranks_here, self._note = settings, ranks_here, note

    def record(self, case: Case) -> Record:
        """The record of a case, without what only the writer knows (times of day, environment)."""
        self._note("prepare")
        work, record = self._prepared(case)
        if work is None:
            return record
        inputs = check.make_inputs(
            case.problem, work.layout.positions(self._comm.rank), case.seed, self._device.type
        )
        self._check(case, work, inputs, record)
        if record.status == "ok" and self._settings.time:
            self._measure(work, inputs, record)
        return record

    def _attention(self, case: Case, mask: AttnMask, layout: Layout, problem: Problem) -> Attention:
        return Attention(
            case.operator, case.strategy, mask, layout, problem, self._comm.rank, self._device.type
        )

    def _prepared(self, case: Case) -> tuple[Attention | None, Record]:
        """The computation and a record begun; None when some rank refuses."""
        begun = time.perf_counter()
        work, refusal = None, None
        mask = masks.build(case.mask, case.seq_len)
        layout = layouts.build(case.layout, case.seq_len, self._comm.size)
        try:
            work = self._attention(case, mask, layout, case.problem)
        except Unsupported as error:
            refusal = str(error)
        plan_us = (time.perf_counter() - begun) * 1e6
        answers = self._control.gather((refusal, plan_us, work.digest if work else None))
        refusals = [reason for reason, _, _ in answers if reason]
        if refusals:
            return None, Record(case=case, status="unsupported", reason=refusals[0])
        if len({digest for _, _, digest in answers}) > 1:
            raise RuntimeError(f"ranks disagree on the problem: {answers}")
        flops = case.problem.flops(mask.area)
        record = Record(
            case=case,
            status="ok",
            plan_us=max(us for _, us, _ in answers),
            area=mask.area,
            balance=layout.area_matrix(mask).sum(axis=1).tolist(),
            flops={phase: flops[phase] for phase in case.direction.split("_")},
        )
        return work, record

    def _check(self, case: Case, work: Attention, inputs: dict[str, Any], record: Record) -> None:
        """Both checks of :mod:`cpbench.check`; the record becomes ``wrong`` when one fails."""
        device = self._device.type
        errors: dict[str, check.Errors] = {}
        if self._settings.check_small:
            self._note("check")
            errors["small"] = check.small(
                lambda mask, layout, problem: self._attention(case, mask, layout, problem),
                work.mask, case.problem, self._comm.size, case.layout.name, case.seed, device,
                self._comm, self._control, self._comm.rank,
            )  # fmt: skip
        if self._settings.check_sampled and case.seq_len > check.SMALL_TOKENS:
            self._note("check at size")
            errors["sampled"] = check.sampled(
                work, inputs, case.seed, device, self._comm, self._control
            )
        verdicts = [check.verdict(found, case.dtype) for found in errors.values()]
        wrong = [verdict for verdict in verdicts if verdict is not None]
        if wrong:
            record.status, record.reason = "wrong", wrong[0]
        record.errors = _finite(errors)

    def _measure(self, work: Attention, inputs: dict[str, Any], record: Record) -> None:
        """Times, memory, traffic and caveats of every rank."""
        workload = measure.Workload(work, inputs, self._comm)
        self._note("measure")
        flags = set(self._device.flags(self._ranks_here))
        timing = measure.measure_time(
            workload, self._device, self._comm, self._control, self._settings
        )
        flags.update(self._device.flags(self._ranks_here))
        memory = {"inputs": sum(x.nbytes for x in inputs.values())}
        if self._settings.memory:
            self._note("memory")
            memory.update(measure.measure_memory(workload, self._device, self._comm, self._control))
        ranks = self._control.gather((timing, memory, sorted(flags)))
        timings: list[measure.Timing] = [timing for timing, _, _ in ranks]
        record.times_us = {p: [t.times_us[p] for t in timings] for p in workload.phases}
        record.first_call_us = max(t.first_call_us for t in timings)
        record.bytes_sent = {p: [t.bytes_sent[p] for t in timings] for p in workload.phases}
        record.messages = {p: [t.messages[p] for t in timings] for p in workload.phases}
        record.memory_bytes = {kind: [m[kind] for _, m, _ in ranks] for kind in memory}
        record.flags = sorted({flag for _, _, found in ranks for flag in found})


def _finite(errors: dict[str, check.Errors]) -> dict[str, dict[str, dict[str, float | None]]]:
    """JSON has no infinity: an infinite or undefined error is null."""
    return {
        name: {
            tensor: {metric: x if math.isfinite(x) else None for metric, x in metrics.items()}
            for tensor, metrics in tensors.items()
        }
        for name, tensors in errors.items()
    }
