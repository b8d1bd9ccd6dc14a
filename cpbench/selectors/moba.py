"""Selector `moba`: every query takes the past blocks whose mean key it likes best.

Source: MoBA, arXiv 2502.13189 (its moba_naive.py): the gate is q times the mean of a block's keys;
blocks that are not wholly past are no candidates; the query's own block is always taken, counts
among the k, and is causal inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selecting
from cpbench.selectors.common.ranking import (
    at_least,
    block_means,
    budget,
    counts,
    products,
    top_of_rows,
    working,
)
from cpbench.selectors.common.selection import Blocks

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="moba",
        summary="every query its own top-k past blocks by mean key, and its own block",
        source="MoBA, arXiv 2502.13189",
        load="cpbench.selectors.moba:Moba",
        params=("block_size", "top_k", "keep", "kernel"),
        external_lse=False,
        variants=("block_size=16,top_k=4",),
        selects=True,
    ),
)


class Moba(Selecting):
    """For masks that are not causal, a block is a candidate where all of it is visible.

    Args:
        block_size: tokens of a block of keys.
        top_k: blocks of each query, its own included.
        keep: share of the visible blocks instead, where it is not 0.
        kernel: see :class:`Selecting`.
    """

    name = "moba"
    forms = ("rows",)

    def __init__(
        self, block_size: int = 512, top_k: int = 3, keep: float = 0.0, kernel: str = ""
    ) -> None:
        super().__init__(kernel)
        at_least(self.name, 1, block_size=block_size)
        budget(self.name, top_k, keep)
        self.block_size, self.top_k, self.keep = block_size, top_k, keep

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        cells = plan.cells(1, self.block_size)
        means, candidates = block_means(k, self.block_size), cells.whole | cells.own

        def gates(begin: int, end: int) -> torch.Tensor:
            found = products(working(q[:, begin:end]), means)
            return found.masked_fill_(~candidates[begin:end], -torch.inf)

        wanted = counts(cells.visible, self.top_k, self.keep)
        kept = top_of_rows(gates, (len(q), q.shape[2]), wanted, cells, always=cells.own)
        kept.logical_and_(candidates)
        return (Branch(seen=Blocks(cells, kept)),)
