"""Selections computed in strips of blocks of queries."""

from __future__ import annotations

import naive
import pytest
import torch

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.kernels.gathered import strips
from cpbench.masks import build
from cpbench.selectors.common.selection import Blocks, block_grid

TOKENS, DIM, BATCH, HEADS = 203, 8, 2, (4, 2)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.9])
@pytest.mark.parametrize("mask", ["causal", "full", "causal_document:doc_lens=[70,3,130]"])
def test_strips_compute_the_selection(mask: str, share: float, columns: bool) -> None:
    """out, lse and gradients equal float64 autograd, also of rows that see nothing."""
    random = torch.Generator().manual_seed(0)
    grid = block_grid(build(mask, TOKENS), 16, 32, "cpu")
    kept = torch.rand((BATCH, HEADS[0], *grid.areas.shape), generator=random) < share
    kept[:, 0, :3] = False
    columns_BHT = torch.rand((BATCH, HEADS[0], TOKENS), generator=random) < 0.05
    selection = Blocks(grid, kept & grid.allowed, columns_BHT if columns else None)
    q, k, v, dout = (
        torch.randn(BATCH, TOKENS, h, DIM, generator=random)
        for h in (HEADS[0], HEADS[1], HEADS[1], HEADS[0])
    )
    plan = strips.plan(selection, DIM**-0.5)
    assert plan is not None
    if share == 0.9:
        assert max(strip.x1 - strip.x0 for head in plan.strips for strip in head) > 1
    out, lse = strips.forward(QKV(q, k, v), plan)
    assert lse is not None
    grads = strips.backward(BackwardInputs(dout, q, k, v, out, lse), plan)

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wide = [x.repeat_interleave(HEADS[0] // x.shape[2], 2) for x in leaves]
    visible = selection.dense_rows(0, TOKENS)
    scores = torch.einsum("bshd,bthd->bhst", *wide[:2]) * DIM**-0.5
    expected_lse = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
    finite = expected_lse.masked_fill(~visible.any(-1), 0.0)[..., None]
    probs = torch.where(visible, (scores - finite).exp(), 0.0)
    expected = torch.einsum("bhst,bthd->bshd", probs, wide[2])
    pairs = [(out, expected.detach()), (lse, expected_lse.detach())]
    pairs += zip(grads, torch.autograd.grad(expected, leaves, dout.double()), strict=True)
    for actual, value in pairs:
        assert naive.error(actual, value) < 2e-6


def test_sparse_blocks_are_gathered_and_dense_ones_computed_in_strips() -> None:
    grid = block_grid(build("causal", 4096), 32, 32, "cpu")
    random = torch.rand((1, 1, *grid.areas.shape), generator=torch.Generator().manual_seed(0))
    for share, in_strips in ((0.1, False), (0.95, True)):
        selection = Blocks(grid, (random < share) & grid.allowed)
        assert (strips.plan(selection, 1.0, required=False) is not None) == in_strips
