"""Selections of columns of keys, and of diagonals for each block of queries.

Legend: B batch, H query heads, S queries, T keys; X blocks of m queries.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.masks.slices import IntArray, cut_axis
from cpbench.selectors.selections.grid import (
    Grid,
    InGrid,
    dense_mask_rows,
    slices_by_block,
    transposed,
    visible_pairs,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Lines(InGrid):
    """A selection of columns and diagonals.

    For each selected distance a block of queries attends to the m keys that are that far before one
    of its queries; and to the columns; all where the mask allows it.

    Attributes:
        grid: the mask that the selection is a subset of, in blocks.
        distances: ``[B, H, T]`` booleans: the diagonals, by how far their keys are before the
            queries.
        columns: ``[B, H, T]`` booleans: keys that every query attends to.
    """

    grid: Grid
    distances: torch.Tensor
    columns: torch.Tensor

    kind = "lines"

    @property
    def batch(self) -> int:
        return self.columns.shape[0]

    @property
    def heads(self) -> int:
        return self.columns.shape[1]

    @functools.cached_property
    def _by_offset(self) -> torch.Tensor:
        """``[B, H, n]`` booleans: whether a block of queries has a diagonal at a key, by the
        position of the key relative to that of the first query, from ``1 - T`` on."""
        import torch

        m, keys = self.grid.block_q, self.seq_k
        counts = torch.nn.functional.pad(self.distances, (m, m - 1)).cumsum(-1, dtype=torch.int32)
        some = counts[..., m:] > counts[..., :-m]  # of m distances; offsets up to m - 1, backwards
        beyond = max(self.seq_q, keys) - m
        return torch.nn.functional.pad(some.flip(2), (0, beyond))

    def selected_keys(self, b: int, h: int, blocks: torch.Tensor) -> torch.Tensor:
        """``[len(blocks), T]`` booleans: keys that blocks of queries select, visible or not."""
        by_first_key = self._by_offset[b, h].unfold(0, self.seq_k, 1)
        diagonals: torch.Tensor = by_first_key[self.seq_k - 1 - self.grid.starts[blocks]]
        return diagonals.logical_or_(self.columns[b, h])

    def by_head(self) -> Iterator[torch.Tensor]:
        """The selected keys of all blocks of queries ``[X, T]``, for every head of each batch."""
        import torch

        blocks = torch.arange(len(self.grid.areas), device=self.columns.device)
        for b, h in itertools.product(range(self.batch), range(self.heads)):
            yield self.selected_keys(b, h, blocks)

    @functools.cached_property
    def area(self) -> float:
        """As :attr:`~cpbench.selectors.selections.Blocks.area`."""
        pairs = sum(visible_pairs(self.grid, keys) for keys in self.by_head())
        return pairs / (self.batch * self.heads)

    def dense_rows(self, begin: int, end: int) -> torch.Tensor:
        """As :meth:`~cpbench.selectors.selections.Blocks.dense_rows`."""
        import torch

        device = self.columns.device
        block = torch.arange(begin, end, device=device) // self.grid.block_q
        heads = itertools.product(range(self.batch), range(self.heads))
        selected = torch.stack([self.selected_keys(b, h, block) for b, h in heads])
        rows = selected & dense_mask_rows(self.grid.mask, begin, end, device)
        return rows.view(self.batch, self.heads, *rows.shape[1:])

    def of_heads(self, b: int, heads: slice) -> Lines:
        """As :meth:`~cpbench.selectors.selections.Blocks.of_heads`."""
        return Lines(self.grid, self.distances[b : b + 1, heads], self.columns[b : b + 1, heads])

    def visible_keys(self, b: int, h: int, query: int) -> torch.Tensor:
        """As :meth:`~cpbench.selectors.selections.Blocks.visible_keys`."""
        import torch

        block = torch.tensor([query // self.grid.block_q], device=self.columns.device)
        selected = self.selected_keys(b, h, block)[0]
        visible = dense_mask_rows(self.grid.mask, query, query + 1, selected.device)[0]
        return torch.nonzero(selected & visible)[:, 0]

    def visible_queries(self, b: int, h: int, key: int) -> torch.Tensor:
        """As :meth:`~cpbench.selectors.selections.Blocks.visible_queries`."""
        import torch

        by_block = self._by_offset[b, h][self.seq_k - 1 - self.grid.starts + key]
        selected = (by_block | self.columns[b, h, key]).repeat_interleave(self.grid.block_q)
        mask = transposed(self.grid.mask)
        visible = dense_mask_rows(mask, key, key + 1, selected.device)[0]
        return torch.nonzero(selected[: self.seq_q] & visible)[:, 0]

    def to_heads(self) -> HeadMasks:
        """As :meth:`~cpbench.selectors.selections.Blocks.to_heads`."""
        mask = self.grid.mask
        slices, block = slices_by_block(mask, self.grid.block_q, max(mask.seq_k, 1))
        # All blocks of queries are cut at once, with the keys of each after those of the last.
        of_keys = np.array([0, 0, 1, 1, 1, 1])
        shift = block[:, None] * of_keys * (mask.seq_k + 1)
        heads = []
        for keys in self.by_head():
            selected = np.pad(keys.cpu().numpy(), ((0, 0), (0, 1))).reshape(-1)
            cut, source, _ = cut_axis(slices + shift, _runs(selected), axis=1)
            heads.append(AttnMask.from_slices(mask.seq_q, mask.seq_k, cut - shift[source]))
        return HeadMasks(tuple(heads))


def _runs(flags: npt.NDArray[np.bool_]) -> IntArray:
    """Where booleans are True, as rows ``(start, length)``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    start, end = edges.reshape(-1, 2).T
    return np.column_stack([start, end - start])
