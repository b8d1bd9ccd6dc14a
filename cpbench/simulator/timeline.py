"""Timelines of simulated ranks, in the format of the measured ones (``cpbench run --trace``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cpbench.measure.timeline_slices import (
    COMPUTE,
    PHASE,
    TRANSFER,
    WAITING,
    RankTimeline,
    TimelineSlice,
    chrome_trace,
)
from cpbench.simulator.cluster import Costs, KernelCosts
from cpbench.simulator.replay import RankTimes, Span


def timeline(
    phases: Mapping[str, Mapping[int, RankTimes]],
    kernel: Costs,
    cluster: str,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """The trace of all replayed ranks, for https://ui.perfetto.dev; a phase begins when the one
    before has ended on all of them.

    Args:
        phases: by phase and rank, of ``replay``.
        kernel: that of the operator; visible pairs are shown as those of the blocks it visits.
        cluster: its name.
        facts: kept in the trace as ``otherData``.
    """
    known = next(iter(phases.values()))
    ranks = {rank: RankTimeline(cluster, "simulated", []) for rank in known}
    start = 0.0
    for phase, times in phases.items():
        for rank, one in times.items():
            whole = TimelineSlice(PHASE, phase, start, start + one.end)
            spans = sorted(one.spans, key=lambda span: span.start)
            ranks[rank].slices += [whole, *(_slice(span, start, kernel) for span in spans)]
        start += max(one.end for one in times.values())
    return chrome_trace(list(ranks.values()), facts)


def _slice(span: Span, start: float, kernel: Costs) -> TimelineSlice:
    row = {"kernel": COMPUTE, "wait": WAITING, "transfer": TRANSFER}[span.kind]
    details = dict(span.details)
    if span.kind == "kernel" and not isinstance(kernel, KernelCosts):
        details["pairs"] = 0  # a mixer has none
    elif isinstance(kernel, KernelCosts) and span.kind == "kernel":
        phase = kernel.fwd if span.name == "fwd" else kernel.bwd
        assert phase is not None
        details["pairs"] = details.pop("blocks") * math.prod(phase.tile)
    return TimelineSlice(row, span.name, start + span.start, start + span.end, None, details)
