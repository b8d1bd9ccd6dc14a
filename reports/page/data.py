"""Data of a page's charts: the tidy table and raw samples in a compact form."""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import Spec
from cpbench.reports.collection import Collection
from cpbench.reports.figures.style import method_styles, with_hollow_styles
from cpbench.reports.labels import FACT_COLUMNS, describe
from cpbench.reports.tables.overview import environment_facts
from cpbench.reports.tables.summary import method_labels, method_names

if TYPE_CHECKING:
    import pandas as pd

TEXTS = (
    "run", "id", "status", "reason", "method", "operator", "strategy", "layout", "computes", "mask",
    "mask_family", "dtype", "direction", "phase", "key_lens", "placement", "inputs", "rope",
    "shape", "machine", "clock",
    "flags", "disqualified", "notes", "environment", "writer", "log",
)  # fmt: skip
NUMBERS = (
    "seq_len", "world_size", "ranks_per_node", "batch", "queries", "page_size", "num_heads_q",
    "num_heads_kv",
    "head_dim", "head_dim_v", "seed", "time_ms", "low_ms", "high_ms", "fwd_ms", "fwd_low_ms",
    "fwd_high_ms",
    "bwd_ms", "bwd_low_ms", "bwd_high_ms", "noise", "iterations", "launches", "tflops_per_rank",
    "fwd_tflops_per_rank", "bwd_tflops_per_rank", "gemm_tflops", "copy_gb_s", "intensity",
    "density", "imbalance", "plan_ms", "rope_ms", "first_call_ms", "peak_mb", "limit_mb",
    "inputs_mb", "sent_mb", "allgather_mb", "inside_mb", "across_mb", "compute_ms", "transfer_ms",
    "exposed_ms", "exposed", "hidden", "worst_error", "started", "kept", "recovered",
    "best_recovered", "out_error", "token_us", "kv_gb_s", "stream_share",
    "select_ms", "arrange_ms", "kernel_ms",
)  # fmt: skip
_SHAPE_FACTS = (
    "queries", "decoding", "ranks/node", "batch", "heads", "head_dim", "input seed", "inputs",
    "rope", "files"
)  # fmt: skip
_MAX_PICTURE_TOKENS = 16384  # unless all lengths are longer
_DIGITS = 6


def chart_data(collection: Collection) -> dict[str, Any]:
    """Columns, styles, mask pictures and environments, as plain values."""
    table = collection.table
    names, labels = method_names(table), method_labels(table)
    named = table.assign(method=labels, shape=_shape_labels(table))
    styles = with_hollow_styles(method_styles(names), dict(zip(labels, names, strict=True)))
    environments = collection.environments.items()
    return {
        "rows": len(named),
        "texts": {column: _encode_texts(named[column]) for column in TEXTS},
        "numbers": {column: _round_numbers(named[column]) for column in NUMBERS},
        "styles": {name: asdict(style) for name, style in styles.items()},
        "masks": mask_pictures(table),
        "environments": {key: environment_facts(environment) for key, environment in environments},
    }


def samples_by_row(collection: Collection) -> list[list[list[float]]]:
    """By row of the table: microseconds (slowest rank) per launch and iteration."""
    samples = []
    for name, key in zip(collection.table["run"], collection.table["id"], strict=True):
        run = collection.runs[name]
        launches = run.launches.get(key) or [run.records[key]]
        samples.append([[round(us, 1) for us in launch.samples_us] for launch in launches])
    return samples


def mask_pictures(table: pd.DataFrame) -> dict[str, str]:
    """By mask without seed: a thumbnail as a data URI, for masks that cpbench itself builds."""
    from cpbench import masks
    from cpbench.masks.dilated_mask import DilatedMask
    from cpbench.masks.head_masks import distinct_masks
    from cpbench.masks.picture import thumbnail

    pictures = {}
    for family, group in table.groupby("mask_family", sort=True):
        try:
            spec = Spec.parse(str(group["mask"].iloc[0]))
            if ":" in spec.name or "file" in spec.kwargs:
                continue  # a user's file: a report neither runs nor reads it
            lengths = sorted({int(n) for n in group["seq_len"]})
            tokens = max([n for n in lengths if n <= _MAX_PICTURE_TOKENS] or lengths[:1])
            built = masks.build_heads(spec, tokens, int(group["num_heads_q"].iloc[0]))
            if not isinstance(built, DilatedMask):
                png = thumbnail(distinct_masks(built)[0])
                pictures[str(family)] = "data:image/png;base64," + base64.b64encode(png).decode()
        except (ValueError, OSError):  # too short for this mask, or of another version
            continue
    return pictures


def _shape_labels(table: pd.DataFrame) -> list[str]:
    """By row: facts of the problem apart from mask, length, ranks, direction and dtype."""
    columns = [name for fact in _SHAPE_FACTS for name in FACT_COLUMNS.get(fact, (fact,))]
    cache: dict[tuple[Any, ...], str] = {}
    labels = []
    for values in zip(*(table[column] for column in columns), strict=True):
        if values not in cache:
            cache[values] = describe(dict(zip(columns, values, strict=True)), _SHAPE_FACTS)
        labels.append(cache[values])
    return labels


def _encode_texts(values: pd.Series[Any]) -> dict[str, Any]:
    """A column of texts as its distinct values and, by row, their index; -1 is none."""
    import pandas as pd

    codes, distinct_values = pd.factorize(values)
    return {"values": [str(value) for value in distinct_values], "codes": codes}


def _round_numbers(values: pd.Series[Any]) -> Any:
    """A column of numbers rounded to six significant digits; nan for none."""
    import numpy as np

    numbers = values.astype("Float64").to_numpy(dtype=float, na_value=np.nan)
    rounds = np.isfinite(numbers) & (numbers != 0)
    scale = np.ones_like(numbers)
    scale[rounds] = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(np.abs(numbers[rounds]))))
    with np.errstate(invalid="ignore"):
        return np.where(rounds, np.round(numbers * scale) / scale, numbers)
