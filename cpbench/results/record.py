"""The record of one case: a :class:`Record`, one JSON object on one line.

There are no sentinel numbers: what was not measured is absent or null, and ``status`` says why.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_type_hints

from cpbench.core.problem import Case
from cpbench.results.validation import check_shapes, checked_values, rule

SCHEMA = 3  # 2: conditions name the clock; 3: lines have a checksum, records a sequence number
STATUSES = ("ok", "unsupported", "oom", "wrong", "crash", "timeout")
MIN_ROUNDS_FOR_SPREAD = 3  # of the exposure measurement
MAX_RELATIVE_SPREAD = 0.25  # of the communication time: above it, overlap cannot be told from noise
UNCHECKED = "unchecked"  # flag: a check was switched off, or did not fit in memory
ATTENTION = "attention"  # what records compute, unless they are of sequence mixers
APPROXIMATE = "approximate"  # flag of results computed by a selector
UNFINISHED = "unfinished"  # flag: written while further turns were to come
LAUNCHES_DIFFER = "launches-differ"  # flag: given on reading, see cpbench.results.launches
# Flags with which a time is not compared with others.
DISQUALIFYING = (UNCHECKED, APPROXIMATE, "more-threads", "async", LAUNCHES_DIFFER)
FAILURES = ("wrong", "crash", "timeout")


class SchemaError(ValueError):
    """A record of an unknown schema version."""


@dataclass(frozen=True)
class Exposure:
    """Exposed communication: medians over rounds, in microseconds of the slowest rank.

    Attributes:
        whole_us, compute_us, transfer_us: the complete pass, the pass without communication, and
            communication alone.
        exposed_us: complete pass minus compute; noise may make it negative.
        spread_us: half-width of its 95 % confidence interval (half the range, below six rounds);
            None below three rounds.
    """

    whole_us: float
    compute_us: float
    transfer_us: float
    exposed_us: float
    spread_us: float | None

    @property
    def exposed(self) -> float:
        """Exposed communication as a fraction of the complete pass."""
        return self.exposed_us / self.whole_us

    @property
    def spread(self) -> float | None:
        """Half-width of the confidence interval of :attr:`exposed`."""
        return None if self.spread_us is None else self.spread_us / self.whole_us

    @property
    def hidden(self) -> float | None:
        """Overlapped communication as a fraction of all communication; None where the spread is too
        large to tell."""
        if self.spread_us is None or self.spread_us > MAX_RELATIVE_SPREAD * self.transfer_us:
            return None
        return 1 - self.exposed_us / self.transfer_us if self.transfer_us else None


@dataclass(kw_only=True)
class Record:
    """One attempt at one case.

    Attributes:
        case: the case.
        status: one of ``STATUSES``; ``reason`` says why when it is not ok.
        errors: largest error of each tensor over ranks, by check, see ``cpbench.core.tolerance``:
            ``{"small"|"sampled"|"tiles": {"out": {"rel_l2": …, "max_rms": …, "bias": …}, …}}``.
        checked: what was checked at the measured size: ``rows`` and ``columns`` compared in
            float64, the share of ``tiles``, and the ``seed`` of the choice.
        fingerprint: of the checked results, by tensor: sums with fixed pseudo-random signs over
            eight sets of heads, and the squared norm (see ``cpbench.verify.fingerprint``).
        times_us: microseconds by phase (``fwd``, ``bwd``) as ``[rank][iteration]``.
        parts_us: of selectors: microseconds of the selection (``select``), of the kernel's plan for
            it (``plan``) and of the kernel (``kernel``), as ``times_us`` but in iterations of their
            own; ``fwd`` of ``times_us`` is all three, in one call.  Of mixers under a scan: those
            of the summaries of a forward phase (``summarise``).
        quality: of selectors: quality of the selection, see ``cpbench.verify.quality``; where
            inputs have needles that are asked for, what is found (there, too).
        delay_us: as ``times_us``: microseconds that the rank's threads were ready and waited for a
            core, summed over threads; empty where the system does not tell.
        host_us: as ``times_us``: microseconds that the host took to queue the phase on a GPU, of
            which the GPU's time is independent unless the case is ``launch-bound``; empty on CPUs.
        pace_us: ``[rank][iteration]``: CPU time of a fixed piece of work around each iteration,
            where CPU time was measured; comparisons divide by it.
        exposure_us: rounds that alternate between the complete pass (``whole``), the pass without
            communication (``compute``) and communication alone (``transfer``): by these, then as
            ``times_us``; empty for one rank and where a library does the sending.
        turns: iterations of each turn, in order, where the methods of a problem were measured in
            turn by the same writer, in a random order each time.
        mask_us, plan_us, first_call_us: building the mask, planning (with the assignment of tokens
            to ranks), and the first call at full size (with compilation), slowest rank.
        rope_us: rotating the queries and keys of a rank by their positions, which no other time
            includes: median over calls, slowest rank; None without a rotation.
        computes: ``"attention"``, or the recurrence of a sequence mixer.
        flops: by phase, all ranks together: of attention from ``area``, where the selection is not
            counted; of mixers those of the recurrence.
        area: visible pairs of the mask per head (mean over heads); of selectors, those selected.
        balance: visible pairs that each rank computed in one pass over all phases, counted once per
            query head; of selectors on several ranks, those that it selected; None for selectors on
            one rank, and for mixers.
        memory_bytes: by kind, ``[rank]``: ``inputs``; ``plan`` and ``saved`` (held before a pass);
            ``held`` (what else the operator keeps); ``peak`` (on top of those, during one);
            ``process`` (as ``peak``, with what torch does not allocate); ``predicted`` (a peak
            without the operator's own temporaries, see ``cpbench.parallel.tracing``); on GPUs
            ``reserved`` and ``device``; where inputs are in host memory, ``host`` and
            ``predicted_host`` (as ``peak`` and ``predicted``, of host memory, of which the others
            have none).
        bytes_sent: by phase, ``[rank]``, counted at the transport.
        bytes_across: of ``bytes_sent``, those to ranks of other nodes.
        messages: by phase, ``[rank]``.
        largest_message: by phase, bytes of the largest message of any rank.
        predicted_bytes: by phase, ``[rank]``: bytes sent according to the trace of the plan (see
            ``cpbench.parallel.tracing``); empty where a library does the sending.
        allgather_bytes: by phase, ``[rank]``: what ``ring_allgather:keep=true`` would send: the
            bound on the keys and gradients of a strategy that sends what the data select; empty for
            others.
        bytes_to_device, bytes_to_host: by phase, ``[rank]``: copied between host memory and the
            device, by strategies whose tensors are in host memory; empty for others.
        predicted_to_device, predicted_to_host: the same according to the trace.
        ranks_per_node: ranks that share a node, for ``bytes_across`` and the strategy's mesh.
        telemetry: ``[rank]``: power, clocks and temperature of the rank's GPU during timing, see
            ``cpbench.measure.telemetry.summarize``; ``{"missing": why}`` where it is not available,
            empty on CPUs.  Of several turns, that with the most samples.
        conditions: device, threads, and whether checks and timing were requested.
        flags: caveats, such as ``contended`` or ``oversubscribed``.
        notes: what flags do not say, ``flag: details``.
        threads_after: ``[rank]``: CPU threads of torch after the case, as the operator left them.
        environment: id of an environment record in the same run directory.
        sequence: number of the record, larger than all that the run directory had when its writer
            was opened: the order of records does not depend on clocks.  None before it is written.
        started: seconds since the epoch.
        seconds: duration of the whole case.
        writer: name of the worker gang, or the parent, that wrote the record.
        log: file under the run directory with the output of the rank that failed.
        schema: version of this format.
    """

    case: Case
    status: str
    reason: str | None = None
    errors: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    checked: dict[str, float] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    times_us: dict[str, list[list[float]]] = field(default_factory=dict)
    parts_us: dict[str, list[list[float]]] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    delay_us: dict[str, list[list[int]]] = field(default_factory=dict)
    host_us: dict[str, list[list[float]]] = field(default_factory=dict)
    pace_us: list[list[float]] = field(default_factory=list)
    exposure_us: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    turns: list[int] = field(default_factory=list)
    mask_us: float | None = None
    plan_us: float | None = None
    first_call_us: float | None = None
    rope_us: float | None = None
    computes: str = ATTENTION
    flops: dict[str, int] = field(default_factory=dict)
    area: float | None = None
    balance: list[int] | None = None
    memory_bytes: dict[str, list[int]] = field(default_factory=dict)
    bytes_sent: dict[str, list[int]] = field(default_factory=dict)
    bytes_across: dict[str, list[int]] = field(default_factory=dict)
    messages: dict[str, list[int]] = field(default_factory=dict)
    largest_message: dict[str, int] = field(default_factory=dict)
    predicted_bytes: dict[str, list[int]] = field(default_factory=dict)
    allgather_bytes: dict[str, list[int]] = field(default_factory=dict)
    bytes_to_device: dict[str, list[int]] = field(default_factory=dict)
    bytes_to_host: dict[str, list[int]] = field(default_factory=dict)
    predicted_to_device: dict[str, list[int]] = field(default_factory=dict)
    predicted_to_host: dict[str, list[int]] = field(default_factory=dict)
    ranks_per_node: int = 1
    telemetry: list[dict[str, Any]] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    threads_after: list[int] = field(default_factory=list)
    environment: str | None = None
    sequence: int | None = field(default=None, compare=False)
    started: float = 0.0
    seconds: float = 0.0
    writer: str = ""
    log: str | None = None
    schema: int = SCHEMA

    def fail_check(self, reason: str) -> None:
        """Make an ok record ``wrong``, without its times."""
        self.status, self.reason = "wrong", reason
        self.times_us, self.exposure_us = {}, {}

    @property
    def order(self) -> tuple[int, float]:
        """Sorts the records of a run directory as they were written; those of earlier versions,
        which have no number, come first, by time."""
        return self.sequence or 0, self.started

    @property
    def iterations(self) -> int:
        """Number of timed iterations."""
        return max((len(ranks[0]) for ranks in self.times_us.values() if ranks), default=0)

    @property
    def samples_us(self) -> list[float]:
        """Per iteration: the slowest rank's time in each phase, added up."""
        return slowest_us(self.times_us, tuple(self.times_us))

    @property
    def disqualifications(self) -> tuple[str, ...]:
        """Why the times may not be compared with those of other methods: the status that is not ok,
        ``untimed``, or flags of ``DISQUALIFYING``; none where they may.

        This is the one definition: an ok result that was timed, with both checks passed, of exact
        attention.
        """
        if self.status != "ok":
            return (self.status,)
        flags = {*self.flags, *(() if self.conditions.get("checked") else (UNCHECKED,))}
        untimed = () if self.times_us else ("untimed",)
        return (*untimed, *(flag for flag in DISQUALIFYING if flag in flags))

    @property
    def turn_medians_us(self) -> list[float]:
        """The median of each turn; that of all iterations, where the case was measured in one."""
        samples, ends = self.samples_us, list(itertools.accumulate(self.turns))
        turns = [samples[end - n : end] for end, n in zip(ends, self.turns, strict=True)]
        return [statistics.median(turn) for turn in turns or [samples] if turn]

    @property
    def median_us(self) -> float | None:
        samples = self.samples_us
        return statistics.median(samples) if samples else None

    @property
    def paced(self) -> float | None:
        """Median over iterations of time divided by pace; None where no pace was measured."""
        if not self.pace_us:
            return None
        pairs = zip(self.samples_us, slowest_us({"pace": self.pace_us}, ("pace",)), strict=True)
        return statistics.median(time / pace for time, pace in pairs)

    @property
    def exposure(self) -> Exposure | None:
        """Exposed communication; None where it was not measured."""
        if not self.exposure_us:
            return None
        whole, compute, transfer = (
            slowest_us(self.exposure_us[variant], tuple(self.exposure_us[variant]))
            for variant in ("whole", "compute", "transfer")
        )
        exposed = [total - alone for total, alone in zip(whole, compute, strict=True)]
        low, high = median_interval(exposed) or (min(exposed), max(exposed))
        spread = (high - low) / 2 if len(exposed) >= MIN_ROUNDS_FOR_SPREAD else None
        median = statistics.median
        return Exposure(median(whole), median(compute), median(transfer), median(exposed), spread)

    @property
    def noise(self) -> float | None:
        """Half-width of the 95 % confidence interval of the median, relative to the median."""
        return relative_half_width(self.samples_us)

    @property
    def tflops_per_rank(self) -> float | None:
        """TFLOP/s per rank over the phases that were timed."""
        median = self.median_us
        if not median or not self.flops:
            return None
        return sum(self.flops.values()) / self.case.world_size / median / 1e6

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory beside the inputs (plan, saved, held and peak together), max over ranks."""
        memory = self.memory_bytes
        if "peak" not in memory:
            return None
        kinds = [memory[kind] for kind in ("plan", "saved", "held", "peak") if kind in memory]
        return max(map(sum, zip(*kinds, strict=True)))

    @property
    def worst_error(self) -> float | None:
        """Largest relative L2 error of any tensor in any check (null in JSON is infinite)."""
        errors = [error["rel_l2"] for tensors in self.errors.values() for error in tensors.values()]
        return max((math.inf if error is None else error for error in errors), default=None)

    def to_json(self) -> dict[str, Any]:
        """A table of plain values, which :meth:`from_json` reads back."""
        table = asdict(self)
        table["case"] = self.case.to_json()
        return {"kind": "case", "id": self.case.id, **table}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Record:
        """Read back :meth:`to_json`, of this version or an earlier one.

        Raises:
            SchemaError: for an unknown version.
            ValueError: for a table that is not a record; the message says why.
        """
        version = table.get("schema")
        if type(version) is not int or not 1 <= version <= SCHEMA:
            raise SchemaError(f"unknown schema {version!r}; this cpbench reads 1 to {SCHEMA}")
        values = checked_values(table, _RULES)
        try:
            if version == 1:
                _upgrade_from_1(values)
            # Before schema 3 no checksum covers the id: it is computed, and must be the same.
            case = Case.from_json(table["case"], table["id"] if version == SCHEMA else None)
            if case.id != table["id"]:
                raise ValueError(f"the id of its case is {case.id}, not {table['id']!r}")
            check_shapes(values, case.world_size)
            status = values["status"]
        except KeyError as error:
            raise ValueError(f"no {error.args[0]}") from None
        if status not in STATUSES:
            raise ValueError(f"unknown status {status!r}")
        values["schema"] = SCHEMA
        if len(values) < len(_RULES):  # of an earlier version
            return cls(case=case, **values)
        record = object.__new__(cls)  # the constructor would take as long as the parser
        vars(record).update(values, case=case)
        return record


_RULES = {name: rule(hint) for name, hint in get_type_hints(Record).items() if name != "case"}


def _upgrade_from_1(values: dict[str, Any]) -> None:
    """Add what schema 2 has: the clock, of which schema 1 had one for each device."""
    conditions = values.get("conditions")
    if conditions:
        clock = "events" if conditions.get("device") == "cuda" else "wall"
        values["conditions"] = {**conditions, "clock": clock}


def slowest_us(
    times_us: Mapping[str, Sequence[Sequence[float]]], phases: Sequence[str]
) -> list[float]:
    """Per iteration, the slowest rank's time in each of ``phases``, summed over phases.

    Every phase starts at a barrier, so a rank cannot make up in one phase for another.
    """
    slowest = [_max_over_ranks(times_us[phase]) for phase in phases]
    if len(slowest) == 1:
        return slowest[0]
    return [sum(phase_times) for phase_times in zip(*slowest, strict=True)]


def _max_over_ranks(times: Sequence[Sequence[float]]) -> list[float]:
    if len(times) == 1:
        return list(times[0])
    return list(map(max, zip(*times, strict=True)))


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The nominal 95 % confidence interval of the median.

    Distribution-free, from order statistics (binomial, normal approximation); None below six
    samples, where no pair of order statistics covers 95 %.
    """
    count = len(samples)
    if count < 6:
        return None
    ordered = sorted(samples)
    half_width = 1.96 * math.sqrt(count) / 2
    low, high = math.floor(count / 2 - half_width), math.ceil(count / 2 + half_width)
    return ordered[max(low, 0)], ordered[min(high, count - 1)]


def relative_half_width(samples: Sequence[float]) -> float | None:
    """Half-width of :func:`median_interval`, relative to the median; None where that is None."""
    interval = median_interval(samples)
    median = statistics.median(samples) if samples else 0.0
    return (interval[1] - interval[0]) / 2 / median if interval and median else None
