"""What is kept of one case: a :class:`Record`, one JSON object on one line.

There are no sentinel numbers: what was not measured is absent or null, and ``status`` says why.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cpbench.core.problem import Case

SCHEMA = 2
STATUSES = ("ok", "unsupported", "oom", "wrong", "crash", "timeout")
FEWEST_ROUNDS = 3  # of the exposure, for a spread to be known
TELLING = 0.25  # of communication's time: noise above it and nobody can tell what is hidden
APPROXIMATE = "approximate"  # flag of what an operator that chooses computed
FAILURES = ("wrong", "crash", "timeout")


class SchemaError(ValueError):
    """A record of a version that is not known here."""


@dataclass(frozen=True)
class Exposure:
    """Medians over rounds, in microseconds of the slowest rank.

    Attributes:
        whole_us, compute_us, transfer_us: a run, the same without communication, communication
            alone.
        exposed_us: how much longer a run takes than without; noise may make it negative.
        spread_us: half the width of its 95 % interval (of few rounds, of all of them); None for one
            or two.
    """

    whole_us: float
    compute_us: float
    transfer_us: float
    exposed_us: float
    spread_us: float | None

    @property
    def exposed(self) -> float:
        """Share of the run's time that communication adds."""
        return self.exposed_us / self.whole_us

    @property
    def spread(self) -> float | None:
        """Half the width of the interval of :attr:`exposed`."""
        return None if self.spread_us is None else self.spread_us / self.whole_us

    @property
    def hidden(self) -> float | None:
        """Share of communication that does not show in the run's time; None where noise hides what
        communication does."""
        if self.spread_us is None or self.spread_us > TELLING * self.transfer_us:
            return None
        return 1 - self.exposed_us / self.transfer_us if self.transfer_us else None


@dataclass(kw_only=True)
class Record:
    """One attempt at one case.

    Attributes:
        case: what was asked for.
        status: one of ``STATUSES``; ``reason`` says why when it is not ok.
        errors: largest error of each tensor over ranks and checks, see ``cpbench.verify.check``:
            ``{"small"|"sampled": {"out": {"rel_l2": …, "max_rms": …}, …}}``.
        times_us: microseconds by phase (``fwd``, ``bwd``) as ``[rank][iteration]``.
        parts_us: of operators that choose: microseconds of choosing (``select``), of the kernel's
            plan for what was chosen (``plan``) and of the kernel (``kernel``), as ``times_us`` but
            in iterations of their own; ``fwd`` of ``times_us`` is all three, in one call.
        quality: of operators that choose: what the choice is worth, see ``cpbench.verify.quality``.
        pace_us: ``[rank][iteration]``: processor time of a fixed piece of work around each
            iteration, where processor time was measured; comparisons divide by it.
        exposure_us: rounds that alternate between the run as it is (``whole``), without
            communication (``compute``) and communication alone (``transfer``): by these, then as
            ``times_us``; empty for one rank and where a library does the sending.
        turns: iterations of each turn, in order, where contenders were measured in turn.
        mask_us, plan_us, first_call_us: building the mask, planning (dealing tokens included), and
            the first call at size (with compilation), slowest rank.
        flops: by phase, from ``area``, all ranks together; choosing is not counted.
        area: visible pairs of the mask per head (on average, where heads differ); of operators that
            choose, the pairs they chose.
        balance: visible pairs that each rank computed in one pass over all phases, each counted
            once for every query head; None for operators that choose.
        memory_bytes: by kind, ``[rank]``: ``inputs``; ``plan`` and ``saved`` (held before a pass);
            ``peak`` (on top of those, during one); ``predicted`` (a peak without the operator's
            own temporaries, see ``cpbench.parallel.memory_trace``); on GPUs ``reserved`` and ``device``.
        bytes_sent: by phase, ``[rank]``, counted at the transport.
        bytes_across: of these, those to ranks of other nodes.
        messages: by phase, ``[rank]``; ``largest_message``: bytes of the largest, of any rank.
        predicted_bytes: by phase, ``[rank]``, sent according to the trace of the plan (see
            ``cpbench.parallel.trace``); empty where a library does the sending.
        ranks_per_node: ranks that share a node, for ``bytes_across`` and the strategy's mesh.
        telemetry: ``[rank]``: what the rank's GPU said of itself while it was timed, see
            ``cpbench.measure.telemetry.summary``; ``{"missing": why}`` where there is nothing, empty on
            CPUs.
        conditions: device, threads, and what was asked to be checked and timed.
        flags: caveats, such as ``contended`` or ``oversubscribed``.
        environment: id of an environment record in the same run directory.
        started: seconds since the epoch; ``seconds``: how long the whole case took.
        writer: which worker gang or parent wrote this.
        log: file under the run directory with what the failing rank printed.
    """

    case: Case
    status: str
    reason: str | None = None
    errors: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    times_us: dict[str, list[list[float]]] = field(default_factory=dict)
    parts_us: dict[str, list[list[float]]] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    pace_us: list[list[float]] = field(default_factory=list)
    exposure_us: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    turns: list[int] = field(default_factory=list)
    mask_us: float | None = None
    plan_us: float | None = None
    first_call_us: float | None = None
    flops: dict[str, int] = field(default_factory=dict)
    area: float | None = None
    balance: list[int] | None = None
    memory_bytes: dict[str, list[int]] = field(default_factory=dict)
    bytes_sent: dict[str, list[int]] = field(default_factory=dict)
    bytes_across: dict[str, list[int]] = field(default_factory=dict)
    messages: dict[str, list[int]] = field(default_factory=dict)
    largest_message: dict[str, int] = field(default_factory=dict)
    predicted_bytes: dict[str, list[int]] = field(default_factory=dict)
    ranks_per_node: int = 1
    telemetry: list[dict[str, Any]] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    environment: str | None = None
    started: float = 0.0
    seconds: float = 0.0
    writer: str = ""
    log: str | None = None
    schema: int = SCHEMA

    @property
    def iterations(self) -> int:
        """How many were timed."""
        return max((len(ranks[0]) for ranks in self.times_us.values() if ranks), default=0)

    @property
    def samples_us(self) -> list[float]:
        """Per iteration: the slowest rank's time in each phase, added up."""
        return slowest_us(self.times_us, tuple(self.times_us))

    @property
    def median_us(self) -> float | None:
        samples = self.samples_us
        return statistics.median(samples) if samples else None

    @property
    def paced(self) -> float | None:
        """Median over iterations of the time over the pace; None where no pace was measured."""
        if not self.pace_us:
            return None
        pairs = zip(self.samples_us, slowest_us({"pace": self.pace_us}, ("pace",)), strict=True)
        return statistics.median(time / pace for time, pace in pairs)

    @property
    def exposure(self) -> Exposure | None:
        """Medians over rounds of the slowest rank's times; None where they were not measured."""
        if not self.exposure_us:
            return None
        whole, compute, transfer = (
            slowest_us(self.exposure_us[way], tuple(self.exposure_us[way]))
            for way in ("whole", "compute", "transfer")
        )
        longer = [a - b for a, b in zip(whole, compute, strict=True)]
        low, high = median_interval(longer) or (min(longer), max(longer))
        spread = (high - low) / 2 if len(longer) >= FEWEST_ROUNDS else None
        middle = statistics.median
        return Exposure(middle(whole), middle(compute), middle(transfer), middle(longer), spread)

    @property
    def noise(self) -> float | None:
        """Half-width of the 95 % interval of the median, relative to it."""
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
        """What the rank with the most holds beside its inputs: plan, saved and peak."""
        held = self.memory_bytes
        if "peak" not in held:
            return None
        kinds = [held[kind] for kind in ("plan", "saved", "peak") if kind in held]
        return max(map(sum, zip(*kinds, strict=True)))

    @property
    def worst_error(self) -> float | None:
        """Largest relative L2 error of any tensor in any check (null in JSON is infinite)."""
        found = [e["rel_l2"] for tensors in self.errors.values() for e in tensors.values()]
        return max((math.inf if error is None else error for error in found), default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, keys in order; :meth:`from_json` reads them back."""
        table = asdict(self)
        table["case"] = self.case.to_json()
        return {"kind": "case", "id": self.case.id, **table}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Record:
        """Read back :meth:`to_json`, of this version or an earlier one.

        Raises:
            SchemaError: for a version that is not known.
            AttributeError, KeyError, TypeError, ValueError: for what is no record.
        """
        values = {key: value for key, value in table.items() if key in _FIELDS}
        version = table.get("schema")
        if version not in (1, SCHEMA):
            raise SchemaError(f"schema {version!r} is not known here (1 to {SCHEMA} are)")
        if version == 1:
            _from_version_1(values)
        values["case"] = Case.from_json(values["case"], table.get("id"))
        if values["status"] not in STATUSES:
            raise ValueError(f"unknown status {values['status']!r}")
        values["started"] = float(values.get("started", 0.0))
        return cls(**values)


_FIELDS = frozenset(item.name for item in fields(Record))


def _from_version_1(values: dict[str, Any]) -> None:
    """Version 1 knew no other clocks than these."""
    conditions = dict(values.get("conditions", {}))
    if conditions:
        conditions["clock"] = "events" if conditions.get("device") == "cuda" else "wall"
    values["conditions"], values["schema"] = conditions, SCHEMA


def slowest_us(
    times_us: Mapping[str, Sequence[Sequence[float]]], phases: Sequence[str]
) -> list[float]:
    """Per iteration, the slowest rank's time in each of ``phases``, added up (every phase starts
    at a barrier, so ranks do not make up in one for another)."""
    slowest = [_slowest(times_us[phase]) for phase in phases]
    if len(slowest) == 1:
        return slowest[0]
    return [sum(parts) for parts in zip(*slowest, strict=True)]


def _slowest(ranks: Sequence[Sequence[float]]) -> list[float]:
    if len(ranks) == 1:
        return list(ranks[0])
    return list(map(max, zip(*ranks, strict=True)))


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The nominal 95 % confidence interval of the median.

    Distribution-free, from order statistics (binomial, normal approximation); None below six
    samples, where no pair of order statistics covers 95 %.
    """
    n = len(samples)
    if n < 6:
        return None
    ordered = sorted(samples)
    spread = 1.96 * math.sqrt(n) / 2
    low, high = math.floor(n / 2 - spread), math.ceil(n / 2 + spread)
    return ordered[max(low, 0)], ordered[min(high, n - 1)]


def relative_half_width(samples: Sequence[float]) -> float | None:
    """Half the width of :func:`median_interval` relative to the median; None where it is None."""
    interval = median_interval(samples)
    middle = statistics.median(samples) if samples else 0.0
    return (interval[1] - interval[0]) / 2 / middle if interval and middle else None
