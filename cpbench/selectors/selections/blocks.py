"""Selections of blocks of keys per block of queries, or per query.

Legend: B batch, H query heads, S queries, T keys; X blocks of queries, Y blocks of keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.selectors.selections.grid import (
    Grid,
    InGrid,
    dense_mask_rows,
    slices_by_block,
    transposed,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Blocks(InGrid):
    """A selection of blocks of keys per block of queries.

    Attributes:
        grid: the mask that the selection is a subset of, in blocks.
        kept: ``[B, H, X, Y]`` booleans, the selected blocks; those not allowed are ignored.
    """

    grid: Grid
    kept: torch.Tensor

    @property
    def kind(self) -> str:
        """``"rows"`` for blocks of one query, else ``"blocks"``."""
        return "rows" if self.grid.block_q == 1 else "blocks"

    @property
    def batch(self) -> int:
        return self.kept.shape[0]

    @property
    def heads(self) -> int:
        return self.kept.shape[1]

    @functools.cached_property
    def area(self) -> float:
        """Visible pairs per head, averaged over batch and heads."""
        pairs = int((self.kept.sum((0, 1)) * self.grid.areas).sum())
        return pairs / (self.batch * self.heads)

    def dense_rows(self, begin: int, end: int) -> torch.Tensor:
        """``[B, H, end - begin, T]`` booleans: pairs visible to queries ``[begin, end)``."""
        import torch

        device, block_k = self.kept.device, self.grid.block_k
        block = torch.arange(begin, end, device=device) // self.grid.block_q
        selected = self.kept[:, :, block].repeat_interleave(block_k, 3)[..., : self.seq_k]
        return selected & dense_mask_rows(self.grid.mask, begin, end, device)

    def of_heads(self, b: int, heads: slice) -> Blocks:
        """The selection of some heads of one batch."""
        return replace(self, kept=self.kept[b : b + 1, heads])

    def visible_keys(self, b: int, h: int, query: int) -> torch.Tensor:
        """Indices of the keys that one query attends to."""
        import torch

        kept = self.kept[b, h, query // self.grid.block_q]
        selected = kept.repeat_interleave(self.grid.block_k)[: self.seq_k]
        allowed = dense_mask_rows(self.grid.mask, query, query + 1, selected.device)[0]
        return torch.nonzero(selected & allowed)[:, 0]

    def visible_queries(self, b: int, h: int, key: int) -> torch.Tensor:
        """Indices of the queries that attend to one key."""
        import torch

        kept = self.kept[b, h, :, key // self.grid.block_k]
        selected = kept.repeat_interleave(self.grid.block_q)[: self.seq_q]
        mask = transposed(self.grid.mask)
        allowed = dense_mask_rows(mask, key, key + 1, selected.device)[0]
        return torch.nonzero(selected & allowed)[:, 0]

    def to_heads(self) -> HeadMasks:
        """Convert to static masks on the host, one per head of each batch: ``B * H`` heads."""
        mask = self.grid.mask
        slices, block = slices_by_block(mask, self.grid.block_q, self.grid.block_k)
        return HeadMasks(
            tuple(
                AttnMask.from_slices(mask.seq_q, mask.seq_k, slices[kept_XY.reshape(-1)[block]])
                for kept_XY in self.kept.flatten(0, 1).cpu().numpy()
            )
        )


def one_block_each(grid: Grid, block_BHS: torch.Tensor) -> Blocks:
    """The selection of one block per query, of a grid with blocks of one query; -1 for none."""
    import torch

    shape = (*block_BHS.shape[:2], *grid.areas.shape)
    kept = torch.zeros(shape, dtype=torch.bool, device=block_BHS.device)
    return Blocks(
        grid, kept.scatter_(3, block_BHS.clamp(min=0)[..., None], (block_BHS >= 0)[..., None])
    )
