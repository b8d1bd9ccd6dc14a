"""Synthetic records, and reports of them."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pandas as pd

from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.reports.collection import merge_runs
from cpbench.reports.frame import tidy_table
from cpbench.reports.tables import render
from cpbench.results.record import Record
from cpbench.results.store import RecordWriter, Run, read_run

OUT = Path("results/night")
CONDITIONS = {"device": "cpu", "threads": 1, "checked": True, "timed": True, "clock": "wall"}


def record(operator: str, ms: float | None = None, noise: float = 0.01, **fields: Any) -> Record:
    """A record of a case with a median of ``ms`` and an interval of about that half-width: checked,
    and measured in nine turns with others, each of which may be disturbed.

    Args:
        fields: of the case and of the record.
    """
    fields = {"conditions": CONDITIONS, **fields}
    keys = [key for key in fields if key in Case.__dataclass_fields__]
    case: dict[str, Any] = {key: fields.pop(key) for key in keys}
    specs = {key: Spec.parse(case[key]) for key in ("mask", "strategy", "layout") if key in case}
    case_record = Record(
        case=Case(operator=Spec.parse(operator), **{**case, **specs}),
        status=fields.pop("status", "ok"),
        **fields,
    )
    if ms is not None:
        low, high = ms * (1 - noise), ms * (1 + noise)
        samples_us = [1e3 * x for x in [low] * 4 + [ms] + [high] * 4]
        random.Random(operator).shuffle(samples_us)
        case_record.times_us = {"fwd": [samples_us] * case_record.case.world_size}
        case_record.turns = [1] * 9
        case_record.flops = {"fwd": 10**9}
        case_record.errors = {"small": {"out": {"rel_l2": 2e-7, "max_rms": 1e-6}}}
    return case_record


def run_of(*records: Record) -> Run:
    launches = {r.case.id: [r] for r in records if r.status == "ok" and r.times_us}
    return Run({r.case.id: r for r in records}, launches)


def table_of(*records: Record, environments: dict[str, Any] | None = None) -> pd.DataFrame:
    """The tidy table of records; a repeated case is put into another run, of another machine."""
    remaining, tables = list(records), []
    while remaining:
        first = {record.case.id: record for record in reversed(remaining)}
        run = run_of(*(record for record in remaining if first[record.case.id] is record))
        run.environments = environments or {}
        tables.append(tidy_table(run, str(OUT)))
        remaining = [record for record in remaining if first[record.case.id] is not record]
    return pd.concat(tables, ignore_index=True)


def report_text(*records: Record, form: str = "table") -> str:
    return render.render(merge_runs({str(OUT): run_of(*records)}), form)


def section_lines(text: str, title: str) -> list[str]:
    return text.split(f"## {title}")[1].split("\n## ")[0].strip().splitlines()


def launches(operator: str, medians_ms: list[float], **fields: Any) -> list[Record]:
    """One record per launch."""
    records = []
    for i, ms in enumerate(medians_ms):
        launch = record(operator, ms, writer=f"w{i}", started=float(i), **fields)
        launch.memory_bytes = {"inputs": [1], "peak": [10**6]}
        records.append(launch)
    return records


def write_run(folder: Path, records: list[Record]) -> Run:
    """A run directory with these records, as it is read."""
    with RecordWriter(folder / "records" / "w.jsonl") as writer:
        for case_record in records:
            writer.append(case_record.to_json())
    return read_run(folder)


def noisy(mean: float, count: int, seed: int, spread: float = 0.01) -> list[float]:
    """Times around a mean, lognormal."""
    generator = random.Random(seed)
    return [mean * math.exp(generator.gauss(0, spread)) for _ in range(count)]
