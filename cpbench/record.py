"""What is kept of one case: a :class:`Record`, one JSON object on one line.

There are no sentinel numbers: what was not measured is absent or null, and ``status`` says why.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cpbench.problem import Case

SCHEMA = 1
STATUSES = ("ok", "unsupported", "oom", "wrong", "crash", "timeout")
FAILURES = ("wrong", "crash", "timeout")


@dataclass(kw_only=True)
class Record:
    """One attempt at one case.

    Attributes:
        case: what was asked for.
        status: one of ``STATUSES``; ``reason`` says why when it is not ok.
        errors: largest error of each tensor over ranks and checks, see ``cpbench.check``:
            ``{"small"|"sampled": {"out": {"rel_l2": …, "max_rms": …}, …}}``.
        times_us: microseconds by phase (``fwd``, ``bwd``) as ``[rank][iteration]``.
        plan_us, first_call_us: planning, and the first call (with compilation), slowest rank.
        flops: by phase, from the mask's exact area, all ranks together.
        area: visible pairs of the mask per head.
        balance: visible pairs of each rank's queries.
        memory_bytes: by kind, ``[rank]``: ``inputs``, ``peak`` (on top of inputs), and on GPUs
            ``reserved`` and ``device``.
        bytes_sent: by phase, ``[rank]``, counted at the transport.
        messages: by phase, ``[rank]``.
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
    plan_us: float | None = None
    first_call_us: float | None = None
    flops: dict[str, int] = field(default_factory=dict)
    area: int | None = None
    balance: list[int] | None = None
    memory_bytes: dict[str, list[int]] = field(default_factory=dict)
    bytes_sent: dict[str, list[int]] = field(default_factory=dict)
    messages: dict[str, list[int]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    environment: str | None = None
    started: float = 0.0
    seconds: float = 0.0
    writer: str = ""
    log: str | None = None
    schema: int = SCHEMA

    @property
    def samples_us(self) -> list[float]:
        """Per iteration: all phases of a rank added up, the slowest rank taken."""
        return slowest_us(self.times_us, tuple(self.times_us))

    @property
    def median_us(self) -> float | None:
        samples = self.samples_us
        return statistics.median(samples) if samples else None

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
        known = {item.name for item in fields(cls)}
        values = {key: value for key, value in table.items() if key in known}
        values["case"] = Case.from_json(values["case"])
        if values["status"] not in STATUSES:
            raise ValueError(f"unknown status {values['status']!r}")
        return cls(**values)


def slowest_us(
    times_us: Mapping[str, Sequence[Sequence[float]]], phases: Sequence[str]
) -> list[float]:
    """Per iteration, the slowest rank's time over ``phases`` together."""
    if not phases:
        return []
    per_rank = [
        [sum(parts) for parts in zip(*ranks, strict=True)]
        for ranks in zip(*(times_us[phase] for phase in phases), strict=True)
    ]
    return [max(iteration) for iteration in zip(*per_rank, strict=True)]


def relative_half_width(samples: Sequence[float]) -> float | None:
    """Half-width of the 95 % confidence interval of the median, relative to the median.

    Distribution-free, from order statistics (binomial, normal approximation); None below six
    samples, where no pair of order statistics covers 95 %.
    """
    n = len(samples)
    if n < 6:
        return None
    ordered = sorted(samples)
    spread = 1.96 * math.sqrt(n) / 2
    low = max(math.floor(n / 2 - spread), 0)
    high = min(math.ceil(n / 2 + spread), n - 1)
    middle = statistics.median(ordered)
    return (ordered[high] - ordered[low]) / 2 / middle if middle else None
