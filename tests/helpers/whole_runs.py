"""Runs of single cases in a process, with a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpbench.results.record import Record
from cpbench.sweep import runs, sweep_file
from cpbench.sweep.request import Request


def run_cases(
    out: Path, measure: Any = None, device: str = "cpu", **sweep_table: Any
) -> list[Record]:
    """The records of a sweep, by default of about a thousand tokens, in the order of its cases."""
    return run_tables(out, [sweep_table], measure, device)


def run_tables(
    out: Path, tables: list[dict[str, Any]], measure: Any = None, device: str = "cpu"
) -> list[Record]:
    """As :func:`run_cases` of each table, by the same processes."""
    base = {"seq_len": 1100, "num_heads_q": 2, "head_dim": 16}
    settings = {"max_seconds": 0.2, "max_iterations": 7, **(measure or {})}
    sweep: dict[str, Any] = {"sweep": {**base, **tables[0]}, "measure": settings}
    if tables[1:]:
        sweep = {"include": [{**base, **table} for table in tables], "measure": settings}
    loaded = sweep_file.expand(sweep, "truth")
    request = Request(
        name="truth", cases=list(loaded.cases), out=out, launcher="local", device=device,
        settings=loaded.settings,
    )  # fmt: skip
    runs.execute(request, quiet=True)
    records = runs.results(request).records
    return [records[case.id] for case in loaded.cases]
