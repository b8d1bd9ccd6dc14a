"""Base class of selectors that select blocks by pooled keys: a few vectors for each block.

Such a selection needs no keys but the pooled ones, so that ranks can exchange these, select, and
send each other only the selected blocks (strategy ``sparse_fetch``).

Legend: B batch, T keys, H query heads, G key/value heads, D head dim; X blocks of queries, Y blocks
of keys.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cpbench.masks.slices import IntArray
from cpbench.selectors.common.base import Branch, Plan
from cpbench.selectors.common.block_budget import BlockBudgetSelector
from cpbench.selectors.selections import Blocks, Grid

if TYPE_CHECKING:
    import torch


class PooledKeySelector(BlockBudgetSelector):
    """A selector of blocks of ``block_size`` keys by pooled keys; it declares ``selects_from =
    "pooled_keys"``.

    Subclasses define :meth:`pool_keys` and :meth:`select_by`; it returns one branch of blocks.
    """

    @property
    def key_block(self) -> int:
        """Keys of a block."""
        return self.block_size

    @abstractmethod
    def pool_keys(self, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Vectors for each block of keys: from ``[B, T, G, D]``, tensors ``[B, Y, G, D]``.  Those
        of a block depend on its keys only."""

    @abstractmethod
    def select_by(
        self, q: torch.Tensor, pooled: tuple[torch.Tensor, ...], plan: Plan
    ) -> tuple[Branch, ...]:
        """As :meth:`select`, from the pooled keys of the whole sequence."""

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        return self.select_by(q, self.pool_keys(k), plan)

    def needs_all_keys(self) -> str | None:
        """Why it attends to more than the blocks that it selects, if it does; else None."""
        return None

    def wanted_blocks(self, branches: tuple[Branch, ...], heads_kv: int) -> torch.Tensor:
        """The blocks of keys that some query attends to, ``[B, G, Y]`` booleans."""
        blocks = _only_blocks(branches)
        kept = (blocks.kept & blocks.grid.allowed).any(2)
        wanted: torch.Tensor = kept.unflatten(1, (heads_kv, -1)).any(2)
        return wanted

    def narrowed(self, branches: tuple[Branch, ...], columns: IntArray) -> tuple[Branch, ...]:
        """The branches within some blocks of keys, ascending, which are the only keys given."""
        import torch

        blocks = _only_blocks(branches)
        grid, index = blocks.grid, torch.as_tensor(columns, device=blocks.kept.device)
        first = np.flatnonzero(np.diff(columns, prepend=-2) != 1)
        starts = columns[first] * grid.block_k
        blocks_of_run = np.diff(np.append(first, len(columns)))
        lengths = np.minimum(grid.mask.seq_k - starts, blocks_of_run * grid.block_k)
        runs = np.column_stack([starts, lengths])
        mask = grid.mask.restrict(np.array([[0, grid.mask.seq_q]]), runs).simplify()
        narrow = Grid(mask, grid.block_q, grid.block_k, grid.areas[:, index], grid.starts)
        return (replace(branches[0], mask=Blocks(narrow, blocks.kept[..., index])),)


def _only_blocks(branches: tuple[Branch, ...]) -> Blocks:
    (branch,) = branches
    assert isinstance(branch.mask, Blocks)
    return branch.mask
