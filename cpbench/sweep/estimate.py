"""What cases will cost, before they are run: for the order of a sweep, its hours, what cannot fit.

Time comes from records of the same contender, scaled by FLOPs, where there are any; else from a
rate that is a guess (``GUESSED_TFLOPS``) and only good for sorting and for the size of a bill.
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

GUESSED_TFLOPS = {"cpu": 0.03, "cuda": 150.0}  # of a rank, on what a mask leaves
OVERHEAD_S = {"cpu": 1.0, "cuda": 2.0}  # checks and preparation of a case
HOPELESS = 2.0  # times the timeout, for one pass: by then the estimate may be half wrong

Key = tuple[object, ...]


class Estimator:
    """Estimates for the cases of a run.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        settings: how they will be measured.
        folders: run directories whose records tell rates.
    """

    def __init__(self, device: str, settings: MeasureSettings, folders: Iterable[Path]) -> None:
        self._device, self._settings = device, settings
        self._known: dict[Key, list[tuple[float, float]]] = {}
        for folder in folders:
            for record in read_run(folder).records.values():
                self._learn(record)

    def _learn(self, record: Record) -> None:
        if record.median_us and record.flops and record.conditions.get("device") == self._device:
            flops = sum(record.flops.values()) / record.case.world_size
            rate = flops / record.median_us * 1e6
            self._known.setdefault(_method(record.case), []).append((math.log(flops), rate))

    def flops(self, case: Case) -> float:
        """Of one pass over all phases, all ranks together."""
        share = (case.queries or case.seq_len) / case.seq_len
        by_phase = case.problem.flops(_area(case.mask, case.seq_len, case.num_heads_q) * share)
        return float(sum(by_phase[phase] for phase in case.direction.split("_")))

    def rate(self, case: Case) -> float | None:
        """FLOP/s of a rank from the record nearest in size; None without records."""
        known = self._known.get(_method(case))
        if not known:
            return None
        size = math.log(max(self.flops(case) / case.world_size, 1.0))
        nearest = min(abs(at - size) for at, _ in known)
        return statistics.median(rate for at, rate in known if abs(at - size) <= nearest + 0.1)

    def pass_seconds(self, case: Case) -> float:
        """One pass over all phases."""
        rate = self.rate(case) or GUESSED_TFLOPS[self._device] * 1e12
        return self.flops(case) / case.world_size / rate

    def seconds(self, case: Case) -> float:
        """The whole case: checks, warm-up, iterations, every launch."""
        settings, each = self._settings, self.pass_seconds(case)
        fixed = OVERHEAD_S[self._device] + 3 * each  # first call, check at size, memory
        if not settings.time:
            return fixed
        wanted = settings.max_seconds / max(each, 1e-6)
        count = min(max(wanted, settings.min_iterations), settings.max_iterations)
        once = fixed + (settings.warmup + count) * each * settings.interleave
        if settings.exposure and case.world_size > 1:
            once += max(settings.max_seconds, 3 * each)
        return once * settings.launches

    def hopeless(self, case: Case) -> str | None:
        """Why a case would surely meet its timeout, by its own method's records, or None."""
        if self.rate(case) is None:
            return None
        each, limit = self.pass_seconds(case), self._settings.timeout_s
        if each <= HOPELESS * limit:
            return None
        return f"not run: about {each:.0f} s a pass by earlier records, and timeout_s is {limit:g}"

    def words(self, cases: Sequence[Case]) -> str:
        """Where the estimates of some cases come from."""
        told = sum(self.rate(case) is not None for case in cases)
        return (
            f"times of {told} estimated from records, of {len(cases) - told} from a guessed "
            f"{GUESSED_TFLOPS[self._device]:g} TFLOP/s a rank"
        )


def _method(case: Case) -> Key:
    return (*case.contender_key, case.dtype, case.direction, case.mask.name, case.world_size)


@functools.lru_cache(maxsize=4096)
def _area(mask: Spec, seq_len: int, heads: int) -> float:
    """Visible pairs of a mask, a head on average."""
    return float(masks.build_heads(mask, seq_len, heads).area)


def least_bytes(case: Case) -> int:
    """What a rank holds at least, on average: its shards of q, k, v and out, and with a backward
    pass of their gradients."""
    tokens_q, tokens_k = case.queries or case.seq_len, case.seq_len
    item = DTYPE_BYTES[case.dtype] * case.head_dim * case.batch
    q, kv = tokens_q * case.num_heads_q * item, 2 * tokens_k * case.num_heads_kv * item
    once = 2 * q + kv
    return (once if case.direction == "fwd" else 2 * once) // case.world_size


def too_large(case: Case, capacity: int | None, source: str) -> str | None:
    """Why a case cannot fit into ``capacity`` bytes a rank, or None."""
    needed = least_bytes(case)
    if capacity is None or needed <= capacity:
        return None
    return (
        f"not run: a rank's tensors alone take {needed / 2**30:.1f} GiB, and there are "
        f"{capacity / 2**30:.1f} ({source})"
    )


def ordered(cases: Sequence[Case], estimates: Estimator, interleave: bool) -> list[Case]:
    """Cases in an order that shows much early: first the cheapest of each contender, so that a
    broken one shows at once, then all others by cost.

    Args:
        interleave: keep the contenders of a problem together, problems by cost.
    """
    cost = {case.id: estimates.seconds(case) for case in cases}
    if interleave:
        of_problem: dict[Key, list[Case]] = {}
        for case in cases:
            of_problem.setdefault(case.problem_key, []).append(case)
        groups = sorted(of_problem.values(), key=lambda group: sum(cost[c.id] for c in group))
        return [case for group in groups for case in group]
    by_cost = sorted(cases, key=lambda case: cost[case.id])
    first: dict[Key, str] = {}
    for case in by_cost:
        first.setdefault((*case.contender_key, case.world_size), case.id)
    heads = set(first.values())
    return sorted(by_cost, key=lambda case: case.id not in heads)
