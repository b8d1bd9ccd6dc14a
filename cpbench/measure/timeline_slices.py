"""What ranks did when: its sums, its stragglers, and the file that Perfetto shows.

Source of the format: "Trace Event Format", as Chrome and https://ui.perfetto.dev read it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

COMPUTE, WAITING, TRANSFER, PHASE, OTHER = "compute", "waiting", "transfer", "phase", "other"
RANGE = "cpbench"  # the NVTX range around what is watched, for profilers
EVEN = 0.05  # of a phase: whoever is late by less is not told of
FASTER = 1.1  # more work or a slower pace than the median rank by so much explains lateness
STARVED = 0.85  # of its time that a thread has a processor


@dataclass
class Slice:
    """Something that took a while on one rank.

    Attributes:
        row: ``compute``, ``waiting``, ``transfer`` or ``phase``.
        name: for people.
        start, end: seconds, on one clock for all ranks.
        cpu_s: processor seconds of the thread meanwhile; None where that says nothing.
        about: what more is known: pairs, bytes, peers.
    """

    row: str
    name: str
    start: float
    end: float
    cpu_s: float | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Rank:
    """One rank's slices, in order of their start, and where it is.

    Attributes:
        within: seconds by which its clock may be off rank 0's.
    """

    host: str
    device: str
    slices: list[Slice]
    within: float = 0.0

    def of_phase(self, phase: str) -> tuple[Slice, list[Slice]]:
        """The phase itself, and what its thread did meanwhile; what was none of it is ``other``."""
        (whole,) = (s for s in self.slices if s.row == PHASE and s.name == phase)
        own = [
            s for s in self.slices
            if s.row in (COMPUTE, WAITING) and whole.start <= s.start < whole.end
        ]  # fmt: skip
        found, at = list[Slice](), whole.start
        for one in [*own, Slice(OTHER, "", whole.end, whole.end)]:
            if one.start > at:
                found.append(Slice(OTHER, "pack, merge, post", at, one.start))
            if one.row != OTHER:
                found.append(one)
            at = max(at, one.end)
        return whole, found

    def transfers(self, phase: str) -> list[Slice]:
        """What was under way in a phase."""
        whole, _ = self.of_phase(phase)
        return [s for s in self.slices if s.row == TRANSFER and whole.start <= s.start < whole.end]


@dataclass(frozen=True)
class Sums:
    """Seconds of one rank in one phase, and what explains them.

    Attributes:
        whole: the phase; ``compute``, ``other`` and ``waiting`` add up to it.
        transfer: during which something was under way.
        pairs: visible pairs that were computed, each once for every query head.
        processor: share of ``compute`` during which the thread had a processor; None where that
            says nothing.
        end: when it was through.
    """

    whole: float
    compute: float
    other: float
    waiting: float
    transfer: float
    pairs: int
    processor: float | None
    end: float

    @property
    def busy(self) -> float:
        return self.compute + self.other


def phases(ranks: Sequence[Rank]) -> list[str]:
    """In order."""
    return [one.name for one in ranks[0].slices if one.row == PHASE]


def sums(ranks: Sequence[Rank], phase: str) -> list[Sums]:
    """Of every rank."""
    found = []
    for rank in ranks:
        whole, own = rank.of_phase(phase)
        spent = {row: sum(s.seconds for s in own if s.row == row)
                 for row in (COMPUTE, OTHER, WAITING)}  # fmt: skip
        computing = [s for s in own if s.row == COMPUTE]
        used = [s.cpu_s for s in computing if s.cpu_s is not None]
        share = sum(used) / spent[COMPUTE] if used and spent[COMPUTE] else None
        found.append(
            Sums(
                whole.seconds, spent[COMPUTE], spent[OTHER], spent[WAITING],
                _covered(rank.transfers(phase)), sum(s.about["pairs"] for s in computing),
                share, whole.end,
            )
        )  # fmt: skip
    return found


def stragglers(ranks: Sequence[Rank]) -> list[str]:
    """A line for each phase: who is late, by how much and why; or that nobody is."""
    return [_straggler(ranks, phase) for phase in phases(ranks)]


def _straggler(ranks: Sequence[Rank], phase: str) -> str:
    """Ranks that send to each other end together, however late one of them is with its own work: so
    who is busy longest counts, unless somebody ends later because it waits."""
    found = sums(ranks, phase)
    whole = max(one.whole for one in found)
    slowest = max(range(len(found)), key=lambda r: found[r].busy)
    last = max(range(len(found)), key=lambda r: found[r].end)
    waits = found[last].waiting - _of_others(found, last, lambda one: one.waiting)
    late = found[last].end - _of_others(found, last, lambda one: one.end)
    over = found[slowest].busy - _of_others(found, slowest, lambda one: one.busy)
    if late > EVEN * whole and waits > late / 2:
        return (
            f"{phase}: {_who(ranks, last)} is through {_ms(late)} after the others, of "
            f"{_ms(whole)}: it waits {_ms(waits)} longer, mostly "
            f"{_longest_wait(ranks[last], phase)}"
        )
    if over <= EVEN * whole:
        return f"{phase}: no rank is late; waiting takes up to {_ms(max(s.waiting for s in found))}"
    return (
        f"{phase}: {_who(ranks, slowest)} is busy {_ms(over)} longer than the others, of "
        f"{_ms(whole)}: {_why(found, slowest)}"
    )


def _of_others(found: Sequence[Sums], rank: int, figure: Callable[[Sums], float]) -> float:
    """The median over all ranks but one; that one's own where there is no other."""
    others = [figure(one) for other, one in enumerate(found) if other != rank]
    return statistics.median(others) if others else figure(found[rank])


def _why(found: Sequence[Sums], rank: int) -> str:
    one = found[rank]
    pairs = _of_others(found, rank, lambda other: other.pairs)
    others_pace = _of_others(found, rank, lambda s: s.compute / s.pairs if s.pairs else 0.0)
    pace = one.compute / one.pairs / others_pace if one.pairs and others_pace else 1.0
    reasons = []
    if one.pairs > FASTER * pairs:
        times = f"{one.pairs / pairs:.2f}x the pairs" if pairs else "all of the pairs"
        reasons.append(f"it computes {times}")
    if pace > FASTER:
        starved = one.processor is not None and one.processor < STARVED
        share = f", with a processor for {one.processor:.0%} of the time" if starved else ""
        reasons.append(f"it is {'starved' if starved else 'slow'}: {pace:.2f}x the time a pair"
                       f"{share}")  # fmt: skip
    others = _of_others(found, rank, lambda s: s.other)
    if not reasons and one.other > others:
        reasons.append(f"it packs and merges {_ms(one.other - others)} longer")
    return "; ".join(reasons) or "it computes, a little longer than the others everywhere"


def _longest_wait(rank: Rank, phase: str) -> str:
    waits = [s for s in rank.of_phase(phase)[1] if s.row == WAITING]
    longest = max(waits, key=lambda s: s.seconds, default=None)
    if longest is None:
        return "for nothing in particular"
    peers = ", ".join(longest.about.get("receives", ()))
    return longest.name.removeprefix("wait ") + (f" of rank {peers}" if peers else "")


def _who(ranks: Sequence[Rank], rank: int) -> str:
    return f"rank {rank} ({ranks[rank].host}, {ranks[rank].device})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _covered(slices: Iterable[Slice]) -> float:
    """Seconds in which at least one of them was under way."""
    total, until = 0.0, float("-inf")
    for one in sorted(slices, key=lambda s: s.start):
        total += max(one.end - max(one.start, until), 0.0)
        until = max(until, one.end)
    return total


def chrome_trace(ranks: Sequence[Rank], about: dict[str, Any]) -> dict[str, Any]:
    """The trace as Perfetto takes it: a process for each rank, with rows for phases, its thread
    and transfers; transfers that overlap lie in rows of their own."""
    zero = min(one.start for rank in ranks for one in rank.slices)
    events: list[dict[str, Any]] = []
    for number, rank in enumerate(ranks):
        rows = {"phase": 0, "compute": 1, "waiting": 2}
        shown = [(rows["phase"], s) for s in rank.slices if s.row == PHASE]
        for phase in phases(ranks):
            shown += [
                (rows["waiting" if s.row == WAITING else "compute"], s)
                for s in rank.of_phase(phase)[1]
            ]
        lanes: list[float] = []
        for one in (s for s in rank.slices if s.row == TRANSFER):
            lane = next((i for i, end in enumerate(lanes) if end <= one.start), len(lanes))
            lanes[lane : lane + 1] = [one.end]
            rows[f"transfer {lane + 1}" if lane else "transfer"] = 3 + lane
            shown.append((3 + lane, one))
        names = [("process_name", 0, {"name": f"rank {number}: {rank.host}, {rank.device}"}),
                 ("process_sort_index", 0, {"sort_index": number})]  # fmt: skip
        for name, row in rows.items():
            names += [("thread_name", row, {"name": name}),
                      ("thread_sort_index", row, {"sort_index": row})]  # fmt: skip
        events += [{"ph": "M", "pid": number, "tid": row, "name": name, "args": args}
                   for name, row, args in names]  # fmt: skip
        events += [
            {
                "ph": "X", "pid": number, "tid": row, "name": one.name, "cat": one.row,
                "ts": round((one.start - zero) * 1e6, 3), "dur": round(one.seconds * 1e6, 3),
                "args": one.about,
            }
            for row, one in shown
        ]  # fmt: skip
    clocks = [round(rank.within * 1e6, 3) for rank in ranks]
    told = {**about, "stragglers": stragglers(ranks), "clocks within us": clocks}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": told}
