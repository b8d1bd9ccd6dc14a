"""The operator `gathered` on selections that no selector of the package makes."""

from __future__ import annotations

import naive
import torch

from cpbench import masks
from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import Problem
from cpbench.core.registry import implementation, operator_info
from cpbench.selectors.joined.landmark import past_blocks_mask
from cpbench.selectors.selections import LandmarkBlocks, Selection, Tokens, block_grid

TOKENS, BLOCK = 150, 16
PROBLEM = Problem(
    batch=2, seq_q=TOKENS, seq_k=TOKENS, heads_q=4, heads_kv=2, head_dim=16, dtype="float32",
    direction="fwd_bwd",
)  # fmt: skip


def results(operator: str, selection: Selection) -> list[torch.Tensor]:
    """out, lse, dq, dk and dv."""
    q, k, v, dout = naive.random_inputs(2, TOKENS, 4, 2, 16, torch.float32)
    kernel = implementation(operator_info(operator), {})
    plan = kernel.prepare(selection, PROBLEM, "cpu")
    out, lse = kernel.forward(QKV(q, k.requires_grad_(), v), plan)
    assert lse is not None
    grads = kernel.backward(BackwardInputs(dout, q, k, v, out, lse), plan)
    return [x.detach() for x in (out, lse, *grads)]


def test_blocks_that_are_not_allowed_are_ignored() -> None:
    """Blocks of the future, and a last one that is too short to have a landmark."""
    grid = block_grid(past_blocks_mask(TOKENS, BLOCK), 1, BLOCK, "cpu")
    kept = torch.ones(2, 4, *grid.areas.shape, dtype=torch.bool)
    expected = results("reference", LandmarkBlocks(grid, kept & grid.allowed))
    for operator in ("reference", "gathered"):
        found = results(operator, LandmarkBlocks(grid, kept))
        for actual, right in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, right, atol=2e-5, rtol=1e-4)


def test_queries_that_list_no_keys_see_nothing() -> None:
    index = torch.empty((2, 4, TOKENS, 0), dtype=torch.int32)
    out, lse, *grads = results("gathered", Tokens(masks.build("causal", TOKENS), index, 4))
    assert (lse == -torch.inf).all()
    assert not any(x.any() for x in (out, *grads))


def test_listed_keys_of_tensors_that_require_gradients() -> None:
    """Some queries list none; the gathered copies are no part of autograd's graph."""
    index = torch.arange(TOKENS)[:, None] - torch.tensor([0, 3, 7])
    index = index.clamp(min=-1)
    index[::5] = -1
    tokens = Tokens(masks.build("causal", TOKENS), index.int().expand(2, 4, -1, -1), 4)
    expected = results("reference", tokens)
    for actual, right in zip(results("gathered", tokens), expected, strict=True):
        torch.testing.assert_close(actual, right, atol=2e-5, rtol=1e-4)
