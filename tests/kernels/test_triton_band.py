"""`triton_band`: tile lists compared with the dense mask, and kernels compared with float64.

The kernels run under Triton's interpreter.  ``test_operators`` runs all static masks too.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from typing import Any

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cpbench
from cpbench import masks
from cpbench.core.problem import Problem
from cpbench.kernels.triton import configs as triton_configs
from cpbench.kernels.triton import launch as triton_launch
from cpbench.kernels.triton.launch import ConfigOverrides
from cpbench.kernels.triton.plan import MIN_SPLIT_TILES, TilePlan, grouped_order, plan_tiles
from cpbench.masks.attn_mask import AttnMask
from cpbench.sweep.verification.cases import MASKS, SEQ_LEN

FAR = 10**6
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
DOCS = "doc_lens=[1,19,33,2,12]"
SMALL_MASKS = (
    "full",
    "causal",
    f"full_document:{DOCS}",
    f"causal_document:{DOCS}",
    "sliding_window:window=9",
    "sliding_window_causal:window=20",
    "prefix_lm_causal:prefix_len=13",
    f"prefix_lm_document:prefix_len=5,{DOCS}",
    f"share_question:{DOCS}",
    f"causal_blockwise:{DOCS}",
    "global_sliding_window:num_global=3,window=8",
    f"block_causal_document:block_size=8,{DOCS}",
    "streaming:num_sinks=4,window=11",
)


def visit_counts(
    plan: TilePlan, number: int, mask: AttnMask, block_q: int, block_k: int
) -> np.ndarray:
    """``[S, T]``: how often a plan visits each pair, as the kernels do."""
    lists = plan.lists
    counts = np.zeros((mask.seq_q, mask.seq_k), dtype=int)
    for row, run0, run1, tile0, tile1, _ in lists.items[number]:
        q = slice(row * block_q, min((row + 1) * block_q, mask.seq_q))
        for begin, end in lists.runs[run0:run1]:
            assert begin < end
            assert end * block_k <= mask.seq_k, "runs are loaded without bounds checks"
            counts[q, begin * block_k : end * block_k] += 1
        for t in range(tile0, tile1):
            start = lists.tiles[t] * block_k
            visible = _visible_pairs(lists, t, np.arange(q.start, q.stop), start, block_k)
            keys = slice(start, min(start + block_k, mask.seq_k))
            assert not visible[:, keys.stop - start :].any()
            counts[q, keys] += visible[:, : keys.stop - start]
    return counts


def _visible_pairs(lists: object, t: int, rows: np.ndarray, start: int, block_k: int) -> np.ndarray:
    """The pairs of a partial tile that ``apply_mask`` leaves visible."""
    cols = np.arange(start, start + block_k)
    hidden = np.zeros((len(rows), block_k), dtype=bool)
    last = np.full(len(rows), -1)
    for layer in range(*lists.tile_layers[t]):
        begin, end = last + 1, last
        in_layer = np.zeros(len(rows), dtype=bool)
        for q0, q1, k0, k1, lo, hi in lists.slices[lists.layers[layer] : lists.layers[layer + 1]]:
            in_slice = (rows >= q0) & (rows < q1)
            assert not (in_layer & in_slice).any(), "two intervals of a row in one layer"
            in_layer |= in_slice
            begin = np.where(in_slice, np.maximum(rows + lo, k0), begin)
            end = np.where(in_slice, np.minimum(rows + hi, k1 - 1), end)
        assert (begin > last)[in_layer].all(), "layers must go from left to right"
        hidden |= (cols > last[:, None]) & (cols < begin[:, None])
        last = end
    return ~(hidden | (cols > last[:, None]))


def _check_lists(mask: AttnMask, block_q: int, block_k: int, parts: int = 1) -> TilePlan:
    plan = plan_tiles([mask], block_q, block_k, parts)
    assert np.array_equal(visit_counts(plan, 0, mask, block_q, block_k), mask.to_dense())
    assert sorted(plan.lists.order[0]) == list(range(plan.lists.items.shape[1]))
    return plan


@pytest.mark.parametrize("blocks", [(64, 64), (128, 32), (32, 128)], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=lambda text: text.split(":")[0])
def test_lists_are_the_mask(mask: str, blocks: tuple[int, int]) -> None:
    built = masks.build(mask, SEQ_LEN)
    _check_lists(built, *blocks)
    _check_lists(built.transpose(), *blocks)


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(1, 30), st.integers(0, 50), st.integers(1, 30),
                  st.integers(-60, 40), st.integers(0, 40)),
        max_size=6,
    ),
    st.sampled_from([(16, 16), (32, 16), (16, 32)]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_lists_of_any_slices(rows: list[tuple[int, ...]], blocks: tuple[int, int]) -> None:
    kept = AttnMask.from_slices(71, 67, [])
    for q0, n, k0, m, lo, width in rows:
        slices = [*kept.slices.tolist(), (q0, q0 + n, k0, k0 + m, lo, lo + width)]
        more = AttnMask.from_slices(71, 67, slices)
        kept = kept if more.overlap_area() else more
    _check_lists(kept, *blocks)
    _check_lists(kept, *blocks, parts=3)


def test_split_rows_have_slots_and_add_up() -> None:
    mask = masks.build("streaming", 600, num_sinks=40, window=300).crop(570, 600, 0, 600)
    plan = _check_lists(mask, 32, 16, parts=4)
    assert plan.splits.tolist() == [[0, 0, plan.slots]]
    assert 2 <= plan.slots <= 4
    slots = plan.lists.items[0, :, 5]
    assert sorted(slots) == list(range(plan.slots))
    unsplit = plan_tiles([mask], 32, 16, parts=1)
    assert unsplit.slots == 0
    short = plan_tiles([masks.build("causal", 40)], 16, 16, parts=4)
    assert short.slots == 0, f"rows of up to {MIN_SPLIT_TILES} tiles are not split"


def test_rows_are_ordered_longest_first() -> None:
    plan = plan_tiles([masks.build("causal", 600)], 64, 64)
    assert plan.lists.order[0].tolist() == list(range(9, -1, -1))
    both = plan_tiles([masks.build("causal", 600), masks.build("full", 600)], 64, 64)
    assert grouped_order(both, 2).shape == (1, 10)
    assert grouped_order(both, 2)[0, 0] == 9


def test_lists_are_linear_in_runs_and_partial_tiles() -> None:
    mask = masks.build("causal", 1 << 20)
    plan = plan_tiles([mask], 128, 128)
    assert plan.visited == 8192 * 8193 // 2
    lists = plan.lists
    assert len(lists.runs) == 8191
    assert len(lists.tiles) == len(lists.slices) == 8192


# --- kernels ------------------------------------------------------------------------------------


def compare(
    mask: AttnMask,
    operator: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    value_dim: int = 0,
) -> None:
    """Compare out, lse and gradients with dense float64."""
    batch, heads_q, heads_kv, dim = shape
    tokens = max(mask.seq_q, mask.seq_k)
    q, k, v, dout = naive.random_inputs(
        batch, tokens, heads_q, heads_kv, dim, dtype, value_dim=value_dim
    )
    q, dout = (x[:, : mask.seq_q].contiguous() for x in (q, dout))
    k, v = (x[:, : mask.seq_k].contiguous() for x in (k, v))
    expected = naive.attention(q, k, v, dout, mask)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = cpbench.attention(q, k, v, mask, operator=operator)
    out.backward(dout)
    results = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    for name in naive.TENSORS:
        error = naive.error(results[name].detach(), expected[name])
        assert error < LIMIT[dtype], f"{name} has an error of {error:.2g}"


@pytest.mark.parametrize("mask", SMALL_MASKS, ids=lambda text: text.split(":")[0])
def test_every_static_mask_at_67_tokens_in_small_tiles(mask: str) -> None:
    operator = "triton_band:block_q=16,block_k=32"
    compare(masks.build(mask, 67), operator, (1, 2, 1, 64), torch.float32)


@pytest.mark.parametrize("mask", ["causal", "streaming:num_sinks=4,window=37"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_at_131_tokens_in_two_batches(mask: str, dtype: torch.dtype) -> None:
    compare(masks.build(mask, 131), "triton_band", (2, 2, 1, 64), dtype)


@pytest.mark.parametrize("head_dim", [16, 40, 72, 96, 128, 192, 256])
def test_head_dims(head_dim: int) -> None:
    compare(masks.build("causal", 83), "triton_band", (1, 2, 1, head_dim), torch.float32)


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [(8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (80, (64, 16)), (96, (64, 32)),
     (112, (128, 0)), (128, (128, 0)), (160, (128, 32)), (192, (128, 64)), (256, (256, 0))],
)  # fmt: skip
def test_a_head_dimension_is_divided_where_that_pads_less(
    head_dim: int, parts: tuple[int, int]
) -> None:
    assert triton_configs.head_parts(head_dim) == parts


@pytest.mark.parametrize("head_dim", [16, 96])
@pytest.mark.parametrize("operator", ["triton_band", "triton_band:descriptors=1"])
def test_dk_and_dv_in_a_launch_each(operator: str, head_dim: int) -> None:
    mask = masks.build("sliding_window_causal", 150, window=40)
    separator = "," if ":" in operator else ":"
    compare(mask, f"{operator}{separator}launches=2", (1, 4, 2, head_dim), torch.float32)


@pytest.mark.parametrize(("heads", "group"), [(6, 1), (6, 3), (5, 1), (1, 1)])
def test_every_head_is_in_one_section(
    heads: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sections of several whole groups, of which the last may have fewer, compute all heads."""
    sizes, section = [], triton_launch._section

    def recorded(*args: Any) -> int:
        sizes.append(section(*args))
        return sizes[-1]

    monkeypatch.setattr(triton_launch, "_section", recorded)
    monkeypatch.setattr(triton_launch, "INTERPRETER_CACHE_BYTES", 4 * 2 * 70 * 16 * 4 * 2)
    shape = (1, heads, heads // group, 16)
    compare(masks.build("causal", 70), "triton_band", shape, torch.float32)
    assert all(size % group == 0 for size in sizes[:2])
    assert (heads // group > 2) == any(size < heads for size in sizes[:2])


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "options"),
    [
        (192, 128, ""),
        (192, 128, ":parts=3,block_k=16"),
        (192, 128, ":descriptors=1,block_q=32"),
        (64, 96, ":launches=2"),
    ],
)
def test_values_of_another_head_dim(head_dim: int, value_dim: int, options: str) -> None:
    shape = (1, 4, 2, head_dim)
    compare(masks.build("causal", 83), f"triton_band{options}", shape, torch.bfloat16, value_dim)


def test_the_wider_head_dim_chooses_the_configuration() -> None:
    overrides = ConfigOverrides("triton_band", False, 0, 0)
    sizes = {"batch": 1, "seq_q": 8, "seq_k": 8, "heads_q": 1, "heads_kv": 1, "dtype": "float32"}
    narrow, wide = Problem(**sizes, head_dim=64), Problem(**sizes, head_dim=64, head_dim_v=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "compile_target", lambda device: "cuda:86")
        patch.setattr(triton_launch, "gpu_name", lambda device: "")
        assert overrides.refusal(narrow, "cuda") is None
        assert "float32 up to head_dim 128" in str(overrides.refusal(wide, "cuda"))
        half = [replace(problem, dtype="bfloat16") for problem in (narrow, wide)]
        configs = [overrides.configs(problem, "cuda") for problem in half]
        swapped = replace(half[1], head_dim=256, head_dim_v=64)
        assert configs[0] != configs[1] == overrides.configs(swapped, "cuda")


@pytest.mark.parametrize("extents", [(1, 300), (37, 211), (130, 61)], ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_queries_and_keys_differ_and_rows_are_split(extents: tuple[int, int], parts: int) -> None:
    seq_q, seq_k = extents
    mask = AttnMask.from_slices(seq_q, seq_k, [(0, seq_q, 0, seq_k, -FAR, seq_k - seq_q + 5)])
    operator = f"triton_band:parts={parts},block_k=16"
    compare(mask, operator, (1, 4, 2, 64), torch.float32)


def test_tensor_descriptors_read_the_same() -> None:
    mask = masks.build("streaming", 150, num_sinks=4, window=70)
    for dim in (64, 96):
        compare(mask, "triton_band:descriptors=1,block_q=32", (1, 2, 1, dim), torch.float32)


def test_offsets_beyond_32_bits() -> None:
    """A token stride for which offsets do not fit an int32; the untouched memory of a large tensor
    is never allocated."""
    tokens, stride = 300, (1 << 23) + 8
    assert tokens * stride > 1 << 31
    shape, strides = (1, tokens, 1, 16), (tokens * stride, stride, 16, 1)
    inputs = naive.random_inputs(1, tokens, 1, 1, 16, torch.float16)
    buffers = [torch.empty(tokens * stride, dtype=torch.float16) for _ in range(3)]
    views = [x.as_strided(shape, strides) for x in buffers]
    for view, x in zip(views, inputs[:3], strict=True):
        view.copy_(x)
    mask = masks.build("sliding_window_causal", tokens, window=20)
    expected = naive.attention(*inputs, mask)
    out, _ = cpbench.attention(*views, mask, operator="triton_band")
    assert naive.error(out, expected["out"]) < LIMIT[torch.float16]


def test_backward_is_deterministic() -> None:
    mask = masks.build("causal", 200)
    runs = []
    for _ in range(2):
        q, k, v, dout = naive.random_inputs(1, 200, 4, 2, 64, torch.bfloat16)
        for x in (q, k, v):
            x.requires_grad_()
        cpbench.attention(q, k, v, mask, operator="triton_band")[0].backward(dout)
        runs.append((q.grad, k.grad, v.grad))
    for first, second in pairwise(runs):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="block_q = 48 must be a power of two from 16 to 256"):
        cpbench.attention(*_tiny(), masks.build("causal", 8), operator="triton_band:block_q=48")
    before = os.environ.pop("TRITON_INTERPRET")
    try:
        with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 to check it there"):
            cpbench.attention(*_tiny(), masks.build("full", 8), operator="triton_band")
    finally:
        os.environ["TRITON_INTERPRET"] = before


def _tiny() -> list[torch.Tensor]:
    return naive.random_inputs(1, 8, 1, 1, 16, torch.float32)[:3]


def test_inputs_with_a_strided_head_dimension() -> None:
    """Every other element of a wider tensor."""
    wide = [torch.randn(1, 70, 2, 32) for _ in range(3)]
    strided = [x[..., ::2] for x in wide]
    mask = masks.build("causal", 70)
    expected = cpbench.attention(*strided, mask, operator="reference")
    results = cpbench.attention(*strided, mask, operator="triton_band")
    for a, b in zip(results, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_zero_and_negative_scales(scale: float) -> None:
    inputs = [torch.randn(1, 70, 2, 16, requires_grad=True) for _ in range(3)]
    mask = masks.build("sliding_window_causal", 70, window=9)
    dout = torch.randn(1, 70, 2, 16)
    grads = {}
    for name in ("reference", "triton_band"):
        out, _ = cpbench.attention(*inputs, mask, operator=name, scale=scale)
        grads[name] = torch.autograd.grad(out, inputs, dout)
    for a, b in zip(grads["triton_band"], grads["reference"], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_nan_in_a_query_stays_nan() -> None:
    q, k, v = (torch.randn(1, 40, 1, 16) for _ in range(3))
    q[0, 7] = float("nan")
    out, lse = cpbench.attention(q, k, v, masks.build("causal", 40), operator="triton_band")
    assert out[0, 7].isnan().all()
    assert lse[0, 0, 7].isnan()
    assert lse[0, 0, 8].isfinite()


@pytest.mark.parametrize(
    ("target", "head_dim", "words"),
    [
        ("cuda:75", 64, "compute capability 8.0"),
        ("hip:gfx90a", 64, "gfx942"),
        ("cuda:86", 256, "float32 up to head_dim 128"),
        ("cuda:90", 256, None),
        ("cuda:86", 128, None),
    ],
)
def test_unsupported_targets_are_refused(target: str, head_dim: int, words: str | None) -> None:
    from cpbench.kernels.triton.configs import target_refusal

    reason = target_refusal(target, head_dim, 4)
    assert (words in reason) if words and reason else words is reason
