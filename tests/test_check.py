"""The correctness gate finds what it is there to find, and lets the right pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpbench import check, masks
from cpbench.api import Attention
from cpbench.layout import build as build_layout
from cpbench.mask import AttnMask
from cpbench.problem import Problem

HERE = Path(__file__).parent / "wrong_operators.py"
TOKENS = 1500


def _work(operator: str, mask: AttnMask, layout: Any, problem: Problem) -> Attention:
    spec = f"{HERE}:{operator}" if operator not in ("bands", "sdpa.math") else operator
    return Attention(spec, "single", mask, layout, problem, 0, "cpu")


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


def _small(operator: str, mask: AttnMask, **changes: Any) -> str | None:
    def make(tiny: AttnMask, layout: Any, problem: Problem) -> Attention:
        return _work(operator, tiny, layout, problem)

    errors = check.small(make, mask, _problem(**changes), 1, "contiguous", 5, "cpu", None, None, 0)
    return check.verdict(errors, _problem(**changes).dtype)


def _sampled(operator: str, mask: AttnMask, **changes: Any) -> tuple[str | None, check.Errors]:
    problem = _problem(**changes)
    work = _work(operator, mask, build_layout("contiguous", TOKENS, 1), problem)
    inputs = check.make_inputs(problem, np.arange(TOKENS), 5, "cpu")
    errors = check.sampled(work, inputs, 5, "cpu", None, None)
    return check.verdict(errors, problem.dtype), errors


MASK = masks.build("sliding_window_causal", TOKENS, window=200)


@pytest.mark.parametrize("operator", ["right", "bands"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_right_passes_both_checks(operator: str, dtype: str) -> None:
    assert _small(operator, MASK, dtype=dtype) is None
    verdict, errors = _sampled(operator, MASK, dtype=dtype)
    assert verdict is None
    assert set(errors) == {"out", "lse", "dq", "dk", "dv"}


def test_an_operator_without_lse_has_its_rows_sampled() -> None:
    verdict, errors = _sampled("sdpa.math", MASK)
    assert verdict is None
    assert set(errors) == {"out", "dq"}


@pytest.mark.parametrize(
    ("operator", "tensor"),
    [("scales_twice", "dq"), ("log_two", "lse"), ("one_element", "out"), ("not_a_number", "out")],
)
def test_the_small_check_finds(operator: str, tensor: str) -> None:
    verdict = _small(operator, MASK)
    assert verdict is not None
    assert verdict.startswith(f"{tensor} differs from float64: ")


@pytest.mark.parametrize(("operator", "tensor"), [("far_rows", "out"), ("far_keys", "dk")])
def test_only_the_sampled_check_finds_what_appears_at_size(operator: str, tensor: str) -> None:
    assert _small(operator, MASK) is None
    verdict, _ = _sampled(operator, MASK)
    assert verdict is not None
    assert verdict.startswith(f"{tensor} differs from float64: ")


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
def test_the_small_mask_keeps_what_is_particular_to_the_mask(text: str) -> None:
    mask = masks.build(text, 1 << 15)
    tiny = check.small_mask(mask)
    assert 200 <= tiny.seq_q <= check.SMALL_TOKENS
    dense = tiny.to_dense()
    assert tiny.overlap_area() == 0
    assert dense.any()
    if text != "causal":  # the limits of windows and documents are inside, not cut away
        assert not np.array_equal(dense, np.tril(np.ones_like(dense)))


def test_mismatched_infinities_are_an_infinite_error() -> None:
    sums = check._Sums.of(torch.tensor([0.0, 1.0]), torch.tensor([-torch.inf, 1.0]))
    assert sums.errors(absolute=True)["max_rms"] == float("inf")
    assert check.verdict({"lse": sums.errors(absolute=True)}, "float32") is not None
