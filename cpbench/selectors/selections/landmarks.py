"""Selections of blocks of keys that their landmarks weight.

The last key of a block is its landmark.  The probability of a landmark goes to its block, within
which a softmax of its own divides it among the other keys (Landmark Attention, arXiv 2305.16300).

Legend: B batch, H query heads, T keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.selectors.selections.blocks import Blocks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class LandmarkBlocks(Blocks):
    """A selection of whole blocks of keys per query, weighted by their landmarks, which the mask of
    its grid hides."""

    @property
    def kind(self) -> str:
        return "landmarks"

    def dense_blocks(self, begin: int, end: int) -> torch.Tensor:
        """``[B, H, end - begin, T]`` booleans: the keys of the blocks that queries ``[begin, end)``
        selected, with their landmarks."""
        kept = self.kept[:, :, begin:end] & self.grid.allowed[begin:end]
        return kept.repeat_interleave(self.grid.block_k, 3)[..., : self.seq_k]
