"""Selector `quest`: top-k pages by an upper bound on the scores of their keys.

Source: Quest, arXiv 2406.10774: with M and m the channel-wise maximum and minimum of the keys of a
page, no key of it scores more than the sum over channels of max(q M, q m).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan
from cpbench.selectors.common.pooled_keys import PooledKeySelector
from cpbench.selectors.common.ranking import (
    block_extremes,
    check_minimum,
    qk_scores,
    row_chunks,
    top_blocks,
    top_blocks_in_chunks,
    upcast,
)
from cpbench.selectors.selections import Blocks

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="quest",
        summary="top-k pages by an upper bound on their keys' scores, and the queries' own page",
        source="Quest, arXiv 2406.10774",
        load="cpbench.selectors.quest:Quest",
        params=("block_size", "block_q", "top_k", "keep", "kernel"),
        external_lse=False,
        variants=("block_size=16,block_q=32,keep=0.3", "block_size=16,block_q=1,keep=0.3"),
        selects=True,
        selects_from="pooled_keys",
        selects_for="head",
        looks_ahead="block",
    ),
)


class Quest(PooledKeySelector):
    """Top-k pages per block of queries; the bound of a block is the maximum over its queries.

    Quest is a method for decoding: ``block_q=1`` is the original method, for every query.

    Args:
        block_size: keys per page.
        block_q: queries that share their pages.
        keep: share of the visible pages to keep; 0 uses ``top_k``.
        top_k: pages per row, if ``keep`` is 0.
        kernel: see :class:`Selector`.
    """

    name = "quest"

    def __init__(
        self,
        block_size: int = 64,
        block_q: int = 64,
        top_k: int = 16,
        keep: float = 0.1,
        kernel: str = "",
    ) -> None:
        super().__init__(block_size, top_k, keep, kernel)
        check_minimum(self.name, 1, block_q=block_q)
        self.block_q = self.query_block = block_q
        self.branch_kinds = ("rows" if block_q == 1 else "blocks",)

    def pool_keys(self, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return block_extremes(k, self.block_size)

    def select_by(
        self, q: torch.Tensor, pooled: tuple[torch.Tensor, ...], plan: Plan
    ) -> tuple[Branch, ...]:
        import torch

        grid, (page_max, page_min) = plan.grid(self.block_q, self.block_size), pooled
        counts = self.budget(grid)

        def bounds(begin: int, end: int) -> torch.Tensor:
            rows = upcast(q[:, begin:end])
            positive = qk_scores(rows.clamp(min=0), page_max)
            return positive.add_(qk_scores(rows.clamp(max=0), page_min))

        if self.block_q == 1:
            shape = (len(q), q.shape[2])
            kept = top_blocks_in_chunks(bounds, shape, counts, grid, forced=grid.diagonal)
            return (Branch(mask=Blocks(grid, kept)),)
        chunks = []
        width = len(q) * q.shape[2] * page_max.shape[1]
        for begin, end in row_chunks(q.shape[1], width, q.device, self.block_q):
            missing = -(end - begin) % self.block_q
            bound = torch.nn.functional.pad(
                bounds(begin, end), (0, 0, 0, missing), value=-torch.inf
            )
            chunks.append(bound.unflatten(2, (-1, self.block_q)).amax(3))
        kept = top_blocks(torch.cat(chunks, 2), counts, grid, forced=grid.diagonal)
        return (Branch(mask=Blocks(grid, kept)),)
