"""Every registered operator that runs on CPUs, on every static mask, compared with float64."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from typing import Any

import naive
import pytest
import torch
from adapters import set_capability

import cpbench
from cpbench import masks
from cpbench.core import registry
from cpbench.core.operator import QKV, BackwardInputs, Unsupported, declared_refusal
from cpbench.core.problem import Problem
from cpbench.masks.attn_mask import AttnMask
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.partial_results.merge import merge
from cpbench.parallel.world import Subproblem, World
from cpbench.sweep.verification.cases import MASKS, SEQ_LEN

LIMIT = {"float32": 2e-6, "bfloat16": 1.2e-2}
COMPILED = {"flex"}  # takes seconds of compilation per case, so it has its own test
OPERATORS = [
    name
    for name, info in registry.operators().items()
    if "cpu" in info.devices
    and "bands" in info.masks
    and name not in COMPILED
    and not (info.selects or info.paged)
]


def _compare(
    operator: str,
    mask: AttnMask,
    shape: tuple[int, int, int, int],
    dtype: str,
    value_dim: int = 0,
) -> None:
    batch, heads_q, heads_kv, dim = shape
    q, k, v, dout = naive.random_inputs(
        batch, mask.seq_k, heads_q, heads_kv, dim, getattr(torch, dtype), value_dim=value_dim
    )
    q, dout = q[:, : mask.seq_q], dout[:, : mask.seq_q]
    expected = naive.attention(q, k, v, dout, mask)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = cpbench.attention(q, k, v, mask, operator=operator)
    out.backward(dout)
    results = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    for name in naive.TENSORS:
        if results[name] is None:
            assert not registry.operator_info(operator).mergeable
            continue
        error = naive.error(results[name].detach(), expected[name])
        assert error < LIMIT[dtype], f"{name} has an error of {error:.2g}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda text: text.split(":")[0])
@pytest.mark.parametrize("operator", OPERATORS)
def test_equals_float64(operator: str, mask: str, dtype: str) -> None:
    _compare(operator, masks.build(mask, SEQ_LEN), (1, 4, 2, 64), dtype)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("seq_q", [1, 17, 130])
def test_fewer_queries_than_keys_head_dim_128_and_batches(operator: str, seq_q: int) -> None:
    mask = masks.build("causal", 130, seq_q=seq_q)
    _compare(operator, mask, (2, 3, 1, 128), "float32")


SMALLER, LARGER = 16, 40  # than that of queries and keys
WITH_VALUE_DIMS = [
    *(("causal", value_dim) for value_dim in (SMALLER, LARGER)),
    *zip([*MASKS[3::3], "empty"], itertools.cycle((SMALLER, LARGER)), strict=False),
]


@pytest.mark.parametrize(
    ("mask", "value_dim"),
    WITH_VALUE_DIMS,
    ids=[f"{m.split(':')[0]}-{d}" for m, d in WITH_VALUE_DIMS],
)
@pytest.mark.parametrize("operator", [n for n in OPERATORS if registry.operator_info(n).value_dims])
def test_values_of_another_head_dim(operator: str, mask: str, value_dim: int) -> None:
    nothing = AttnMask.from_slices(40, 40, [])
    built = nothing if mask == "empty" else masks.build(mask, SEQ_LEN)
    _compare(operator, built, (2, 4, 2, 24), "float32", value_dim)


def test_values_of_another_head_dim_over_a_kernel() -> None:
    _compare("bands:kernel=reference", masks.build(MASKS[8], SEQ_LEN), (1, 4, 2, 24), "float32", 16)
    mask = masks.build("causal", 40)
    with pytest.raises(Unsupported, match=r"bands: sdpa.cpu_flash takes values of the head_dim of"):
        _compare("bands:kernel=sdpa.cpu_flash", mask, (1, 4, 2, 24), "float32", 16)


def test_values_of_another_head_dim_in_heads_of_their_own_masks() -> None:
    head_masks = masks.build_heads("vertical_slash", 96, num_heads=4)
    q, k, v, dout = naive.random_inputs(1, 96, 4, 2, 24, torch.float32, value_dim=16)
    for x in (q, k, v):
        x.requires_grad_()
    results = {}
    for operator in ("reference", "bands", "sdpa.math", "triton_block_sparse"):
        out, _ = cpbench.attention(q, k, v, head_masks, operator=operator)
        results[operator] = (out, *torch.autograd.grad(out, (q, k, v), dout))
    for operator in ("bands", "sdpa.math", "triton_block_sparse"):
        for actual, expected in zip(results[operator], results["reference"], strict=True):
            assert naive.error(actual, expected) < 2e-6, operator


@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_that_see_nothing(operator: str) -> None:
    rows = [(5, 40, 3, 30, -60, 0), (50, 57, 10, 60, -3, 3)]
    mask = AttnMask.from_slices(67, 67, rows)
    assert mask.empty_rows().any()
    _compare(operator, mask, (1, 2, 2, 64), "float32")
    _compare(operator, AttnMask.from_slices(9, 9, []), (1, 2, 2, 64), "float32")


def _subproblem(mask: AttnMask, problem: Problem) -> Subproblem:
    """The whole mask as the subproblem of a single rank."""
    problem = replace(problem, seq_q=mask.seq_q, seq_k=mask.seq_k)
    return World.of(problem, mask, build_layout("contiguous", mask.seq_k, 1)).subproblem([0], [0])


@pytest.mark.parametrize(
    "operator", [name for name in OPERATORS if registry.operator_info(name).external_lse]
)
def test_partial_results_over_key_subsets_add_up(operator: str) -> None:
    mask = masks.build("causal", 96)
    q, k, v, dout = naive.random_inputs(1, 96, 4, 2, 64, torch.float32)
    expected = naive.attention(q, k, v, dout, mask)
    op = BoundOperator.load(operator, "cpu")
    spans = [(0, 31), (31, 80), (80, 96)]
    problem = Problem(
        batch=1, seq_q=96, seq_k=96, heads_q=4, heads_kv=2, head_dim=64, dtype="float32"
    )
    plans = [op.prepare(_subproblem(mask.crop(0, 96, a, b), problem)) for a, b in spans]
    forward = op.forward_accumulator(q)
    for (a, b), plan in zip(spans, plans, strict=True):
        forward.add(k[:, a:b].contiguous(), v[:, a:b].contiguous(), plan)
    out, lse = forward.finish()
    backward = op.backward_accumulator(dout, q, out, lse)
    grads = [
        backward.add(k[:, a:b].contiguous(), v[:, a:b].contiguous(), plan)
        for (a, b), plan in zip(spans, plans, strict=True)
    ]
    results = {
        "out": out,
        "lse": lse,
        "dq": backward.finish(),
        "dk": torch.cat([dk for dk, _ in grads], 1),
        "dv": torch.cat([dv for _, dv in grads], 1),
    }
    for name in naive.TENSORS:
        assert naive.error(results[name], expected[name]) < 2e-6, name


def test_merging_two_empty_partial_results_stays_empty() -> None:
    out, lse = torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), -torch.inf)
    merged, merged_lse = merge(out.clone(), lse, out.clone(), lse)
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


def test_merging_does_not_overflow() -> None:
    partials = [torch.ones(1, 1, 1, 4), 3 * torch.ones(1, 1, 1, 4)]
    merged, lse = merge(
        partials[0], torch.full((1, 1, 1), 5000.0), partials[1], torch.full((1, 1, 1), 5000.0)
    )
    assert torch.allclose(merged, torch.full_like(merged, 2.0))
    assert lse.item() == pytest.approx(5000 + 0.6931, abs=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="flex needs g++")
@pytest.mark.parametrize("value_dim", [64, 32])
def test_flex_forward_equals_float64_and_its_backward_is_refused(value_dim: int) -> None:
    mask = masks.build("streaming", 300, num_sinks=4, window=70)
    q, k, v, dout = naive.random_inputs(1, 300, 4, 2, 64, torch.float32, value_dim=value_dim)
    out, lse = cpbench.attention(q, k, v, mask, operator="flex")
    expected = naive.attention(q, k, v, dout, mask)
    assert naive.error(out, expected["out"]) < 2e-6
    assert lse is None
    with pytest.raises(Unsupported, match="no backward pass on cpu"):
        cpbench.attention(q.requires_grad_(), k, v, mask, operator="flex")


def _problem(**changes: object) -> Problem:
    values = {
        "batch": 1,
        "seq_q": 64,
        "seq_k": 64,
        "heads_q": 4,
        "heads_kv": 2,
        "head_dim": 64,
        "dtype": "float32",
    }
    return Problem(**{**values, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "device", "words"),
    [
        ("sdpa.flash", {"dtype": "bfloat16"}, "cpu", "runs on cuda, not on cpu"),
        ("sdpa.flash", {}, "cuda", "takes bfloat16, float16, not float32"),
        ("flex", {}, "cpu", "no backward pass on cpu; use direction fwd"),
        ("bands", {"head_dim": 512}, "cpu", "head_dim up to 256, not 512"),
        ("sdpa.cudnn", {"dtype": "float16", "deterministic": True}, "cuda", "not deterministic"),
        ("sdpa.cudnn", {"dtype": "float16", "head_dim": 136}, "cuda", "head_dim up to 128"),
        ("bands", {"softcap": 5.0}, "cpu", "softcap is not built yet"),
        ("bands", {"head_dim_v": 512}, "cpu", "head_dim up to 256, not 512"),
        (
            "sdpa.cpu_flash",
            {"head_dim_v": 32},
            "cpu",
            "sdpa.cpu_flash takes values of the head_dim of queries and keys, not 32 beside 64",
        ),
    ],
)
def test_refusals_say_why(name: str, changes: dict, device: str, words: str) -> None:
    reason = declared_refusal(registry.operator_info(name), _problem(**changes), device)
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    ("name", "changes", "capability", "words"),
    [
        ("sdpa.cudnn", {"seq_k": 1}, (9, 0), "no single key"),
        ("sdpa.cudnn", {"head_dim": 60}, (9, 0), "a multiple of 8, not 60"),
        ("sdpa.flash", {"head_dim": 60}, (9, 0), "a multiple of 8, not 60"),
        ("sdpa.flash", {"head_dim": 200}, (8, 9), "no backward pass for head_dim 193 to 224"),
        ("sdpa.flash", {"head_dim": 200}, (9, 0), None),
        ("sdpa.flash", {"head_dim": 200, "direction": "fwd"}, (8, 9), None),
        ("sdpa.flash", {"head_dim": 256}, (12, 0), None),
        ("flash_attn.torch", {"head_dim": 208}, (8, 6), "no backward pass for head_dim 193 to 224"),
        ("flash_attn.torch", {"head_dim": 208}, (8, 0), None),
    ],
)
def test_what_gpus_do_not_take_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, changes: dict, capability: Any, words: str | None
) -> None:
    set_capability(monkeypatch, capability)
    problem = _problem(dtype="bfloat16", **changes)
    operator = registry.implementation(registry.operator_info(name), {})
    seq_q, seq_k = problem.seq_q, problem.seq_k
    mask = AttnMask.from_slices(seq_q, seq_k, [(0, seq_q, 0, seq_k, -99, 99)])
    reason = operator.unsupported(problem, mask, "cuda")
    assert (reason is None) if words is None else words in reason


def test_a_dense_mask_that_does_not_fit_is_refused_with_its_size() -> None:
    op = BoundOperator.load("sdpa.cpu_flash", "cpu")
    subproblem = _subproblem(masks.build("sliding_window", 1 << 17, window=16), _problem())
    with pytest.raises(Unsupported, match=r"a dense mask of 64\.0 GiB would be needed"):
        op.prepare(subproblem)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((1, 8, 4, 16), (1, 9, 2, 16), (1, 9, 2, 16)), "do not fit a mask of 8 queries"),
        (((1, 8, 4, 16), (1, 8, 3, 16), (1, 8, 3, 16)), "must be a multiple"),
        (((1, 8, 4, 16), (1, 8, 2, 16), (1, 8, 4, 16)), "must have the same shape"),
        (((1, 8, 4, 16), (2, 8, 2, 16), (2, 8, 2, 16)), "must agree in batch"),
        (((1, 8, 4, 16), (1, 8, 2, 16), (1, 7, 2, 8)), "the same shape, but for head_dim"),
        (
            ((1, 8, 4, 16), (1, 8, 2, 16), (1, 8, 2, 0)),
            r"v \[.*\] must have a head_dim of at least",
        ),
    ],
)
def test_inconsistent_shapes_are_named(shapes: tuple, words: str) -> None:
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=words):
        cpbench.attention(q, k, v, masks.build("causal", 8))


@pytest.mark.parametrize(
    ("name", "mask", "value_dim"),
    [
        *(
            (name, mask, 64)
            for name in ("flash", "cudnn", "efficient")
            for mask in ("causal", "full")
        ),
        ("efficient", "sliding_window_causal:window=16", 64),
        ("efficient", "sliding_window_causal:window=16", 32),
        ("efficient", "empty", 32),
    ],
)
def test_calls_of_gpu_back_ends_match_the_signatures_of_torch(
    name: str, mask: str, value_dim: int
) -> None:
    """On meta tensors: argument lists, shapes and dtypes; no GPU, so no values."""
    info = registry.operator_info(f"sdpa.{name}")
    nothing = AttnMask.from_slices(60, 60, [])
    built = nothing if mask == "empty" else masks.build(mask, 60)
    op = registry.implementation(info, {})
    problem = _problem(seq_q=60, seq_k=60, dtype="bfloat16")
    q, k, v, dout = (
        torch.empty(2, 60, heads, dim, dtype=torch.bfloat16, device="meta")
        for heads, dim in ((4, 64), (2, 64), (2, value_dim), (4, value_dim))
    )
    plan = op.prepare(built, problem, "meta")
    out, lse = op.forward(QKV(q, k, v), plan)
    assert (out.shape, out.dtype) == (dout.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((2, 4, 60), torch.float32)
    grads = op.backward(BackwardInputs(dout, q, k, v, out, lse), plan)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]
