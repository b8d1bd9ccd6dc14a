"""The `bands` operator compared with dense float64 attention, on masks written as raw slices.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import LIMIT_S
from raw_masks import MASKS, documents, mask_of

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import Problem
from cpbench.kernels.bands import cpu, fused
from cpbench.kernels.bands.operator import OPERATORS, Bands
from cpbench.kernels.bands.plan import layout
from cpbench.masks import build
from cpbench.masks.attn_mask import AttnMask

Tensors = tuple[torch.Tensor, ...]
# Maximum relative L2 error of out, dq, dk, dv, and maximum absolute error of lse.  (Gradients of
# float64 are no better than the lse, which is float32.)
TOLERANCE = {
    "float64": (1e-6, 1e-5),
    "float32": (1e-6, 1e-5),
    "bfloat16": (8e-3, 2e-2),
    "float16": (1e-3, 3e-3),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem_of(mask: AttnMask, dtype: str = "float32", **changes: Any) -> Problem:
    sizes = {"batch": 1, "heads_q": 2, "heads_kv": 2, "head_dim": 16} | changes
    return Problem(seq_q=mask.seq_q, seq_k=mask.seq_k, dtype=dtype, **sizes)


def inputs(problem: Problem, seed: int = 0) -> Tensors:
    """q, k, v, dout."""
    random = torch.Generator().manual_seed(seed)

    def draw(seq: int, heads: int) -> torch.Tensor:
        shape = (problem.batch, seq, heads, problem.head_dim)
        return torch.randn(shape, generator=random).to(getattr(torch, problem.dtype))

    p = problem
    return (
        draw(p.seq_q, p.heads_q), draw(p.seq_k, p.heads_kv), draw(p.seq_k, p.heads_kv),
        draw(p.seq_q, p.heads_q),
    )  # fmt: skip


def dense(problem: Problem, mask: AttnMask, tensors: Tensors) -> Tensors:
    """out, lse, dq, dk, dv in float64 from the definition."""
    q, k, v, dout = (x.double().transpose(1, 2) for x in tensors)
    k, v = (x.repeat_interleave(problem.group, 1) for x in (k, v))
    visible = torch.from_numpy(mask.to_dense())
    scores = (q @ k.mT * problem.softmax_scale).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    p = torch.where(visible, (scores - lse[..., None]).exp(), 0.0)
    out = p @ v
    ds = p * (dout @ v.mT - (dout * out).sum(-1, True)) * problem.softmax_scale
    dk, dv = (
        x.unflatten(1, (problem.heads_kv, problem.group)).sum(2) for x in (ds.mT @ q, p.mT @ dout)
    )
    out, dq, dk, dv = (x.transpose(1, 2) for x in (out, ds @ k, dk, dv))
    return out, lse, dq, dk, dv


def run(problem: Problem, mask: AttnMask, tensors: Tensors, **params: int) -> Tensors:
    operator = Bands(**params)
    assert operator.unsupported(problem, mask, "cpu") is None
    plan = operator.prepare(mask, problem, "cpu")
    q, k, v, dout = tensors
    out, lse = operator.forward(QKV(q, k, v), plan)
    return out, lse, *operator.backward(BackwardInputs(dout, q, k, v, out, lse), plan)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    # Inputs are of order 1; gradients that cancel exactly are compared on that scale.
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=2.0))


def check(problem: Problem, mask: AttnMask, tensors: Tensors, results: Tensors) -> None:
    """Compare out, lse, dq, dk, dv with the dense reference."""
    expected = dense(problem, mask, tensors)
    tolerance, lse_tolerance = TOLERANCE[problem.dtype]
    empty_rows = torch.from_numpy(mask.empty_rows())
    assert results[1].dtype == torch.float32
    assert torch.equal(results[1] == -torch.inf, expected[1] == -torch.inf)
    assert not results[0][:, empty_rows].any()
    assert not results[2][:, empty_rows].any()
    lse_error = (results[1] - expected[1])[..., ~empty_rows].abs()
    assert not lse_error.numel() or float(lse_error.max()) <= lse_tolerance
    for i, name in ((0, "out"), (2, "dq"), (3, "dk"), (4, "dv")):
        assert results[i].shape == expected[i].shape
        assert results[i].dtype == tensors[0].dtype
        assert relative_error(results[i], expected[i]) <= tolerance, name


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    ("dtype", "batch", "heads_q", "heads_kv"),
    [("float32", 1, 2, 2), ("float32", 2, 4, 2), ("bfloat16", 1, 4, 2)],
)
def test_against_dense(name: str, dtype: str, batch: int, heads_q: int, heads_kv: int) -> None:
    mask = mask_of(name)
    problem = problem_of(mask, dtype, batch=batch, heads_q=heads_q, heads_kv=heads_kv)
    tensors = inputs(problem)
    check(problem, mask, tensors, run(problem, mask, tensors))


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("name", ["documents", "sinks_window", "empty_rows_in_tile"])
def test_other_dtypes(name: str, dtype: str) -> None:
    problem = problem_of(mask_of(name), dtype, heads_q=6)
    tensors = inputs(problem)
    check(problem, mask_of(name), tensors, run(problem, mask_of(name), tensors))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("mask", "queries"), [("causal", 100), ("causal", 800), ("full", 300)])
def test_a_mask_that_is_one_square(mask: str, queries: int, dtype: str) -> None:
    """Read in place or copied; and a row without an lse contributes nothing."""
    square = build(mask, 270 if mask == "full" else queries, seq_q=queries)
    problem = problem_of(square, dtype, batch=2, heads_q=4, heads_kv=2)
    tensors = inputs(problem)
    out, lse, *grads = run(problem, square, tensors)
    check(problem, square, tensors, (out, lse, *grads))
    lse[:, :, 7] = -torch.inf
    operator = Bands()
    plan = operator.prepare(square, problem, "cpu")
    dq, dk, _ = operator.backward(BackwardInputs(tensors[3], *tensors[:3], out, lse), plan)
    assert not dq[:, 7].any()
    assert torch.isfinite(dk).all()


@pytest.mark.parametrize("tile", [1, 7, 64])
@pytest.mark.parametrize("head_dim", [8, 40, 128])
def test_tiles_and_head_dims(tile: int, head_dim: int) -> None:
    mask = mask_of("global_window")
    problem = problem_of(mask, head_dim=head_dim, scale=0.1)
    tensors = inputs(problem)
    check(problem, mask, tensors, run(problem, mask, tensors, tile=tile))


def test_several_head_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little scratch memory: uneven groups of heads, and many chunks of keys."""
    monkeypatch.setattr(cpu, "MAX_HEAD_SCORES", 1000)
    monkeypatch.setattr(cpu, "MAX_SCORES", 2000)
    for name in ("wide", "crossing_bands", "tiny_documents"):
        problem = problem_of(mask_of(name), "bfloat16", batch=2, heads_q=6, heads_kv=3)
        tensors = inputs(problem)
        check(problem, mask_of(name), tensors, run(problem, mask_of(name), tensors))


@st.composite
def disjoint_slices(draw: st.DrawFn) -> AttnMask:
    """A grid of rectangles, each empty or with a band in it."""
    seq_q, seq_k = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=5))}) for n in (seq_q, seq_k)]
    slices = []
    for q0, q1 in zip(cuts[0], cuts[0][1:], strict=False):
        for k0, k1 in zip(cuts[1], cuts[1][1:], strict=False):
            if draw(st.booleans()):
                lo = draw(st.integers(-90, 90))
                slices.append((q0, q1, k0, k1, lo, lo + draw(st.integers(0, 90))))
    return AttnMask.from_slices(seq_q, seq_k, slices)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(disjoint_slices(), st.sampled_from([3, 16, 128]))
def test_random_slices(mask: AttnMask, tile: int) -> None:
    problem = problem_of(mask, heads_q=2, heads_kv=1, head_dim=8)
    tensors = inputs(problem)
    check(problem, mask, tensors, run(problem, mask, tensors, tile=tile))


@pytest.mark.parametrize("name", ["causal", "sinks_window", "empty_rows", "tiny_documents"])
def test_shards_of_a_mask(name: str) -> None:
    """Zigzag and striped shards, as in context parallelism."""
    whole = mask_of(name)
    ends = np.linspace(0, min(whole.seq_q, whole.seq_k), 5).astype(int)
    ranges = np.column_stack([ends[:-1], np.diff(ends)])
    for mask in (whole.restrict(ranges[[1, 2]], ranges[[0, 3]]), whole.stride(3, 1, [2, 0])):
        problem = problem_of(mask)
        tensors = inputs(problem)
        check(problem, mask, tensors, run(problem, mask, tensors))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["causal", "window", "empty_rows", "documents"])
def test_gradients_of_key_subsets_add_up(name: str, dtype: str) -> None:
    """With the out and lse of all keys, the gradients of two halves of the keys sum to the
    whole."""
    mask = mask_of(name)
    problem = problem_of(mask, dtype)
    q, k, v, dout = tensors = inputs(problem)
    operator = Bands()
    out, lse = operator.forward(QKV(q, k, v), operator.prepare(mask, problem, "cpu"))
    half = mask.seq_k // 2
    total = [torch.zeros_like(x) for x in (q, k, v)]
    for k0, k1 in ((0, half), (half, mask.seq_k)):
        part = mask.crop(0, mask.seq_q, k0, k1)
        plan = operator.prepare(part, problem_of(part, dtype), "cpu")
        grads = operator.backward(BackwardInputs(dout, q, k[:, k0:k1], v[:, k0:k1], out, lse), plan)
        for x, gradient, keys in zip(
            total, grads, (slice(None), slice(k0, k1), slice(k0, k1)), strict=True
        ):
            x[:, keys] += gradient
    check(problem, mask, tensors, (out, lse, *total))


@pytest.mark.parametrize("name", ["causal", "window"])
def test_external_lse_of_minus_infinity(name: str) -> None:
    mask = mask_of(name)
    problem = problem_of(mask)
    q, k, v, dout = inputs(problem)
    operator = Bands()
    plan = operator.prepare(mask, problem, "cpu")
    out, lse = operator.forward(QKV(q, k, v), plan)
    whole = operator.backward(BackwardInputs(dout, q, k, v, out, lse), plan)
    lse[..., 100:] = -torch.inf
    dq, dk, dv = operator.backward(BackwardInputs(dout, q, k, v, out, lse), plan)
    torch.testing.assert_close(dq[:, :100], whole[0][:, :100])
    assert not dq[:, 100:].any()
    assert torch.isfinite(dk).all()
    assert torch.isfinite(dv).all()
    assert not dv[:, 100:].any()


@pytest.mark.parametrize("name", ["empty_rows", "sinks_window", "documents", "empty", "wide"])
def test_uninitialised_memory_does_not_matter(name: str) -> None:
    """torch fills new memory with NaN in deterministic mode."""
    problem = problem_of(mask_of(name), heads_q=4)
    tensors = inputs(problem)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        results = run(problem, mask_of(name), tensors)
    finally:
        torch.use_deterministic_algorithms(before)
    check(problem, mask_of(name), tensors, results)
    for a, b in zip(results, run(problem, mask_of(name), tensors), strict=True):
        assert torch.equal(a, b)


def test_inputs_are_unchanged_and_strides_do_not_matter() -> None:
    mask = mask_of("sinks_window")
    problem = problem_of(mask, heads_q=4)
    tensors = inputs(problem)
    copies = [x.clone() for x in tensors]
    results = run(problem, mask, tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    strided = tuple(torch.cat([x, x], 2).transpose(1, 2).contiguous().transpose(1, 2)[
        :, :, : x.shape[2]] for x in tensors)  # fmt: skip
    for a, b in zip(results, run(problem, mask, strided), strict=True):
        torch.testing.assert_close(a, b)


def test_scores_of_thousands() -> None:
    """Only the difference from the row maximum may be exponentiated."""
    mask = mask_of("wide")
    problem = problem_of(mask, "float64", scale=1000.0)
    tensors = inputs(problem)
    results = run(problem, mask, tensors)
    assert relative_error(results[0], dense(problem, mask, tensors)[0]) < 1e-9


def test_plan_is_linear() -> None:
    n = 1 << 20
    ends = np.unique(np.append(np.random.default_rng(0).integers(1, n, 2000), n))
    plan = layout(AttnMask.from_slices(n, n, documents(*ends.tolist())))
    assert len(plan.tiles) + len(plan.squares) <= 2001
    assert len(layout(AttnMask.from_slices(n, n, [(0, n, 0, n, -512, 0)])).tiles) == n // 128
    causal = layout(AttnMask.from_slices(n, n, [(0, n, 0, n, -n, 0)]))
    assert causal.tiles == ()
    assert [tuple(square) for square in causal.squares] == [(0, n, 0, n, True, 0, True)]


def test_refusals() -> None:
    mask = mask_of("causal")
    bands = Bands()
    assert "softcap" in (bands.unsupported(problem_of(mask, softcap=1.0), mask, "cpu") or "")
    assert "mps" in (bands.unsupported(problem_of(mask), mask, "mps") or "")
    with pytest.raises(ValueError, match="tile"):
        Bands(-1)


def test_declaration_needs_no_torch() -> None:
    code = "import sys, cpbench.kernels.bands.operator; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)
    assert [info.name for info in OPERATORS] == ["bands"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_documents_of_all_lengths(dtype: str) -> None:
    """Strips of short squares, whole long ones, and a tile of documents of a few tokens."""
    ends = np.cumsum([5, 3, 127, 131, 530, 770]).tolist()
    mask = AttnMask.from_slices(ends[-1], ends[-1], documents(*ends))
    parts = layout(mask)
    assert len(parts.tiles) == 1
    assert [len(fused.calls(square)) for square in parts.squares] == [1, 2, 4, 1]
    assert all(part.alone for part in (*parts.tiles, *parts.squares))
    assert parts.key_gaps == ()
    problem = problem_of(mask, dtype, heads_q=2, heads_kv=1)
    tensors = inputs(problem)
    check(problem, mask, tensors, run(problem, mask, tensors))


def test_shared_keys_are_added_up() -> None:
    """Of three squares one has keys of its own."""
    slices = [
        (0, 300, 0, 300, -300, 0),
        (300, 400, 200, 250, -400, 400),
        (400, 500, 310, 400, -500, 500),
    ]
    mask = AttnMask.from_slices(500, 420, slices)
    parts = layout(mask)
    assert [square.alone for square in parts.squares] == [False, False, True]
    assert parts.key_gaps == ((0, 310), (400, 420))
    for dtype in ("float32", "bfloat16"):
        problem = problem_of(mask, dtype)
        tensors = inputs(problem)
        check(problem, mask, tensors, run(problem, mask, tensors))


def test_squares_in_bfloat16_are_not_converted() -> None:
    """One causal square is the result of the fused kernel for bfloat16, bit for bit."""
    n = 64
    square = AttnMask.from_slices(n, n, [(0, n, 0, n, 1 - n, 0)])
    problem = problem_of(square, "bfloat16")
    tensors = inputs(problem)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors[:3])
    expected = flash(q, k, v, 0.0, True)[0].transpose(1, 2)
    assert torch.equal(run(problem, square, tensors)[0], expected)
