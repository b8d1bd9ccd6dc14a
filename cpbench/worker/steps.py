"""Times of steps apart from those of the timed calls: the parts of a selector, and the rotation of
the inputs."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from cpbench.inputs.rope import rotation_of
from cpbench.measure.timing import measure_steps
from cpbench.results.record import slowest_us

if TYPE_CHECKING:
    from cpbench.api import Attention
    from cpbench.core.settings import MeasureSettings
    from cpbench.inputs.rope import Rotation
    from cpbench.measure.device.protocol import Device
    from cpbench.measure.timing import Workload
    from cpbench.parallel.comm import Control
    from cpbench.results.record import Record
    from cpbench.verify.check import Tensors


def record_steps(
    work: Attention,
    inputs: Tensors,
    workload: Workload,
    record: Record,
    device: Device,
    control: Control,
    settings: MeasureSettings,
    report_phase: Callable[[str], None],
) -> None:
    """Measure the steps of a case and record them; collective."""

    def times_us(
        phase: str, steps: Mapping[str, Callable[[], object]]
    ) -> dict[str, list[list[float]]]:
        report_phase(phase)
        ranks = control.all_gather(measure_steps(steps, workload, device, control, settings))
        return {name: [rank[name] for rank in ranks] for name in steps}

    one_call = work.info.name == "single"
    if work.op.info.selects and one_call and record.case.direction != "bwd":
        record.parts_us = times_us("selection steps", workload.selection_steps())
    summarise = getattr(work.strategy, "summarise", None)
    if work.op.info.mixer and summarise and record.case.direction != "bwd":
        summaries = functools.partial(summarise, work.inputs_of(inputs), work.plan, work.op)
        record.parts_us = times_us("summaries", {"summarise": summaries})
    if rotation := rotation_of(record.case):
        rotate = functools.partial(_rotate, rotation, work, inputs)
        rope_us = slowest_us(times_us("rope", {"rope": rotate}), ("rope",))
        record.rope_us = statistics.median(rope_us)


def _rotate(rotation: Rotation, work: Attention, inputs: Tensors) -> None:
    """Rotate the queries and keys of this rank once more."""
    world = work.world
    for name, layout in (("q", world.queries), ("k", world.keys)):
        rotation.apply(name, inputs[name], work.problem, layout.positions(work.rank))
