"""Timelines of ranks: time per activity, stragglers, and the trace file for Perfetto.

Source of the format: "Trace Event Format", as Chrome and https://ui.perfetto.dev read it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

COMPUTE, WAITING, TRANSFER, PHASE, OTHER = "compute", "waiting", "transfer", "phase", "other"
NVTX_RANGE = "cpbench"  # around the traced passes, for profilers
MIN_DELAY = 0.05  # share of a phase; smaller delays are not reported
MIN_RATIO = 1.1  # of pairs, or of time per pair, to the median rank that explains a delay
MIN_CPU_SHARE = 0.85  # of a thread's compute time that it ran on a core; below it is starved


@dataclass
class TimelineSlice:
    """One activity of one rank, from start to end.

    Attributes:
        row: ``compute``, ``waiting``, ``transfer`` or ``phase``.
        name: shown to people.
        start, end: seconds, on one clock for all ranks.
        cpu_s: CPU seconds of the thread meanwhile; None where that says nothing.
        details: pairs, bytes, peers.
    """

    row: str
    name: str
    start: float
    end: float
    cpu_s: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class RankTimeline:
    """The slices of one rank in order of their start, with its host and device.

    Attributes:
        uncertainty: seconds by which its clock may differ from rank 0's.
    """

    host: str
    device: str
    slices: list[TimelineSlice]
    uncertainty: float = 0.0

    def thread_slices(self, phase: str) -> tuple[TimelineSlice, list[TimelineSlice]]:
        """The slice of a phase and those of its thread, with gaps filled by ``other``."""
        (whole,) = (s for s in self.slices if s.row == PHASE and s.name == phase)
        recorded = [
            s for s in self.slices
            if s.row in (COMPUTE, WAITING) and whole.start <= s.start < whole.end
        ]  # fmt: skip
        filled, reached = list[TimelineSlice](), whole.start
        for item in recorded:
            if item.start > reached:
                filled.append(TimelineSlice(OTHER, "pack, merge, post", reached, item.start))
            filled.append(item)
            reached = max(reached, item.end)
        if whole.end > reached:
            filled.append(TimelineSlice(OTHER, "pack, merge, post", reached, whole.end))
        return whole, filled

    def transfers(self, phase: str) -> list[TimelineSlice]:
        """The transfers posted in a phase."""
        whole, _ = self.thread_slices(phase)
        return [s for s in self.slices if s.row == TRANSFER and whole.start <= s.start < whole.end]


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of one rank in one phase by activity, and what explains them.

    Attributes:
        whole: the phase, which is the sum of ``compute``, ``other`` and ``waiting``.
        transfer: time with at least one transfer in flight.
        pairs: visible pairs that were computed, each once per query head.
        cpu_share: share of ``compute`` during which the thread ran on a core; None where that
            says nothing.
        end: time at which the phase ended.
    """

    whole: float
    compute: float
    other: float
    waiting: float
    transfer: float
    pairs: int
    cpu_share: float | None
    end: float

    @property
    def busy(self) -> float:
        return self.compute + self.other


def phases(ranks: Sequence[RankTimeline]) -> list[str]:
    """Names of the traced phases, in order."""
    return [item.name for item in ranks[0].slices if item.row == PHASE]


def phase_times(ranks: Sequence[RankTimeline], phase: str) -> list[PhaseTimes]:
    """The time per activity of every rank in a phase."""
    times = []
    for rank in ranks:
        whole, thread = rank.thread_slices(phase)
        seconds = {row: sum(s.seconds for s in thread if s.row == row)
                   for row in (COMPUTE, OTHER, WAITING)}  # fmt: skip
        computing = [s for s in thread if s.row == COMPUTE]
        cpu_s = [s.cpu_s for s in computing if s.cpu_s is not None]
        cpu_share = sum(cpu_s) / seconds[COMPUTE] if cpu_s and seconds[COMPUTE] else None
        times.append(
            PhaseTimes(
                whole.seconds, seconds[COMPUTE], seconds[OTHER], seconds[WAITING],
                _covered_seconds(rank.transfers(phase)),
                sum(s.details["pairs"] for s in computing), cpu_share, whole.end,
            )
        )  # fmt: skip
    return times


def straggler_lines(ranks: Sequence[RankTimeline]) -> list[str]:
    """A line per phase: the straggler, by how much it is late and why; or that there is none."""
    return [_straggler_line(ranks, phase) for phase in phases(ranks)]


def _straggler_line(ranks: Sequence[RankTimeline], phase: str) -> str:
    """Ranks that exchange data end together even when one has more to compute, so the straggler is
    the rank that is busy longest, unless some rank ends later because it waits."""
    times = phase_times(ranks, phase)
    whole = max(rank.whole for rank in times)
    busiest = max(range(len(times)), key=lambda r: times[r].busy)
    last = max(range(len(times)), key=lambda r: times[r].end)
    extra_wait = times[last].waiting - _median_of_others(times, last, lambda t: t.waiting)
    delay = times[last].end - _median_of_others(times, last, lambda t: t.end)
    extra_busy = times[busiest].busy - _median_of_others(times, busiest, lambda t: t.busy)
    if delay > MIN_DELAY * whole and extra_wait > delay / 2:
        return (
            f"{phase}: {_rank_label(ranks, last)} ends {_in_ms(delay)} after the others, of "
            f"{_in_ms(whole)}: it waits {_in_ms(extra_wait)} longer, mostly "
            f"{_longest_wait(ranks[last], phase)}"
        )
    if extra_busy <= MIN_DELAY * whole:
        longest_wait = max(rank.waiting for rank in times)
        return f"{phase}: no straggler; ranks wait up to {_in_ms(longest_wait)}"
    return (
        f"{phase}: {_rank_label(ranks, busiest)} is busy {_in_ms(extra_busy)} longer than the "
        f"others, of {_in_ms(whole)}: {_delay_cause(times, busiest)}"
    )


def _median_of_others(
    times: Sequence[PhaseTimes], rank: int, figure: Callable[[PhaseTimes], float]
) -> float:
    """The median of a figure over all other ranks; the rank's own where there is no other."""
    others = [figure(peer) for number, peer in enumerate(times) if number != rank]
    return statistics.median(others) if others else figure(times[rank])


def _delay_cause(times: Sequence[PhaseTimes], rank: int) -> str:
    """Why a rank is busy longer than the others."""
    own = times[rank]
    pairs = _median_of_others(times, rank, lambda t: t.pairs)
    per_pair = _median_of_others(times, rank, lambda t: t.compute / t.pairs if t.pairs else 0.0)
    slowdown = own.compute / own.pairs / per_pair if own.pairs and per_pair else 1.0
    causes = []
    if own.pairs > MIN_RATIO * pairs:
        ratio = f"{own.pairs / pairs:.2f}x the pairs" if pairs else "all of the pairs"
        causes.append(f"it computes {ratio}")
    if slowdown > MIN_RATIO:
        starved = own.cpu_share is not None and own.cpu_share < MIN_CPU_SHARE
        share = f", on a core for {own.cpu_share:.0%} of the time" if starved else ""
        causes.append(f"it is {'starved' if starved else 'slow'}: {slowdown:.2f}x the time per "
                      f"pair{share}")  # fmt: skip
    others = _median_of_others(times, rank, lambda t: t.other)
    if not causes and own.other > others:
        causes.append(f"it packs and merges {_in_ms(own.other - others)} longer")
    return "; ".join(causes) or "it computes slightly longer throughout"


def _longest_wait(rank: RankTimeline, phase: str) -> str:
    waits = [s for s in rank.thread_slices(phase)[1] if s.row == WAITING]
    longest = max(waits, key=lambda s: s.seconds, default=None)
    if longest is None:
        return "for no single transfer"
    peers = ", ".join(longest.details.get("receives", ()))
    return longest.name.removeprefix("wait ") + (f" from rank {peers}" if peers else "")


def _rank_label(ranks: Sequence[RankTimeline], rank: int) -> str:
    return f"rank {rank} ({ranks[rank].host}, {ranks[rank].device})"


def _in_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _covered_seconds(slices: Iterable[TimelineSlice]) -> float:
    """Seconds covered by at least one of the slices."""
    total, reached = 0.0, float("-inf")
    for item in sorted(slices, key=lambda s: s.start):
        total += max(item.end - max(item.start, reached), 0.0)
        reached = max(reached, item.end)
    return total


def chrome_trace(ranks: Sequence[RankTimeline], metadata: dict[str, Any]) -> dict[str, Any]:
    """The trace in Perfetto's format: a process per rank, with rows for phases, its thread and
    transfers; overlapping transfers get rows of their own."""
    zero = min(item.start for rank in ranks for item in rank.slices)
    events: list[dict[str, Any]] = []
    for number, rank in enumerate(ranks):
        rows = {"phase": 0, "compute": 1, "waiting": 2}
        shown = [(rows["phase"], s) for s in rank.slices if s.row == PHASE]
        for phase in phases(ranks):
            shown += [
                (rows["waiting" if s.row == WAITING else "compute"], s)
                for s in rank.thread_slices(phase)[1]
            ]
        row_ends: list[float] = []  # of the last transfer in each transfer row
        for item in (s for s in rank.slices if s.row == TRANSFER):
            free = (i for i, end in enumerate(row_ends) if end <= item.start)
            index = next(free, len(row_ends))
            row_ends[index : index + 1] = [item.end]
            rows[f"transfer {index + 1}" if index else "transfer"] = 3 + index
            shown.append((3 + index, item))
        names = [("process_name", 0, {"name": f"rank {number}: {rank.host}, {rank.device}"}),
                 ("process_sort_index", 0, {"sort_index": number})]  # fmt: skip
        for name, row in rows.items():
            names += [("thread_name", row, {"name": name}),
                      ("thread_sort_index", row, {"sort_index": row})]  # fmt: skip
        events += [{"ph": "M", "pid": number, "tid": row, "name": name, "args": args}
                   for name, row, args in names]  # fmt: skip
        events += [
            {
                "ph": "X", "pid": number, "tid": row, "name": item.name, "cat": item.row,
                "ts": round((item.start - zero) * 1e6, 3), "dur": round(item.seconds * 1e6, 3),
                "args": item.details,
            }
            for row, item in shown
        ]  # fmt: skip
    uncertainty_us = [round(rank.uncertainty * 1e6, 3) for rank in ranks]
    facts = {**metadata, "stragglers": straggler_lines(ranks), "clocks within us": uncertainty_us}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": facts}
