"""Selector `oracle`: the blocks with the most attention mass, from full attention.

No selector that keeps as many blocks of the same size has a higher attention recall: it is the
upper bound that others are compared with.  It computes all scores, so it saves no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan
from cpbench.selectors.common.block_budget import BlockBudgetSelector
from cpbench.selectors.common.ranking import (
    block_sums,
    probabilities,
    row_chunks,
    top_blocks,
)
from cpbench.selectors.selections import Blocks, Grid, dense_mask_rows

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="oracle",
        summary="blocks with the most true attention mass: the upper bound of selectors",
        source="attention mass of blocks, from the definition",
        load="cpbench.selectors.oracle:Oracle",
        params=("block_size", "top_k", "keep", "kernel"),
        external_lse=False,
        variants=("block_size=16,keep=0.3",),
        selects=True,
        selects_from="keys",
        selects_for="head",
        looks_ahead="block",
    ),
)


class Oracle(BlockBudgetSelector):
    """For each block of queries, the blocks of keys with the largest sums of probabilities.

    Args:
        block_size: tokens per block, of queries and keys.
        keep: share of the visible blocks of each row to keep; 0 uses ``top_k``.
        top_k: blocks per row, if ``keep`` is 0.
        kernel: see :class:`Selector`.
    """

    name = "oracle"

    def __init__(
        self, block_size: int = 64, top_k: int = 16, keep: float = 0.1, kernel: str = ""
    ) -> None:
        super().__init__(block_size, top_k, keep, kernel)
        self.query_block = block_size

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        grid = plan.grid(self.block_size, self.block_size)
        mass = block_mass(q, k, grid, plan.problem.softmax_scale)
        kept = top_blocks(mass, self.budget(grid), grid)
        return (Branch(mask=Blocks(grid, kept)),)


def block_mass(q: torch.Tensor, k: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
    """Probabilities of full attention within the mask, summed over blocks, ``[B, H, X, Y]``."""
    import torch

    mask, (b, s, h, _), t = grid.mask, q.shape, k.shape[1]
    chunks = []
    for begin, end in row_chunks(s, b * h * t, q.device, grid.block_q):
        visible = dense_mask_rows(mask, begin, end, q.device)
        probs = probabilities(q[:, begin:end], k, visible, scale)
        chunks.append(block_sums(probs, grid.block_q, grid.block_k))
    return torch.cat(chunks, 2)
