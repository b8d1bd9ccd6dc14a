"""Cost estimates of cases before they run: order of a sweep, its duration, cases that cannot fit.

Times are scaled by FLOPs from records of the same method, if there are any; else they come from an
assumed rate (``ASSUMED_TFLOPS``), good only for sorting and for the magnitude of the total.
Memory is a lower bound: a rank's shards of the tensors that any method holds.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from cpbench import masks
from cpbench.core import registry
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.core.spec import Spec
from cpbench.kernels.mixers.forms import FORMS, problem_flops
from cpbench.results.contest import turns_needed
from cpbench.results.record import Record
from cpbench.results.store import read_run

ASSUMED_TFLOPS = {"cpu": 0.03, "cuda": 150.0}  # per rank, on the visible pairs
OVERHEAD_S = {"cpu": 1.0, "cuda": 2.0}  # checks and preparation, per case
TURN_OVERHEAD_S = {"cpu": 0.05, "cuda": 0.2}  # of a further turn: plan and inputs
MAX_TURNS_SHARE = 0.3  # of the cost of a problem, that automatic turns may add
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
        if mixer := registry.operator_info(case.operator.name).mixer:
            by_phase = problem_flops(FORMS[mixer], case.problem)
            return float(sum(by_phase[phase] for phase in case.direction.split("_")))
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

    def seconds(self, case: Case, turns: int = 1) -> float:
        """Seconds of the whole case: checks, warmup, iterations, every launch.

        Args:
            turns: in which it is measured.
        """
        settings, pass_s = self._settings, self.pass_seconds(case)
        fixed_s = OVERHEAD_S[self._device] + 3 * pass_s  # first call, check at size, memory
        if not settings.time:
            return fixed_s
        of_turn = settings.of_turn(turns, 0)
        affordable = of_turn.max_seconds / max(pass_s, 1e-6)
        iterations = min(max(affordable, of_turn.min_iterations), of_turn.max_iterations)
        launch_s = fixed_s + turns * (of_turn.warmup + iterations) * pass_s
        launch_s += (turns - 1) * TURN_OVERHEAD_S[self._device]
        if settings.exposure and case.world_size > 1:
            launch_s += max(settings.max_seconds, 3 * pass_s)
        return launch_s * settings.launches

    def turns(self, cases: Sequence[Case]) -> dict[str, int]:
        """The cases that are measured in turn, by id, and in how many turns.

        Automatic turns are for the methods of a problem that run on the device, if there are
        several and turns add at most ``MAX_TURNS_SHARE`` to what they cost.
        """
        settings = self._settings
        if not settings.time or settings.interleave == 1:
            return {}
        if settings.interleave:
            return {case.id: settings.interleave for case in cases}
        contests: dict[Key, list[Case]] = {}
        for case in cases:
            if self._device in registry.operator_info(case.operator.name).devices:
                contests.setdefault(case.problem_key, []).append(case)
        turns: dict[str, int] = {}
        for contest in contests.values():
            count = turns_needed(len(contest))
            alone_s = sum(self.seconds(case) for case in contest)
            in_turn_s = sum(self.seconds(case, count) for case in contest)
            if len(contest) > 1 and in_turn_s <= (1 + MAX_TURNS_SHARE) * alone_s:
                turns |= {case.id: count for case in contest}
        return turns

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
    problem = case.problem
    forward = problem.q_bytes(queries) + problem.kv_bytes(keys) + problem.out_bytes(queries)
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


def order_cases(
    cases: Sequence[Case], estimates: Estimator, turns: Collection[str] = ()
) -> list[Case]:
    """Cases in the order in which to run them: first the cheapest of each method, so that a broken
    method shows at once, then the others by cost.

    Args:
        turns: ids of the cases that are measured in turn: those of a problem stay together.
    """
    cost = {case.id: estimates.seconds(case) for case in cases}
    cheapest: dict[Key, str] = {}
    for case in sorted(cases, key=lambda case: cost[case.id]):
        cheapest.setdefault((*case.method_key, case.world_size), case.id)
    first_ids = set(cheapest.values())
    groups: dict[object, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.problem_key if case.id in turns else case.id, []).append(case)

    def rank(group: list[Case]) -> tuple[bool, float]:
        return first_ids.isdisjoint(case.id for case in group), sum(cost[c.id] for c in group)

    return [case for group in sorted(groups.values(), key=rank) for case in group]
