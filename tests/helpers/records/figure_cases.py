"""Records to draw figures of, and what was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_records import record, run_of
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from cpbench.core.spec import Spec
from cpbench.reports.collection import Collection, merge_runs
from cpbench.reports.figures import draw as figures
from cpbench.results.prediction import Prediction
from cpbench.results.record import Record

PILE = "causal_document:corpus=pile"


MACHINE = {"host": "node", "processor": "some", "memory_bytes": 64 * 10**9,
           "peaks": {"float32": 2.0, "copy_gb_s": 100.0}}  # fmt: skip


AXES = {
    "throughput": ("tokens", "TFLOP/s per rank"),
    "memory": ("tokens", "peak MB, max per rank", "device limit 32.0 GB"),
    "scaling": ("ranks", "strong scaling", "weak scaling", "efficiency, %"),
    "heatmap": ("tokens", "ranks"),
    "pareto": ("ms at 4k tokens", "peak MB, max per rank", "Pareto front"),
    "quality": ("ms at 4k tokens", "attention recall, %", "Pareto front"),
    "needles": ("tokens", "depth, %", "needles found, %"),
    "needle_counts": ("number of them", "all found, % of queries", "hops of a chain, 4k tokens"),
    "roofline": ("FLOPs per byte", "TFLOP/s per rank", "matrix product 2.00 TFLOP/s",
                 "copy 100 GB/s"),
    "predicted": ("ranks", "ms", "1k tokens"),
    "timeline": ("minutes since the start", "gang-1"),
}  # fmt: skip


HOSTILE = "<b>$x_1$ & %"


def case(operator: str, ms: float | None = None, tflops: float = 0.5, **fields: Any) -> Record:
    """A record on ``MACHINE`` with all that figures show; a failure without ``ms``."""
    fields.setdefault("status", "ok" if ms else "crash")
    peak = fields.pop("peak_mb", 10.0)
    case_record = record(operator, ms, environment="e", **fields)
    case_record.started = case_record.started or 1e9
    case_record.seconds = case_record.seconds or 30.0
    case_record.writer = case_record.writer or "gang-1"
    if ms:
        world_size = case_record.case.world_size
        case_record.flops = {"fwd": round(tflops * ms * 1e9 * world_size)}
        case_record.memory_bytes = {"peak": [round(peak * 1e6)] * world_size}
    return case_record


def collection(*records: Record, **environment: Any) -> Collection:
    run = run_of(*records)
    # Two ranks on the host: each has half of its memory.
    facts = MACHINE | {"ranks": [{"host": "node"}] * 2} | environment
    run.environments = {"e": {"id": "e", **facts}}
    timed = [one for one in records if one.median_us]
    run.predictions = {one.case.id: predicted(one) for one in timed}
    return merge_runs({"night": run})


def predicted(measured: Record) -> Prediction:
    """A prediction a tenth too high."""
    seconds = 1.1e-6 * (measured.median_us or 0.0)
    phase = {"seconds": seconds, "low": 0.9 * seconds, "high": 1.1 * seconds}
    return Prediction(
        case=measured.case, cluster="made", cluster_hash="0", phases={"fwd": phase}, started=1e9
    )


def varied(kind: str = "") -> Collection:
    """Cases for every kind of figure; for ``quality`` also selectors."""
    records = []
    for mask in ("causal", f"{PILE},seed=0", f"{PILE},seed=1"):
        for n, ms in ((1024, 1.0), (4096, 9.0)):
            records += [case("bands", ms, 1.2, mask=mask, seq_len=n, started=1e9 + 60 + ms),
                     case("sdpa.math", 2 * ms, mask=mask, seq_len=n, peak_mb=n / 50),
                     case("bands", ms, mask=mask, seq_len=n, strategy="ring", world_size=2),
                     case("bands", ms, mask=mask, seq_len=n, strategy="ring", world_size=4,
                          layout="zigzag")]  # fmt: skip
        records.append(case("sdpa.math", mask=mask, seq_len=16384, status="oom", reason="no room"))
        if kind.startswith("needle"):
            records += [
                needle_case(operator, inputs, seq_len=n, mask=mask)
                for operator in ("bands", "moba") for n in (1024, 4096)
                for inputs in ("depth=0.0", "depth=0.5", "hops=2", "hops=4")
            ]  # fmt: skip
        if kind == "quality":
            records += [selector_case("moba", ms, 0.4, mask=mask, seq_len=n)
                     for n, ms in ((1024, 0.5), (4096, 2.0))]  # fmt: skip
    return collection(*records)


def points(axes: Axes) -> dict[str, dict[float, float]]:
    """By marker, y of each x."""
    ys_by_marker: dict[str, dict[float, float]] = {}
    for line in axes.lines:
        if line.get_marker() not in ("None", "", "|", "_", None):
            xs, ys = (np.asarray(values, dtype=float).tolist() for values in line.get_data())
            ys_by_marker.setdefault(str(line.get_marker()), {}).update(zip(xs, ys, strict=True))
    return ys_by_marker


def error_bar(axes: Axes) -> list[float]:
    """Both ends of the only error bar."""
    (bars,) = axes.collections
    assert isinstance(bars, LineCollection)
    (segment,) = bars.get_segments()
    return [float(y) for y in segment[:, 1]]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def error_message(cases: Collection, kind: str, *where: str, path: str = "x.svg") -> str:
    with pytest.raises(ValueError) as error:
        figures.draw(cases, kind, Path(path), where)
    assert "\n" not in str(error.value)
    return str(error.value)


def selector_case(operator: str, ms: float, recall: float, **fields: Any) -> Record:
    case_record = case(operator, ms, **fields)
    case_record.flags = ["approximate"]
    case_record.quality = {"mass": recall, "density": recall / 2}
    return case_record


def needle_case(operator: str, inputs: str, found: float = 0.5, **fields: Any) -> Record:
    """A record of the needles that an operator found."""
    spec = Spec.parse(f"haystack:{inputs}")
    case_record = case(operator, 1.0, inputs=spec, **fields)
    case_record.quality = {"found": found, "solved": found / 2}
    return case_record
