"""Figures of a case by short names, for tables and axes."""

from __future__ import annotations

from dataclasses import dataclass

from cpbench.reports.columns import BOOLEAN_COLUMNS, COLUMNS, TEXT_COLUMNS


@dataclass(frozen=True)
class Metric:
    """A figure.

    Attributes:
        column: of the tidy table.
        heading: with its unit.
        factor: from the column to that unit.
        timed: whether it does not count where a case is disqualified.
        higher_is_better: whether more of it is better.
    """

    column: str
    heading: str
    factor: float = 1.0
    timed: bool = False
    higher_is_better: bool = False


METRICS = {
    "ms": Metric("time_ms", "ms", timed=True),
    "fwd": Metric("fwd_ms", "ms, forward", timed=True),
    "bwd": Metric("bwd_ms", "ms, backward", timed=True),
    "tflops": Metric("tflops_per_rank", "TFLOP/s per rank", timed=True, higher_is_better=True),
    "token": Metric("token_us", "µs per token decoded", timed=True),
    "stream": Metric("kv_gb_s", "GB/s of KV read per rank", timed=True, higher_is_better=True),
    "peak": Metric("peak_mb", "peak MB, max per rank"),
    "sent": Metric("sent_mb", "MB sent, max per rank"),
    "across": Metric("across_mb", "MB sent across nodes, max per rank"),
    "exposed": Metric("exposed", "exposed communication, %", 100.0, timed=True),
    "imbalance": Metric("imbalance", "load imbalance, max/mean"),
    "recall": Metric("recovered", "attention recall, %", 100.0, higher_is_better=True),
    "found": Metric("found", "needles found, %", 100.0, higher_is_better=True),
    "solved": Metric("solved", "queries that find all needles, %", 100.0, higher_is_better=True),
    "error": Metric("worst_error", "largest relative L2 error"),
}


def parse_metric(option: str, name: str) -> Metric:
    """The metric of a short name, or of a column of numbers.

    Args:
        option: that took it, for the message.

    Raises:
        ValueError: for anything else.
    """
    if name in METRICS:
        return METRICS[name]
    if name not in COLUMNS or name in TEXT_COLUMNS or name in BOOLEAN_COLUMNS:
        raise ValueError(
            f"{option} {name!r} is none of {', '.join(METRICS)}, nor a column of numbers: "
            "cpbench report --columns"
        )
    return Metric(name, name, timed=name.endswith("_ms"))
