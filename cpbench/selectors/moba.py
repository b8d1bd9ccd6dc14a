"""Selector `moba`: top-k past blocks per query by its product with their mean key.

Source: MoBA, arXiv 2502.13189 (its moba_naive.py): the gate is q times the mean key of a block;
only blocks that lie entirely in the past are candidates; the query's own block is forced, counts
towards k, and is causal inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan
from cpbench.selectors.common.pooled_keys import PooledKeySelector
from cpbench.selectors.common.ranking import (
    block_means,
    qk_scores,
    top_blocks_in_chunks,
    upcast,
)
from cpbench.selectors.selections import Blocks

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="moba",
        summary="top-k past blocks per query by mean key, and the query's own block",
        source="MoBA, arXiv 2502.13189",
        load="cpbench.selectors.moba:Moba",
        params=("block_size", "top_k", "keep", "kernel"),
        external_lse=False,
        variants=("block_size=16,top_k=4",),
        selects=True,
        selects_from="pooled_keys",
        selects_for="head",
    ),
)


class Moba(PooledKeySelector):
    """Top-k blocks per query; under masks that are not causal, candidates are the blocks that are
    entirely visible.

    Args:
        block_size: keys per block.
        top_k: blocks per query, including its own.
        keep: share of the visible blocks instead, unless 0.
        kernel: see :class:`Selector`.
    """

    name = "moba"
    branch_kinds = ("rows",)

    def __init__(
        self, block_size: int = 512, top_k: int = 3, keep: float = 0.0, kernel: str = ""
    ) -> None:
        super().__init__(block_size, top_k, keep, kernel)

    def pool_keys(self, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (block_means(k, self.block_size),)

    def select_by(
        self, q: torch.Tensor, pooled: tuple[torch.Tensor, ...], plan: Plan
    ) -> tuple[Branch, ...]:
        import torch

        grid, (means,) = plan.grid(1, self.block_size), pooled
        candidates = grid.full | grid.diagonal

        def gates(begin: int, end: int) -> torch.Tensor:
            scores = qk_scores(upcast(q[:, begin:end]), means)
            return scores.masked_fill_(~candidates[begin:end], -torch.inf)

        shape, counts = (len(q), q.shape[2]), self.budget(grid)
        kept = top_blocks_in_chunks(gates, shape, counts, grid, forced=grid.diagonal)
        kept.logical_and_(candidates)
        return (Branch(mask=Blocks(grid, kept)),)
