"""The correctness gate finds what it is there to find, and lets the right pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from paths import HELPERS

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.problem import Problem
from cpbench.inputs import Recipe
from cpbench.masks.attn_mask import AttnMask
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.world import World
from cpbench.verify import check
from cpbench.verify.at_size import sampled

OPERATORS = HELPERS / "wrong_operators.py"
TOKENS = 1500


def _work(operator: str, world: World) -> Attention:
    spec = f"{OPERATORS}:{operator}" if operator not in ("bands", "sdpa.math") else operator
    return Attention(spec, "single", world, 0, "cpu")


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
    tiny = check.small_world(_measured(operator, mask, **changes))
    errors = check.small(_work(operator, tiny), Recipe(5), check.Rank("cpu"))
    return check.verdict(errors, _problem(**changes).dtype)


def _sampled(
    operator: str, mask: AttnMask, seed: int = 5, **changes: Any
) -> tuple[str | None, check.Errors]:
    problem = _problem(**changes)
    work = _measured(operator, mask, **changes)
    inputs = check.inputs_of(work, Recipe(seed), "cpu")
    found = check.run(work, inputs, None)
    errors = sampled(work, inputs, found, Recipe(seed), check.Rank("cpu"))
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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("operator", "tensor"),
    [("far_rows", "out"), ("far_keys", "dk"), ("other_heads", "out"), ("last_tile", "out")],
)
def test_only_the_sampled_check_finds_what_appears_at_size(
    operator: str, tensor: str, seed: int
) -> None:
    if seed == 0:
        assert _small(operator, MASK) is None
    verdict, _ = _sampled(operator, MASK, seed)
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


@pytest.mark.parametrize("text", ["full", "causal"])
def test_the_small_mask_stays_of_the_kind_that_native_kernels_take(text: str) -> None:
    for tokens in (500, 4096, 50_000):
        mask = masks.build(text, tokens)
        assert check.small_mask(mask).kind == mask.kind


def test_one_head_a_little_off_is_found_in_half_precision() -> None:
    mask = masks.build("full", TOKENS)
    verdict = _small("one_head", mask, heads_q=8, heads_kv=8, dtype="bfloat16")
    assert verdict is not None


def test_a_result_that_changes_and_an_overwritten_input_are_seen() -> None:
    before = {"q": torch.randn(2, 50, 3, 8), "dout": torch.randn(2, 50, 3, 8)}
    seen = check.fingerprint(before)
    assert check.changed(seen, check.fingerprint(before), "float32") is None
    before["q"][1, :, 2] = 0
    assert check.changed(seen, check.fingerprint(before), "bfloat16") == "q"


def test_mismatched_infinities_are_an_infinite_error() -> None:
    sums = check.TensorSums.of(torch.tensor([0.0, 1.0]), torch.tensor([-torch.inf, 1.0]))
    assert sums.errors(absolute=True)["max_rms"] == float("inf")
    assert check.verdict({"lse": sums.errors(absolute=True)}, "float32") is not None
