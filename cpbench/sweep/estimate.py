"""Cost estimates of cases before they run: order of a sweep, its duration, cases that cannot fit.

Times are scaled by FLOPs from records of the same method, if there are any; else they come from an
assumed rate (``ASSUMED_TFLOPS``), good only for sorting and for the magnitude of the total.
Memory is a lower bound: a rank's shards of the tensors that any method holds.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from cpbench import masks
from cpbench.core.problem import DTYPE_BYTES, Case
from cpbench.core.settings import MeasureSettings
from cpbench.core.spec import Spec
from cpbench.results.record import Record
from cpbench.results.store import read_run

ASSUMED_TFLOPS = {"cpu": 0.03, "cuda": 150.0}  # per rank, on the visible pairs
OVERHEAD_S = {"cpu": 1.0, "cuda": 2.0}  # checks and preparation, per case
TIMEOUT_MARGIN = 2.0  # factor by which one pass must exceed the timeout: estimates may be 2x off

Key = tuple[object, ...]


class Estimator:
    """Estimates the time of cases.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        settings: how the cases will be measured.
        folders: run directories whose records give rates.
    """

    def __init__(self, device: str, settings: MeasureSettings, folders: Iterable[Path]) -> None:
        self._device, self._settings = device, settings
        self._rates: dict[Key, list[tuple[float, float]]] = {}  # log(FLOPs), FLOP/s
        for folder in folders:
            for record in read_run(folder).records.values():
                self._add_record(record)

    def _add_record(self, record: Record) -> None:
        if record.median_us and record.flops and record.conditions.get("device") == self._device:
            flops = sum(record.flops.values()) / record.case.world_size
            rate = flops / record.median_us * 1e6
            self._rates.setdefault(_method_key(record.case), []).append((math.log(flops), rate))

    def flops(self, case: Case) -> float:
        """FLOPs of one pass over all phases, all ranks together."""
        query_share = (case.queries or case.seq_len) / case.seq_len
        area = _mask_area(case.mask, case.seq_len, case.num_heads_q) * query_share
        by_phase = case.problem.flops(area)
        return float(sum(by_phase[phase] for phase in case.direction.split("_")))

    def rate(self, case: Case) -> float | None:
        """FLOP/s per rank, from the records nearest in size; None without records."""
        rates = self._rates.get(_method_key(case))
        if not rates:
            return None
        size = math.log(max(self.flops(case) / case.world_size, 1.0))
        nearest = min(abs(recorded - size) for recorded, _ in rates)
        return statistics.median(
            rate for recorded, rate in rates if abs(recorded - size) <= nearest + 0.1
        )

    def pass_seconds(self, case: Case) -> float:
        """Seconds of one pass over all phases."""
        rate = self.rate(case) or ASSUMED_TFLOPS[self._device] * 1e12
        return self.flops(case) / case.world_size / rate

    def seconds(self, case: Case) -> float:
        """Seconds of the whole case: checks, warmup, iterations, every launch."""
        settings, pass_s = self._settings, self.pass_seconds(case)
        fixed_s = OVERHEAD_S[self._device] + 3 * pass_s  # first call, check at size, memory
        if not settings.time:
            return fixed_s
        affordable = settings.max_seconds / max(pass_s, 1e-6)
        iterations = min(max(affordable, settings.min_iterations), settings.max_iterations)
        launch_s = fixed_s + (settings.warmup + iterations) * pass_s * settings.interleave
        if settings.exposure and case.world_size > 1:
            launch_s += max(settings.max_seconds, 3 * pass_s)
        return launch_s * settings.launches

    def timeout_reason(self, case: Case) -> str | None:
        """Why a case would certainly time out, by records of its own method; None if it may not."""
        if self.rate(case) is None:
            return None
        pass_s, limit = self.pass_seconds(case), self._settings.timeout_s
        if pass_s <= TIMEOUT_MARGIN * limit:
            return None
        return (
            f"not run: about {pass_s:.0f} s per pass, estimated from earlier records, and "
            f"timeout_s is {limit:g}"
        )

    def describe_sources(self, cases: Sequence[Case]) -> str:
        """How many of the estimates come from records."""
        from_records = sum(self.rate(case) is not None for case in cases)
        return (
            f"times of {from_records} cases estimated from records, of "
            f"{len(cases) - from_records} from an assumed "
            f"{ASSUMED_TFLOPS[self._device]:g} TFLOP/s per rank"
        )


def _method_key(case: Case) -> Key:
    return (*case.method_key, case.dtype, case.direction, case.mask.name, case.world_size)


@functools.lru_cache(maxsize=4096)
def _mask_area(mask: Spec, seq_len: int, heads: int) -> float:
    """Visible pairs of a mask, mean over heads."""
    return float(masks.build_heads(mask, seq_len, heads).area)


def min_bytes_per_rank(case: Case) -> int:
    """Lower bound on the memory of a rank, mean over ranks: its shards of q, k, v and out, and for
    a backward pass of their gradients."""
    queries, keys = case.queries or case.seq_len, case.seq_len
    head_bytes = DTYPE_BYTES[case.dtype] * case.head_dim * case.batch
    q, kv = queries * case.num_heads_q * head_bytes, 2 * keys * case.num_heads_kv * head_bytes
    forward = 2 * q + kv
    return (forward if case.direction == "fwd" else 2 * forward) // case.world_size


def oom_reason(case: Case, capacity: int | None, source: str) -> str | None:
    """Why a case cannot fit into the memory of its ranks; None if it may.

    Args:
        capacity: bytes per rank; None if unknown.
        source: where ``capacity`` comes from, for the message.
    """
    min_bytes = min_bytes_per_rank(case)
    if capacity is None or min_bytes <= capacity:
        return None
    return (
        f"not run: the tensors of a rank alone take {min_bytes / 2**30:.1f} GiB, and "
        f"{capacity / 2**30:.1f} GiB are available ({source})"
    )


def order_cases(cases: Sequence[Case], estimates: Estimator, interleave: bool) -> list[Case]:
    """Cases in the order in which to run them: first the cheapest of each method, so that a broken
    method shows at once, then the others by cost.

    Args:
        interleave: keep the methods of a problem together, and sort the problems by cost.
    """
    cost = {case.id: estimates.seconds(case) for case in cases}
    if interleave:
        by_problem: dict[Key, list[Case]] = {}
        for case in cases:
            by_problem.setdefault(case.problem_key, []).append(case)
        groups = sorted(by_problem.values(), key=lambda group: sum(cost[case.id] for case in group))
        return [case for group in groups for case in group]
    by_cost = sorted(cases, key=lambda case: cost[case.id])
    cheapest: dict[Key, str] = {}
    for case in by_cost:
        cheapest.setdefault((*case.method_key, case.world_size), case.id)
    first_ids = set(cheapest.values())
    return sorted(by_cost, key=lambda case: case.id not in first_ids)
