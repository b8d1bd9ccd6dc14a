"""Selections computed as calls of a fused kernel, for nodes of a tree of blocks of queries."""

from __future__ import annotations

import naive
import pytest
import torch

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.kernels.gathered import calls, tree
from cpbench.masks import build
from cpbench.masks.attn_mask import AttnMask
from cpbench.selectors.selections import Blocks, Lines, block_grid

TOKENS, DIM, BATCH, HEADS = 203, 8, 2, (4, 2)
SLICES = {
    # A causal square, of which some queries see more after the diagonal.
    "over_diagonal": [(0, 32, 0, 32, -32, 0), (0, 32, 32, 64, -99, 99), (32, 64, 0, 64, -99, 0)],
    # Causal squares of different queries over the same keys.
    "stacked": [(32 * i, 32 * i + 32, 0, 32, -99 * i - 32, -32 * i) for i in range(6)],
}


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("call_cost", [0, tree.CALL_COST])
@pytest.mark.parametrize("block_q", [16, 32])
@pytest.mark.parametrize(
    "mask", ["causal", "full", "causal_document:doc_lens=[70,3,130]", "over_diagonal", "stacked"]
)
def test_calls_compute_the_selection(
    mask: str,
    block_q: int,
    call_cost: int,
    share: float,
    lines: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """out, lse and gradients equal float64 autograd, also of rows that see nothing; the same where
    calls cost nothing, so that every node that shares keys is one."""
    monkeypatch.setattr(tree, "CALL_COST", call_cost)
    monkeypatch.setattr(tree, "ROW_COST", 20 if call_cost else 0)
    random = torch.Generator().manual_seed(0)
    in_slices = SLICES.get(mask)
    built = AttnMask.from_slices(TOKENS, TOKENS, in_slices) if in_slices else build(mask, TOKENS)
    grid = block_grid(built, block_q, 32, "cpu")
    if lines:
        shape = BATCH, HEADS[0], TOKENS
        flags = (torch.rand(shape, generator=random) < part for part in (share / 16, 0.05))
        selection: Blocks | Lines = Lines(grid, *flags)
    else:
        kept = torch.rand((BATCH, HEADS[0], *grid.areas.shape), generator=random) < share
        kept[:, 0, :3] = False
        selection = Blocks(grid, kept & grid.allowed)
    q, k, v, dout = (
        torch.randn(BATCH, TOKENS, h, DIM, generator=random)
        for h in (HEADS[0], HEADS[1], HEADS[1], HEADS[0])
    )
    plan = tree.plan(selection, DIM**-0.5)
    out, lse = calls.forward(QKV(q, k, v), plan)
    assert lse is not None
    grads = calls.backward(BackwardInputs(dout, q, k, v, out, lse), plan)

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


def test_a_dense_selection_is_one_causal_call() -> None:
    """Also that of a document, and beside keys that all of its queries see."""
    grid = block_grid(build("causal", 250), 32, 32, "cpu")
    plan = tree.plan(Blocks(grid, grid.allowed.expand(1, 1, -1, -1)), 1.0)
    ((call,),) = plan.calls
    assert (call.queries.numbers, call.keys.numbers) == (slice(0, 250), slice(0, 250))
    assert call.causal
    documents = block_grid(build("causal_document:doc_lens=[128,128]", 256), 32, 32, "cpu")
    plan = tree.plan(Blocks(documents, documents.allowed.expand(1, 1, -1, -1)), 1.0)
    ((call,),) = plan.calls
    assert (call.keys.numbers, call.parts, call.causal) == (slice(0, 256), 2, True)


def test_one_block_less_is_not_a_causal_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "CALL_COST", 0)
    monkeypatch.setattr(tree, "ROW_COST", 0)
    grid = block_grid(build("causal", 256), 32, 32, "cpu")
    kept = grid.allowed.clone()
    kept[5, 1] = False
    plan = tree.plan(Blocks(grid, kept[None, None]), 1.0)
    squares = [(call.queries.numbers, call.parts) for call in plan.calls[0] if call.causal]
    assert squares == [(slice(0, 128), 1), (slice(128, 192), 2), (slice(192, 256), 1)]


def test_keys_that_adjacent_queries_share_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cost in (("CALL_COST", 0), ("ROW_COST", 0), ("KEY_COST", 1)):
        monkeypatch.setattr(tree, name, cost)
    grid = block_grid(build("full", 256), 32, 32, "cpu")
    kept = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    kept[..., [1, 4]] = True
    kept[0, 0, 3, 6] = True
    plan = tree.plan(Blocks(grid, kept), 1.0)
    shared, *others = plan.calls[0]
    assert isinstance(shared.keys.numbers, torch.Tensor)
    assert (shared.queries.numbers, shared.keys.numbers.tolist()) == (slice(0, 256), [1, 4])
    assert shared.bias is None
    assert [(call.queries.numbers, call.keys.numbers) for call in others] == [
        (slice(96, 128), slice(192, 224))
    ]


def test_small_blocks_are_gathered_and_large_ones_are_calls() -> None:
    random = torch.Generator().manual_seed(0)
    for block, in_calls in ((8, False), (64, True)):
        grid = block_grid(build("causal", 2048), block, block, "cpu")
        kept = torch.rand((1, 1, *grid.areas.shape), generator=random) < 0.2
        plan = tree.plan_if_faster(Blocks(grid, kept & grid.allowed), 1.0)
        assert (plan is not None) == in_calls


@pytest.mark.parametrize(("queries", "keys"), [(5, 0), (0, 5)])
def test_nothing_to_attend_to(queries: int, keys: int) -> None:
    grid = block_grid(AttnMask.from_slices(queries, keys, []), 4, 4, "cpu")
    kept = grid.allowed.expand(2, 3, -1, -1)
    lines = torch.ones(2, 3, keys, dtype=torch.bool)
    for plan in (
        tree.plan_if_faster(Blocks(grid, kept), 1.0), tree.plan(Lines(grid, lines, lines), 1.0)
    ):  # fmt: skip
        assert plan is not None
        q, k = torch.ones(2, queries, 3, DIM), torch.ones(2, keys, 1, DIM)
        out, lse = calls.forward(QKV(q, k, k), plan)
        assert lse is not None
        assert not out.any()
        assert (lse == -torch.inf).all()
