"""Predictions of a collection beside what was measured: rows, and how far off they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.reports.labels import FACTS, fact_values, signed_percent, three_digits
from cpbench.reports.tables.rows import is_constant
from cpbench.reports.tables.summary import method_name

if TYPE_CHECKING:
    import pandas as pd

_ALWAYS, _LEFT_OUT = ("mask", "tokens", "ranks"), ("machine", "files")
_PROBLEM = (
    "mask", "seq_len", "world_size", "ranks_per_node", "direction", "dtype", "queries", "batch",
    "num_heads_q", "num_heads_kv", "head_dim", "head_dim_v",
)  # fmt: skip
APART = 0.05  # of two times, from where on their order counts


def predicted_rows(predicted: pd.DataFrame) -> list[dict[str, str]]:
    """Predicted and measured time of every predicted case, by problem, the fastest first."""
    varying = [fact for fact in FACTS if fact not in _LEFT_OUT]
    varying = [f for f in varying if f in _ALWAYS or not is_constant(predicted, f)]
    rows, any_measured = [], bool(predicted["competes"].any())
    order = [*_PROBLEM, "predicted_ms"]
    for _, row in predicted.sort_values(order, kind="stable", na_position="first").iterrows():
        ends = row["predicted_low_ms"], row["predicted_high_ms"]
        cells = {
            **fact_values(row, varying),
            "method": method_name(row),
            "predicted ms": three_digits(row["predicted_ms"]),
            "interval": " to ".join(map(three_digits, ends)),
        }
        if any_measured:
            error = signed_percent(row["predicted_ms"] / row["time_ms"] - 1)
            cells["measured ms"] = three_digits(row["time_ms"]) if row["competes"] else ""
            cells["error"] = error if row["competes"] else ""
        rows.append(cells)
    return rows


def prediction_notes(predicted: pd.DataFrame) -> list[str]:
    """For which cluster, and how far off the predictions of measured cases are."""
    if predicted.empty:
        return []
    notes = [f"Predicted for {', '.join(sorted(set(predicted['predicted_for'])))}."]
    both = predicted[predicted["competes"].to_numpy(dtype=bool)]
    if both.empty:
        return notes
    errors = (both["predicted_ms"] / both["time_ms"] - 1).abs()
    text = (
        f"Predictions of {len(both)} measured cases: off by {errors.median():.1%} in the median, "
        f"{errors.quantile(0.9):.1%} at the 90th percentile"
    )
    right, pairs = ordered_pairs(both)
    if pairs:
        text += (
            f"; of {pairs} pairs of methods more than {APART:.0%} apart on one problem, "
            f"{right} in the right order"
        )
    return [*notes, f"{text}."]


def ordered_pairs(both: pd.DataFrame) -> tuple[int, int]:
    """Of the pairs of methods on one problem whose measured times are more than ``APART`` apart:
    how many are predicted in the right order, and how many there are."""
    right = pairs = 0
    for _, rows in both.groupby([*_PROBLEM, "machine"], dropna=False):
        times = list(zip(rows["time_ms"], rows["predicted_ms"], strict=True))
        for i, (time, predicted) in enumerate(times):
            for other, other_predicted in times[:i]:
                if max(time, other) > (1 + APART) * min(time, other):
                    pairs += 1
                    right += (time < other) == (predicted < other_predicted)
    return right, pairs
