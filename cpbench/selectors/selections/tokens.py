"""Selections of single keys per query.

Legend: B batch, H query heads, S queries, T keys; n listed keys of a query.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.masks.attn_mask import AttnMask

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Tokens:
    """A selection of single keys per query.

    Attributes:
        mask: the mask that the selection is a subset of.
        index: ``[B, H, S, n]`` integers, or ``[B, 1, S, n]`` if all heads share them: the keys of
            each query, each once; -1 for none.
        heads: H.
    """

    mask: AttnMask
    index: torch.Tensor
    heads: int

    kind = "tokens"

    @property
    def seq_q(self) -> int:
        return self.mask.seq_q

    @property
    def seq_k(self) -> int:
        return self.mask.seq_k

    @property
    def batch(self) -> int:
        return self.index.shape[0]

    @functools.cached_property
    def area(self) -> float:
        """As :attr:`~cpbench.selectors.selections.Blocks.area`."""
        return int((self.index >= 0).sum()) / (self.batch * self.index.shape[1])

    def dense_rows(self, begin: int, end: int) -> torch.Tensor:
        """As :meth:`~cpbench.selectors.selections.Blocks.dense_rows`."""
        import torch

        index = self.index[:, :, begin:end].long()
        shape = (*index.shape[:3], self.seq_k + 1)
        rows = torch.zeros(shape, dtype=torch.bool, device=index.device)
        rows.scatter_(3, torch.where(index < 0, self.seq_k, index), True)
        return rows[..., : self.seq_k].expand(-1, self.heads, -1, -1)

    def of_heads(self, b: int, heads: slice) -> Tokens:
        """As :meth:`~cpbench.selectors.selections.Blocks.of_heads`."""
        own = slice(None) if self.index.shape[1] == 1 else heads
        return Tokens(self.mask, self.index[b : b + 1, own], len(range(self.heads)[heads]))

    def visible_keys(self, b: int, h: int, query: int) -> torch.Tensor:
        """As :meth:`~cpbench.selectors.selections.Blocks.visible_keys`."""
        keys = self.index[b, h % self.index.shape[1], query].long()
        return keys[keys >= 0].sort().values

    def visible_queries(self, b: int, h: int, key: int) -> torch.Tensor:
        """As :meth:`~cpbench.selectors.selections.Blocks.visible_queries`."""
        import torch

        return torch.nonzero((self.index[b, h % self.index.shape[1]] == key).any(1))[:, 0]
