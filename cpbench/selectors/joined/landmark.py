"""Selector `landmark`: top-k past blocks by their landmarks, which weight their outputs.

Source: Landmark Attention, arXiv 2305.16300 (its grouped softmax): the last token of a block is its
landmark.  A query takes one softmax over the tokens of its own block and the landmarks of past
blocks; the probability of a landmark goes to its block, within which another softmax divides it
among the tokens.  Landmarks carry no value, and no query sees the landmark of its own block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.patterns import WIDE
from cpbench.masks.slices import IntArray
from cpbench.selectors.common.base import Branch, Plan
from cpbench.selectors.common.block_budget import BlockBudgetSelector
from cpbench.selectors.common.ranking import (
    check_minimum,
    qk_scores,
    top_blocks_in_chunks,
    upcast,
)
from cpbench.selectors.selections import Grid, LandmarkBlocks

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem

OPERATORS = (
    OperatorInfo(
        name="landmark",
        summary="top-k past blocks by their landmark, whose probability goes to their tokens",
        source="Landmark Attention, arXiv 2305.16300",
        load="cpbench.selectors.joined.landmark:Landmark",
        masks=("causal",),
        params=("block_size", "top_k", "keep", "kernel"),
        external_lse=False,
        variants=("block_size=16,top_k=4",),
        selects=True,
        selects_from="keys",
        selects_for="head",
    ),
)


class Landmark(BlockBudgetSelector):
    """The query's own block, and the past blocks whose landmarks score highest, per query and head;
    with ``keep=1.0`` it is the original as it is trained.

    The original inserts landmarks and trains them; here every ``block_size``-th token is one, and
    the output error says little.

    Args:
        block_size: tokens per block, including its landmark.
        top_k: blocks per query, including its own.
        keep: share of the blocks up to its own instead, unless 0.
        kernel: see :class:`Selector`.
    """

    name = "landmark"
    branch_kinds = ("mask", "landmarks")
    joined = True

    def __init__(
        self, block_size: int = 64, top_k: int = 8, keep: float = 0.0, kernel: str = ""
    ) -> None:
        super().__init__(block_size, top_k, keep, kernel)
        check_minimum(self.name, 2, block_size=block_size)

    def prepare_rows(self, mask: AttnMask, rows: IntArray, problem: Problem, device: str) -> Plan:
        plan, block = super().prepare_rows(mask, rows, problem, device), self.block_size
        past = plan.of_queries(past_blocks_mask(mask.seq_k, block))
        plan.grids[1, block] = past_blocks_grid(past, block, plan.positions, device)
        return plan

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        block, device = self.block_size, q.device
        grid = plan.grid(1, block)
        own = Branch(mask=plan.of_queries(own_block_mask(k.shape[1], block)))
        landmarks = upcast(k[:, block - 1 :: block])
        without = grid.areas.shape[1] - landmarks.shape[1]  # a last block that is shorter
        past = torch.as_tensor(plan.positions, device=device) // block  # blocks of each query
        counts = (self._budget_of(past + 1) - 1).minimum(past)

        def score_rows(begin: int, end: int) -> torch.Tensor:
            scores = qk_scores(upcast(q[:, begin:end]), landmarks)
            return torch.nn.functional.pad(scores, (0, without))

        kept = top_blocks_in_chunks(score_rows, (len(q), q.shape[2]), counts, grid)
        return own, Branch(mask=LandmarkBlocks(grid, kept))

    def _budget_of(self, visible: torch.Tensor) -> torch.Tensor:
        """Blocks of queries that see so many, including their own."""
        if not self.keep:
            return visible.clamp(max=self.top_k)
        return (visible * self.keep + 0.5).long().clamp(min=1)


def own_block_mask(tokens: int, block: int) -> AttnMask:
    """Each query sees its own block up to itself, but not the landmark."""
    begin = np.arange(0, tokens, block)
    zero = np.zeros_like(begin)
    rows = [begin, begin + block, begin, begin + block - 1, zero - WIDE, zero]
    return AttnMask.from_slices(tokens, tokens, np.column_stack(rows))


def past_blocks_mask(tokens: int, block: int) -> AttnMask:
    """Each query sees the past blocks, but for their landmarks."""
    begin = np.arange(0, tokens - block + 1, block)
    wide = np.full(len(begin), WIDE)
    rows = [begin + block, wide, begin, begin + block - 1, -wide, wide]
    return AttnMask.from_slices(tokens, tokens, np.column_stack(rows))


def past_blocks_grid(past: AttnMask, block: int, positions: IntArray, device: str) -> Grid:
    """The grid of :func:`past_blocks_mask`, of queries at some positions.  It is written down: the
    mask has a slice for every block, which would be cut at every query."""
    import torch

    starts = torch.as_tensor(positions, device=device)
    column = torch.arange(-(-past.seq_k // block), device=device)
    areas = (column < starts[:, None] // block).int().mul_(block - 1)
    return Grid(past, 1, block, areas, starts)
