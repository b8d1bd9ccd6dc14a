"""Per-head masks: their definitions, and every operator that supports them."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import torch

import cpbench
from cpbench import masks
from cpbench.core import registry
from cpbench.core.operator import Unsupported
from cpbench.core.registry import RegistrationError
from cpbench.core.spec import Spec
from cpbench.kernels.triton.plan import plan_tiles
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.sweep.verification.cases import DILATED_MASKS, HEAD_MASKS

OPERATORS = [
    name
    for name, info in registry.operators().items()
    if "heads" in info.masks and "cpu" in info.devices and info.backward_on
]


def build_heads(spec: str, seq_len: int, num_heads: int) -> HeadMasks:
    """A per-head mask, of which some invariants are checked."""
    built = masks.build_heads(spec, seq_len, num_heads)
    assert isinstance(built, HeadMasks)
    for mask in built.masks:
        assert mask.area == mask.to_dense().sum()
        assert mask.overlap_area() == 0
    return built


# --- definitions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kept"), [(0.1, 1), (0.5, 3), (1.0, 5)])
def test_uniform_blocks_keep_their_share_of_every_block_row(keep: float, kept: int) -> None:
    built = build_heads(
        f"block_sparse_uniform:block_size=16,keep={keep}", 75, 3
    )  # 5 blocks, the last one shorter
    for mask in built.masks:
        dense = mask.to_dense()
        for i in range(0, 75, 16):
            rows = dense[i : i + 16]
            assert (rows == rows[0]).all()
            blocks = [rows[0, j : j + 16] for j in range(0, 75, 16)]
            assert all(len(set(block.tolist())) == 1 for block in blocks)
            assert sum(block[0] for block in blocks) == kept
    assert keep == 1.0 or len({mask.digest for mask in built.masks}) > 1


def test_causal_blocks_keep_the_diagonal_and_see_no_later_keys() -> None:
    built = build_heads("block_sparse_uniform:block_size=16,keep=0.4,causal=true", 80, 2)
    for mask in built.masks:
        dense = mask.to_dense()
        assert not np.triu(dense, 1).any()
        assert dense.diagonal().all()
        for n in range(5):
            kept = sum(dense[16 * n + 15, 16 * m] for m in range(n + 1))
            assert kept == max(1, round(0.4 * (n + 1)))


def test_variable_blocks_partition_queries_and_keys_alike() -> None:
    built = build_heads("block_sparse_variable:block_size=20,least=6,keep=0.5", 200, 4)
    for mask in built.masks:
        dense = mask.to_dense()
        rows = np.flatnonzero(np.any(dense[1:] != dense[:-1], axis=1)) + 1
        cols = np.flatnonzero(np.any(dense[:, 1:] != dense[:, :-1], axis=0)) + 1
        edges = np.unique(np.concatenate([[0], rows, cols, [200]]))
        assert np.diff(edges).min() >= 6
        assert len(edges) <= 11


def test_vertical_slash_is_columns_and_diagonals() -> None:
    built = build_heads("vertical_slash:num_vertical=5,num_slash=4", 90, 3)
    i, j = np.arange(90)[:, None], np.arange(90)[None, :]
    for mask in built.masks:
        dense = mask.to_dense()
        diagonals = [d for d in range(90) if dense.diagonal(-d).all()]
        columns = [c for c in range(90) if dense[c:, c].all()]
        assert 0 in diagonals
        assert len(diagonals) <= 5
        expected = (j <= i) & (np.isin(i - j, diagonals) | np.isin(j, columns))
        assert np.array_equal(dense, expected)


def test_the_mask_of_a_head_does_not_depend_on_the_number_of_heads() -> None:
    for spec in HEAD_MASKS:
        few, many = build_heads(spec, 400, 2), build_heads(spec, 400, 5)
        assert few.masks == many.masks[:2]
        reseeded = masks.build_heads(Spec.parse(spec), 400, 2, seed=7)
        assert reseeded != few


def test_area_and_density_are_means_over_heads() -> None:
    full, causal = masks.build("full", 10), masks.build("causal", 10)
    mask = HeadMasks((full, causal))
    assert mask.area == (100 + 55) / 2
    assert mask.density == mask.area / 100
    assert mask.transpose().masks == (full, causal.transpose())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("block_sparse_uniform:keep=0", "keep = 0 is a share of the blocks"),
        ("block_sparse_uniform:keep=1.5", "keep = 1.5 is a share of the blocks"),
        ("block_sparse_uniform:block_size=0", "block_size = 0 must be at least 1"),
        ("block_sparse_variable:block_size=16,least=17", "least = 17 must be between 1 and"),
        ("vertical_slash:num_vertical=101", "num_vertical = 101 must be between 0 and seq_len"),
        ("vertical_slash:num_heads=2", "has no parameter 'num_heads'"),
    ],
)
def test_invalid_parameters_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masks.build_heads(spec, 100, 2)


def test_build_refuses_per_head_masks() -> None:
    with pytest.raises(ValueError, match="differs from head to head"):
        masks.build("block_sparse_uniform", 100)
    with pytest.raises(ValueError, match="same extents"):
        HeadMasks((masks.build("full", 3), masks.build("full", 4)))


def test_a_per_head_pattern_takes_num_heads() -> None:
    assert masks.pattern_info("vertical_slash").per_head
    assert "num_heads" not in masks.pattern_info("vertical_slash").params
    with pytest.raises(RegistrationError, match="must be a keyword"):
        masks.Pattern.of(_misnamed)


def _misnamed(seq_len: int, heads: int) -> AttnMask:
    """Query i sees nothing."""
    return AttnMask.from_slices(seq_len, seq_len, [])


# --- operators ----------------------------------------------------------------------------------


def compare(operator: str, spec: str, seq_len: int, dtype: torch.dtype, limit: float) -> None:
    """Compare with float64, head by head: two batches, four query heads, two key/value heads."""
    built = masks.build_heads(spec, seq_len, 4)
    q, k, v, dout = naive.random_inputs(2, seq_len, 4, 2, 32, dtype)
    by_head = [
        naive.attention(
            q[:, :, h : h + 1], k[:, :, h // 2 : h // 2 + 1], v[:, :, h // 2 : h // 2 + 1],
            dout[:, :, h : h + 1], mask,
        )
        for h, mask in enumerate(built.masks)
    ]  # fmt: skip
    expected = {name: torch.cat([x[name] for x in by_head], 2) for name in ("out", "dq")}
    expected["lse"] = torch.cat([x["lse"] for x in by_head], 1)
    for name in ("dk", "dv"):
        pairs = [by_head[h][name] + by_head[h + 1][name] for h in (0, 2)]
        expected[name] = torch.cat(pairs, 2)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = cpbench.attention(q, k, v, built, operator=operator)
    out.backward(dout)
    actual = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    for name in naive.TENSORS:
        if actual[name] is not None:
            error = naive.error(actual[name].detach(), expected[name])
            assert error < limit, f"{name} is off by {error:.2g}"


@pytest.mark.parametrize("spec", HEAD_MASKS, ids=lambda text: text.split(":")[0])
@pytest.mark.parametrize("operator", OPERATORS)
def test_equals_float64(operator: str, spec: str) -> None:
    compare(operator, spec, 101, torch.float32, 2e-6)


@pytest.mark.parametrize("operator", OPERATORS)
def test_equals_float64_in_bfloat16(operator: str) -> None:
    compare(operator, HEAD_MASKS[0], 67, torch.bfloat16, 1.2e-2)


def test_each_head_has_its_own_tile_lists() -> None:
    built = build_heads("block_sparse_uniform:block_size=32,keep=0.3", 200, 3)
    found = plan_tiles(built.masks, 32, 32)
    assert found.lists.items.shape == (3, 7, 6)
    per_head = [plan_tiles([mask], 32, 32).visited for mask in built.masks]
    assert found.visited == sum(per_head)


def test_other_operators_refuse_per_head_masks() -> None:
    built = masks.build_heads(HEAD_MASKS[0], 64, 2)
    q, k, v, _ = naive.random_inputs(1, 64, 2, 2, 32, torch.float32)
    with pytest.raises(Unsupported, match="this one differs from head to head"):
        cpbench.attention(q, k, v, built, operator="flex")
    with pytest.raises(ValueError, match="masks of 2 heads do not fit 4 query heads"):
        cpbench.attention(*naive.random_inputs(1, 64, 4, 2, 32, torch.float32)[:3], built)


# --- dilated ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", DILATED_MASKS)
def test_dilated_masks_follow_their_definition(spec: str) -> None:
    built = masks.build_heads(spec, 150, 5)
    assert isinstance(built, DilatedMask)
    want = np.zeros((5, 150, 150))
    for h in range(5):
        for segment, step in built.branches:
            for i in range(150):
                for j in range(i // segment * segment, min(150, (i // segment + 1) * segment)):
                    both = {(x % segment - h % step) % step for x in (i, j)}
                    late = min(i % segment, j % segment) >= h % step
                    if both == {0} and late and (j <= i or not built.causal):
                        want[h, i, j] += 1
    assert want.max() > 1, "some pairs must occur several times"
    assert np.array_equal(built.counts(0, 150), want)
    assert built.area == want.sum() / 5
    assert np.array_equal(built.empty_rows(), want.sum(2) == 0)
    for line in (0, 77, 149):
        for h in range(5):
            seen = np.bincount(built.transpose().visible_keys(h, line), minlength=150)
            assert np.array_equal(seen, want[h, :, line])


@pytest.mark.parametrize("operator", ["dilated", "reference"])
@pytest.mark.parametrize("spec", DILATED_MASKS)
def test_dilated_attention_counts_pairs_with_multiplicity(operator: str, spec: str) -> None:
    built = masks.build_heads(spec, 131, 4)
    assert isinstance(built, DilatedMask)
    q, k, v, dout = naive.random_inputs(2, 131, 4, 2, 32, torch.float32)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wide = [x.repeat_interleave(2, dim=2) for x in leaves[1:]]
    scores = torch.einsum("bshd,bthd->bhst", leaves[0], wide[0]) * 32**-0.5
    weights = torch.exp(scores) * torch.as_tensor(built.counts(0, 131))
    total = weights.sum(-1, keepdim=True)
    blind = torch.as_tensor(built.empty_rows())
    probs = torch.where(blind[..., None], 0.0, weights / total.masked_fill(total == 0, 1.0))
    want_out = torch.einsum("bhst,bthd->bshd", probs, wide[1])
    want = [want_out, *torch.autograd.grad(want_out, leaves, dout.double())]
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = cpbench.attention(q, k, v, built, operator=operator)
    out.backward(dout)
    for found, right in zip((out, q.grad, k.grad, v.grad), want, strict=True):
        assert naive.error(found.detach(), right.detach()) < 2e-6
    assert naive.error(lse, total.squeeze(-1).log().detach()) < 2e-6


def test_dilated_masks_are_refused_by_other_operators() -> None:
    built = masks.build_heads(DILATED_MASKS[0], 64, 2)
    q, k, v, _ = naive.random_inputs(1, 64, 2, 2, 32, torch.float32)
    with pytest.raises(Unsupported, match=r"bands takes .* masks; this one differs"):
        cpbench.attention(q, k, v, built, operator="bands")
    with pytest.raises(ValueError, match="branches = 40 with ratio = 4 reach past"):
        masks.build_heads("dilated:branches=40", 64, 2)
