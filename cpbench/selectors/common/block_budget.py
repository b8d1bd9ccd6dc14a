"""Base class of selectors with a budget of blocks per row: a number, or a share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.selectors.common.base import Selector
from cpbench.selectors.common.ranking import check_minimum

if TYPE_CHECKING:
    import torch

    from cpbench.selectors.selections import Grid


class BlockBudgetSelector(Selector):
    """A selector that keeps a number of blocks per row, or a share of the visible blocks.

    Args:
        block_size: tokens per block.
        top_k: blocks per row, if ``keep`` is 0.
        keep: share of the visible blocks of each row; 0 uses ``top_k``.
        kernel: see :class:`Selector`.
    """

    def __init__(self, block_size: int, top_k: int, keep: float, kernel: str) -> None:
        super().__init__(kernel)
        check_minimum(self.name, 1, block_size=block_size)
        if top_k < 1:
            raise ValueError(f"{self.name}: top_k = {top_k} must be at least 1")
        if isinstance(keep, bool) or not 0 <= keep <= 1:
            raise ValueError(
                f"{self.name}: keep = {keep} is a share of the visible blocks, from 0 to 1"
            )
        self.block_size, self.top_k, self.keep = block_size, top_k, keep

    def budget(self, grid: Grid) -> torch.Tensor:
        """Blocks to keep in each row of a grid, ``[X]``."""
        return block_budget(grid, self.top_k, self.keep)


def block_budget(grid: Grid, top_k: int, keep: float) -> torch.Tensor:
    """Blocks to keep in each row of a grid, ``[X]``: a share of the allowed ones, or ``top_k`` if
    the share is 0; at least one if any is allowed."""
    allowed = grid.allowed_counts
    if keep:
        budget = (allowed * keep + 0.5).long().clamp(min=1)
    else:
        budget = allowed.new_full(allowed.shape, top_k)
    return budget.minimum(allowed)
