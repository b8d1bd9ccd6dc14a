"""Whole runs where values have another head_dim than queries and keys."""

from __future__ import annotations

from pathlib import Path

from paths import HELPERS
from whole_runs import run_cases, run_tables

OPERATORS = HELPERS / "planted" / "value_dim_operators.py"
FEW = {"max_iterations": 4, "min_iterations": 4, "memory": False}
DIMS = {"head_dim": 8, "head_dim_v": 24, "num_heads_kv": 1}


def test_all_checks_pass_and_all_calls_are_compared(tmp_path: Path) -> None:
    cases = {"operator": ["bands", f"{OPERATORS}:right"], "dtype": ["float32", "bfloat16"]}
    for record in run_cases(tmp_path, FEW, **DIMS, **cases, mask="sliding_window_causal:window=90"):
        assert record.status == "ok", record.reason
        assert set(record.errors) == {"small", "sampled", "tiles"}
        assert set(record.errors["tiles"]) == {"out", "lse", "dq", "dk", "dv"}
        assert record.median_us is not None
        pairs = 2 * record.area
        assert record.flops == {"fwd": 2 * (8 + 24) * pairs, "bwd": 2 * (24 + 48) * pairs}


def test_strategies_are_timed_and_send_what_was_predicted(tmp_path: Path) -> None:
    strategies = ["ring", "ulysses", "usp:ulysses=2", "hierarchical", "tile:rows=2", "distflash"]
    for record in run_cases(
        tmp_path, {**FEW, "memory": True}, head_dim=24, head_dim_v=16, world_size=2,
        strategy=strategies, seq_len=400,
    ):  # fmt: skip
        assert record.status == "ok", f"{record.case.label}: {record.reason}"
        assert record.predicted_bytes == record.bytes_sent
        assert "mispredicted" not in record.flags


def test_wrong_operators_are_found(tmp_path: Path) -> None:
    wrong = (
        ("out_lanes", "fwd", "out differs from float64"),
        ("dv_lanes", "fwd_bwd", "dv differs from float64"),
        ("like_queries", "fwd", "out has shape [1, 320, 2, 8]; it must be [1, 320, 2, 24]"),
    )
    tables = [
        {**DIMS, "operator": f"{OPERATORS}:{name}", "direction": direction}
        for name, direction, _ in wrong
    ]
    for record, (*_, reason) in zip(run_tables(tmp_path, tables, FEW), wrong, strict=True):
        assert record.status == "wrong"
        assert reason in str(record.reason)


def test_who_does_not_take_them_is_refused_in_one_line(tmp_path: Path) -> None:
    operators = ["sdpa.cpu_flash", "moba", "bands:kernel=sdpa.cpu_flash"]
    for record in run_cases(tmp_path, FEW, **DIMS, operator=operators):
        assert record.status == "unsupported"
        words = "takes values of the head_dim of queries and keys, not 24 beside 8"
        assert str(record.reason).endswith(words)
