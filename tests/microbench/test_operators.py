"""The cases of a sweep as benchmarks of pytest-benchmark, checked and timed by cpbench."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from cpbench.core.problem import Case
from cpbench.worker.evaluate import Evaluator

_now_s = 0.0


def cpbench_clock() -> float:
    """The clock of pytest-benchmark: the sum of cpbench's samples so far, in seconds.  So its
    figures are those samples: after warmup, with a flushed cache, by CUDA events on a GPU."""
    return _now_s


@pytest.mark.benchmark(timer=cpbench_clock)
def test_operator(case: Case, evaluator: Evaluator, benchmark: Any) -> None:
    record = evaluator.evaluate(case)
    if record.status == "unsupported":
        pytest.skip(record.reason or "")
    assert record.status == "ok", record.reason
    samples = chain(record.samples_us)

    def advance_clock() -> None:
        global _now_s
        _now_s += next(samples) / 1e6

    benchmark.group = f"{case.mask} {case.label.partition(str(case.mask))[2].strip()}"
    benchmark.extra_info.update(
        case=case.id, tflops=record.tflops_per_rank, worst_error=record.worst_error,
        peak_bytes=record.peak_bytes, noise=record.noise, flags=record.flags, **record.quality,
    )  # fmt: skip
    benchmark.pedantic(advance_clock, rounds=record.iterations, iterations=1)
