"""The correctness checks find wrong operators and pass right ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from paths import HELPERS

from cpbench import masks
from cpbench.api import Attention
from cpbench.core import tolerance
from cpbench.core.problem import Problem
from cpbench.core.registry import operator_info
from cpbench.core.spec import Spec
from cpbench.inputs import Recipe
from cpbench.masks.attn_mask import AttnMask
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.world import World
from cpbench.verify import check
from cpbench.verify.at_size import check_sampled
from cpbench.verify.errors import Errors, TensorErrorSums

OPERATORS = HELPERS / "planted" / "wrong_operators.py"
TOKENS = 1500


def _work(operator: str, world: World) -> Attention:
    return Attention(_spec(operator), "single", world, 0, "cpu")


def _problem(**changes: Any) -> Problem:
    values = {
        "batch": 2,
        "seq_q": TOKENS,
        "seq_k": TOKENS,
        "heads_q": 4,
        "heads_kv": 2,
        "head_dim": 16,
        "dtype": "float32",
    }
    return Problem(**{**values, **changes})


def _measured(operator: str, mask: AttnMask, **changes: Any) -> Attention:
    layout = build_layout("contiguous", TOKENS, 1)
    return _work(operator, World.of(_problem(**changes), mask, layout))


def _small(operator: str, mask: AttnMask, **changes: Any) -> str | None:
    world = check.reduced_world(_measured(operator, mask, **changes))
    errors = check.check_small(_work(operator, world), Recipe(5), check.RankContext("cpu"))
    return _violation(errors, operator, **changes)


def _violation(errors: Errors, operator: str, **changes: Any) -> str | None:
    info = operator_info(_spec(operator).name)
    return tolerance.violation(errors, _problem(**changes).dtype, info)


def _spec(operator: str) -> Spec:
    registered = operator in ("bands", "sdpa.math", "sdpa.cpu_flash")
    return Spec.parse(operator if registered else f"{OPERATORS}:{operator}")


def _sampled(
    operator: str, mask: AttnMask, seed: int = 5, **changes: Any
) -> tuple[str | None, Errors]:
    work = _measured(operator, mask, **changes)
    inputs = check.rank_inputs(work, Recipe(seed), "cpu")
    results = check.run_pass(work, inputs, None)
    lines = check_sampled(work, inputs, results, Recipe(seed), seed, check.RankContext("cpu"))
    return _violation(lines.errors, operator, **changes), lines.errors


MASK = masks.build("sliding_window_causal", TOKENS, window=200)


@pytest.mark.parametrize("operator", ["right", "bands"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_operators_pass_both_checks(operator: str, dtype: str) -> None:
    assert _small(operator, MASK, dtype=dtype) is None
    violation, errors = _sampled(operator, MASK, dtype=dtype)
    assert violation is None
    assert set(errors) == {"out", "lse", "dq", "dk", "dv"}


def test_an_operator_without_lse_has_its_rows_sampled() -> None:
    violation, errors = _sampled("sdpa.math", MASK)
    assert violation is None
    assert set(errors) == {"out", "dq"}


@pytest.mark.parametrize(
    ("operator", "tensor"),
    [("scales_twice", "dq"), ("log_two", "lse"), ("one_element", "out"), ("not_a_number", "out")],
)
def test_the_small_check_finds(operator: str, tensor: str) -> None:
    violation = _small(operator, MASK)
    assert violation is not None
    assert violation.startswith(f"{tensor} differs from float64: ")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("operator", "tensor"),
    [("far_rows", "out"), ("far_keys", "dk"), ("other_heads", "out"), ("last_tile", "out")],
)
def test_only_the_sampled_check_finds_errors_that_appear_at_size(
    operator: str, tensor: str, seed: int
) -> None:
    if seed == 0:
        assert _small(operator, MASK) is None
    violation, _ = _sampled(operator, MASK, seed)
    assert violation is not None
    assert violation.startswith(f"{tensor} differs from float64: ")


@pytest.mark.parametrize(
    "text",
    [
        "causal",
        "sliding_window_causal:window=700",
        "causal_document:corpus=prolong64k,seed=0",
        "streaming:num_sinks=4,window=900",
        "global_sliding_window:num_global=64,window=1000",
    ],
)
def test_the_reduced_mask_keeps_windows_and_documents(text: str) -> None:
    mask = masks.build(text, 1 << 15)
    reduced = check.reduced_mask(mask)
    assert 200 <= reduced.seq_q <= check.SMALL_TOKENS
    dense = reduced.to_dense()
    assert reduced.overlap_area() == 0
    assert dense.any()
    if text != "causal":  # edges of windows and documents are kept
        assert not np.array_equal(dense, np.tril(np.ones_like(dense)))


@pytest.mark.parametrize("text", ["full", "causal"])
def test_the_reduced_mask_is_of_the_same_kind(text: str) -> None:
    for tokens in (500, 4096, 50_000):
        mask = masks.build(text, tokens)
        assert check.reduced_mask(mask).kind == mask.kind


def test_a_small_error_of_one_head_is_found_in_half_precision() -> None:
    mask = masks.build("full", TOKENS)
    violation = _small("one_head", mask, heads_q=8, heads_kv=8, dtype="bfloat16")
    assert violation is not None


def test_mismatched_infinities_are_an_infinite_error() -> None:
    sums = TensorErrorSums.between(torch.tensor([0.0, 1.0]), torch.tensor([-torch.inf, 1.0]))
    errors = sums.errors(absolute=True)
    assert errors["max_rms"] == float("inf")
    assert tolerance.violation({"lse": errors}, "float32", operator_info("bands")) is not None
