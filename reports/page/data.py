"""What the charts of a page are drawn from: the tidy table and raw samples, packed small."""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import Spec
from cpbench.reports.collection import Collection
from cpbench.reports.figures.style import looks
from cpbench.reports.labels import FACT_COLUMNS, sentence
from cpbench.reports.tables.overview import facts_of
from cpbench.reports.tables.summary import methods

if TYPE_CHECKING:
    import pandas as pd

TEXTS = (
    "run", "id", "status", "reason", "method", "operator", "strategy", "layout", "mask",
    "mask_family", "dtype", "direction", "placement", "inputs", "shape", "machine", "clock",
    "flags", "environment", "writer", "log",
)  # fmt: skip
NUMBERS = (
    "seq_len", "world_size", "ranks_per_node", "batch", "queries", "num_heads_q", "num_heads_kv",
    "head_dim", "seed", "time_ms", "low_ms", "high_ms", "fwd_ms", "fwd_low_ms", "fwd_high_ms",
    "bwd_ms", "bwd_low_ms", "bwd_high_ms", "noise", "iterations", "launches", "tflops_per_rank",
    "fwd_tflops_per_rank", "bwd_tflops_per_rank", "gemm_tflops", "copy_gb_s", "intensity",
    "density", "imbalance", "plan_ms", "first_call_ms", "peak_mb", "limit_mb", "inputs_mb",
    "sent_mb", "inside_mb", "across_mb", "compute_ms", "transfer_ms",
    "exposed_ms", "exposed", "hidden", "worst_error", "started", "kept", "recovered",
    "best_recovered", "out_error", "select_ms", "arrange_ms", "kernel_ms",
)  # fmt: skip
_SHAPE = ("queries", "a node", "batch", "heads", "head_dim", "input seed", "inputs", "files")
_PICTURE_TOKENS = 16384  # at most, where there are as few
_DIGITS = 6


def data(collection: Collection) -> dict[str, Any]:
    """Columns, looks, pictures and environments, as plain values."""
    table = collection.table
    named = table.assign(method=methods(table), shape=_shapes(table))
    return {
        "rows": len(named),
        "texts": {column: _coded(named[column]) for column in TEXTS},
        "numbers": {column: _rounded(named[column]) for column in NUMBERS},
        "looks": {name: asdict(look) for name, look in looks(named["method"]).items()},
        "masks": pictures(table),
        "environments": {key: facts_of(told) for key, told in collection.environments.items()},
    }


def samples(collection: Collection) -> list[list[list[float]]]:
    """By row of the table: microseconds of every iteration (slowest rank) of every launch."""
    found = []
    for run, key in zip(collection.table["run"], collection.table["id"], strict=True):
        whole = collection.runs[run]
        launches = whole.launches.get(key) or [whole.records[key]]
        found.append([[round(us, 1) for us in one.samples_us] for one in launches])
    return found


def pictures(table: pd.DataFrame) -> dict[str, str]:
    """By mask without seed: a small picture as a data URI, for masks that cpbench itself builds."""
    from cpbench import masks
    from cpbench.masks.dilated_mask import DilatedMask
    from cpbench.masks.head_masks import distinct
    from cpbench.masks.picture import thumbnail

    found = {}
    for family, group in table.groupby("mask_family", sort=True):
        try:
            spec = Spec.parse(str(group["mask"].iloc[0]))
            if ":" in spec.name or "file" in spec.kwargs:
                continue  # somebody's file: a report runs and reads none
            lengths = sorted({int(n) for n in group["seq_len"]})
            tokens = max([n for n in lengths if n <= _PICTURE_TOKENS] or lengths[:1])
            built = masks.build_heads(spec, tokens, int(group["num_heads_q"].iloc[0]))
            if not isinstance(built, DilatedMask):
                png = thumbnail(distinct(built)[0])
                found[str(family)] = "data:image/png;base64," + base64.b64encode(png).decode()
        except (ValueError, OSError):  # too short for this mask, or of another version
            continue
    return found


def _shapes(table: pd.DataFrame) -> list[str]:
    """What is computed apart from mask, length, ranks, direction and dtype, in words."""
    columns = [name for fact in _SHAPE for name in FACT_COLUMNS.get(fact, (fact,))]
    known: dict[tuple[Any, ...], str] = {}
    found = []
    for values in zip(*(table[column] for column in columns), strict=True):
        if values not in known:
            known[values] = sentence(dict(zip(columns, values, strict=True)), _SHAPE)
        found.append(known[values])
    return found


def _coded(values: pd.Series[Any]) -> dict[str, Any]:
    """A column of texts as its different values and, by row, which; -1 is none."""
    import pandas as pd

    codes, different = pd.factorize(values)
    return {"values": [str(value) for value in different], "codes": codes}


def _rounded(values: pd.Series[Any]) -> Any:
    """A column of numbers to six digits; nan for none."""
    import numpy as np

    found = values.astype("Float64").to_numpy(dtype=float, na_value=np.nan)
    known = np.isfinite(found) & (found != 0)
    scale = np.ones_like(found)
    scale[known] = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(np.abs(found[known]))))
    with np.errstate(invalid="ignore"):
        return np.where(known, np.round(found * scale) / scale, found)
