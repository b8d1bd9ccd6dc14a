"""Whole runs of wrong operators: none of them gets a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from paths import HELPERS
from whole_runs import run_cases, run_tables

from cpbench.results.record import Record

OPERATORS = HELPERS / "planted" / "wrong_operators.py"
BIG_BATCH = {"batch": 9, "num_heads_q": 8, "num_heads_kv": 8, "head_dim": 4}
FEW = {"max_iterations": 8, "min_iterations": 8, "memory": False}

# Operator, what the reason says, changes of the case.
WRONG: list[tuple[str, str, dict[str, Any]]] = [
    ("off_by_one", "differs from float64", {"dtype": "bfloat16", "mask": "causal"}),
    ("scaled:percent=2", "out differs from float64: bias", {"dtype": "bfloat16"}),
    ("scaled:tensor=dq,percent=1", "dq differs from float64: bias", {"dtype": "bfloat16"}),
    ("scaled:tensor=dk,percent=1", "dk differs from float64: bias", {"dtype": "bfloat16"}),
    ("scaled:tensor=dv,percent=1", "dv differs from float64: bias", {"dtype": "bfloat16"}),
    ("coarse_lse", "lse differs from float64", {"dtype": "bfloat16"}),
    ("changes:how=reversed", "call 1 did not return", {}),
    ("changes:how=zeros", "did not return what the checked one did: out differs", {}),
    ("changes:how=rubbish,first=6,last=9", "call 3 did not return", {}),
    ("changes:how=coarse,first=6", "call 3 did not return", {"dtype": "bfloat16"}),
    ("any_bits:how=zeros,first=8", "call 5 did not return", {"dtype": "bfloat16"}),
    ("previous_gradients", "differs", {}),
    ("memoised", "differs", {}),
    ("memoised:peek=1", "differs", {}),
    ("keeps_probabilities", "differs from float64", {}),
    ("last_pair", "out differs from float64", BIG_BATCH),
    ("bad_tile", "out differs from float64", {"seq_len": 4096}),
    ("bad_tile:tensor=dq", "dq differs from float64", {"seq_len": 2048}),
    ("bad_tile:tensor=dk", "dk differs from float64", {"seq_len": 2048}),
    ("bad_tile:tensor=dv", "dv differs from float64", {"seq_len": 2048}),
    ("unlike:how=float64", "out has dtype torch.float64; it must be torch.bfloat16",
     {"dtype": "bfloat16"}),
    ("unlike:how=transposed", "out has shape [1, 2, 320, 16]", {}),
    ("unlike:how=half_lse", "lse has dtype torch.bfloat16", {}),
    ("unlike:how=lazy", "LazyTensor; it must be a plain torch.Tensor", {}),
]  # fmt: skip


def table_of(operator: str, changes: dict[str, Any]) -> dict[str, Any]:
    needs_gradients = any(word in operator for word in ("dq", "dk", "dv", "gradients"))
    return {
        "operator": f"{OPERATORS}:{operator}",
        "direction": "fwd_bwd" if needs_gradients else "fwd",
        **changes,
    }


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    tables = [table_of(operator, changes) for operator, _, changes in WRONG]
    records = run_tables(tmp_path_factory.mktemp("wrong"), tables, {**FEW, "interleave": 1})
    return {operator: record for (operator, *_), record in zip(WRONG, records, strict=True)}


@pytest.mark.parametrize(("operator", "reason"), [one[:2] for one in WRONG])
def test_a_wrong_operator_gets_no_time(
    wrong: dict[str, Record], operator: str, reason: str
) -> None:
    record = wrong[operator]
    assert record.status == "wrong", record.errors
    assert reason in str(record.reason)
    assert record.times_us == record.exposure_us == {}


def test_a_plan_that_is_wrong_the_second_time_is_found_in_the_second_turn(tmp_path: Path) -> None:
    measure = {**FEW, "interleave": 2}
    (record,) = run_cases(tmp_path, measure, operator=f"{OPERATORS}:second_plan", direction="fwd")
    assert record.status == "wrong"
    assert "call 1 did not return what the checked one did" in str(record.reason)
    assert record.times_us == {}


def test_work_that_goes_on_after_the_call_is_found(tmp_path: Path) -> None:
    (record,) = run_cases(
        tmp_path, {**FEW, "min_iterations": 1, "max_iterations": 1, "warmup": 0},
        operator=f"{OPERATORS}:finishes_later", seq_len=4096, direction="fwd",
    )  # fmt: skip
    assert record.status == "wrong" or "async" in record.flags


def test_a_rate_above_that_of_a_matrix_product_is_wrong(tmp_path: Path) -> None:
    (record,) = run_cases(
        tmp_path, {**FEW, "clock": "cpu"}, operator=f"{OPERATORS}:other_process", seq_len=3072,
        num_heads_q=4, head_dim=64, direction="fwd",
    )  # fmt: skip
    assert record.status == "wrong"
    assert "TFLOP/s per rank cannot be: a large matrix product reaches" in str(record.reason)
    assert record.times_us == {}


@pytest.fixture
def captured(tmp_path: Path) -> Path:
    """Inputs whose scores are as large as those of some trained models."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(1, 320, 2, 16, generator=generator) for name in "qkv"}
    path = tmp_path / "captured.safetensors"
    save_file({"q": tensors["q"] * 14, "k": tensors["k"] * 14, "v": tensors["v"]}, path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_scores_excuse_little(captured: Path, tmp_path: Path, dtype: str) -> None:
    names = ["all_zero", "rounds_scores", "right"]
    zero, undeclared, right = run_cases(
        tmp_path / "run", {"time": False}, operator=[f"{OPERATORS}:{name}" for name in names],
        inputs=f"file:{captured}", seq_len=320, dtype=dtype, direction="fwd",
    )  # fmt: skip
    assert zero.status == "wrong"
    assert right.status == "ok", right.reason
    assert undeclared.status == ("ok" if dtype == "float32" else "wrong")


def test_limits_grow_with_scores_for_operators_that_declare_to_round_them(tmp_path: Path) -> None:
    names = ["rounds_scores", "says_it_rounds"]
    undeclared, declared = run_cases(
        tmp_path, {"time": False}, operator=[f"{OPERATORS}:{name}" for name in names],
        inputs="needles:mass=0.99", seq_len=320, head_dim=64, dtype="bfloat16", direction="fwd",
    )  # fmt: skip
    assert undeclared.status == "wrong"
    assert declared.status == "ok", declared.reason


def test_errors_that_grow_with_size_are_flagged(tmp_path: Path) -> None:
    noisy, right = run_cases(
        tmp_path, FEW, operator=[f"{OPERATORS}:noisy", f"{OPERATORS}:right"], dtype="bfloat16",
        direction="fwd",
    )  # fmt: skip
    assert noisy.status == "ok", noisy.reason
    assert "error-grows" in noisy.flags
    assert "error-grows" not in right.flags


def test_lines_differ_from_launch_to_launch_and_are_recorded(tmp_path: Path) -> None:
    from cpbench.results.store import read_run

    (record,) = run_cases(
        tmp_path, {**FEW, "launches": 2}, operator=f"{OPERATORS}:right", direction="fwd_bwd"
    )
    launches = read_run(tmp_path).launches[record.case.id]
    assert len({launch.checked["seed"] for launch in launches}) == 2
    for launch in launches:
        assert launch.checked["rows"] >= 2 * 64
        assert launch.checked["columns"] >= 2 * 64
        assert launch.checked["tiles"] == 1.0
