"""Records made by hand, and reports of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.reports.collection import together
from cpbench.reports.frame import frame
from cpbench.reports.tables import render
from cpbench.results.record import Record
from cpbench.results.store import Run

OUT = Path("results/night")


def record(operator: str, ms: float | None = None, noise: float = 0.01, **given: Any) -> Record:
    """A record of a median of ``ms`` whose interval has about that half-width."""
    keys = [key for key in given if key in Case.__dataclass_fields__]
    case: dict[str, Any] = {key: given.pop(key) for key in keys}
    specs = {key: Spec.parse(case[key]) for key in ("mask", "strategy", "layout") if key in case}
    made = Record(
        case=Case(operator=Spec.parse(operator), **{**case, **specs}),
        status=given.pop("status", "ok"),
        **given,
    )
    if ms is not None:
        low, high = ms * (1 - noise), ms * (1 + noise)
        made.times_us = {"fwd": [[1e3 * x for x in [low] * 4 + [ms] + [high] * 4]]}
        made.flops = {"fwd": 10**9}
        made.errors = {"small": {"out": {"rel_l2": 2e-7, "max_rms": 1e-6}}}
    return made


def run_of(*records: Record) -> Run:
    launches = {r.case.id: [r] for r in records if r.status == "ok" and r.times_us}
    return Run({r.case.id: r for r in records}, launches)


def table_of(*records: Record, environments: dict[str, Any] | None = None) -> pd.DataFrame:
    """A case that is there twice is so in runs of two machines."""
    left, tables = list(records), []
    while left:
        first = {record.case.id: record for record in reversed(left)}
        run = run_of(*(record for record in left if first[record.case.id] is record))
        run.environments = environments or {}
        tables.append(frame(run, str(OUT)))
        left = [record for record in left if first[record.case.id] is not record]
    return pd.concat(tables, ignore_index=True)


def shown(*records: Record, form: str = "table") -> str:
    return render.render(together({str(OUT): run_of(*records)}), form)


def section(text: str, title: str) -> list[str]:
    return text.split(f"## {title}")[1].split("\n## ")[0].strip().splitlines()
