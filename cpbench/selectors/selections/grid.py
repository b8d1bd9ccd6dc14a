"""Masks in blocks of queries by blocks of keys, and rows of masks, on a device.

Legend: S queries, T keys; X blocks of queries, Y blocks of keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import IntArray, cut_axis, ragged_indices
from cpbench.masks.tiling import tiles

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Grid:
    """A mask divided into blocks of queries by blocks of keys, on a device.

    Attributes:
        mask: the mask that selections are subsets of.
        block_q, block_k: tokens per block.
        areas: ``[X, Y]`` int32, visible pairs per block.
        starts: ``[X]``: position among the keys of the first query of each block.
        cache: tensors that kernels derive from the grid, by key; freed with the grid.
    """

    mask: AttnMask
    block_q: int
    block_k: int
    areas: torch.Tensor
    starts: torch.Tensor
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def allowed(self) -> torch.Tensor:
        """``[X, Y]`` booleans: blocks with at least one visible pair."""
        return self.areas > 0

    @functools.cached_property
    def full(self) -> torch.Tensor:
        """``[X, Y]`` booleans: blocks in which every pair is visible."""
        heights, widths = self.block_lengths
        return self.areas == heights[:, None] * widths

    @functools.cached_property
    def block_lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of each block of queries ``[X]`` and of keys ``[Y]``; the last may be shorter."""
        import torch

        lengths = []
        for length, block in ((self.mask.seq_q, self.block_q), (self.mask.seq_k, self.block_k)):
            starts = torch.arange(0, length, block, device=self.areas.device)
            lengths.append((length - starts).clamp(max=block))
        return lengths[0], lengths[1]

    @functools.cached_property
    def diagonal(self) -> torch.Tensor:
        """``[X, Y]`` booleans: allowed blocks that hold the queries' own positions."""
        import torch

        first_key = self.starts
        last_key = first_key + self.block_lengths[0] - 1
        column = torch.arange(self.areas.shape[1], device=self.areas.device)
        first, last = (key.clamp(min=0)[:, None] // self.block_k for key in (first_key, last_key))
        return (column >= first) & (column <= last) & self.allowed

    @functools.cached_property
    def allowed_counts(self) -> torch.Tensor:
        """``[X]``: allowed blocks per row."""
        return self.allowed.sum(1)


class InGrid:
    """A selection that is a subset of the mask of a grid."""

    grid: Grid

    @property
    def seq_q(self) -> int:
        return self.grid.mask.seq_q

    @property
    def seq_k(self) -> int:
        return self.grid.mask.seq_k


def block_grid(
    mask: AttnMask, block_q: int, block_k: int, device: str, starts: IntArray | None = None
) -> Grid:
    """Divide a mask into blocks.

    Args:
        starts: as for :class:`Grid`; unless given, the queries are the last ``seq_q`` tokens.

    Raises:
        ValueError: for block sizes below 1.
    """
    import torch

    areas = tiles(mask, block_q, block_k).to_dense().astype(np.int32)
    if starts is None:
        starts = np.arange(0, mask.seq_q, block_q) + (mask.seq_k - mask.seq_q)
    areas_XY, starts_X = (torch.as_tensor(x, device=device) for x in (areas, starts))
    return Grid(mask, block_q, block_k, areas_XY, starts_X)


@functools.lru_cache(maxsize=2)
def transposed(mask: AttnMask) -> AttnMask:
    return mask.transpose()


MAX_DEVICE_SLICES = 16  # slices up to which dense rows are computed on the device


def dense_mask_rows(
    mask: AttnMask, begin: int, end: int, device: torch.device | str
) -> torch.Tensor:
    """Rows ``[begin, end)`` of a mask as ``[end - begin, T]`` booleans on a device.

    Up to ``MAX_DEVICE_SLICES`` slices they are computed there, without synchronisation.
    """
    import torch

    slices = mask.slices[(mask.slices[:, 0] < end) & (mask.slices[:, 1] > begin)]
    if len(slices) > MAX_DEVICE_SLICES:
        dense = mask.crop(begin, end, 0, mask.seq_k).to_dense()
        return torch.as_tensor(dense, device=device)
    visible = torch.zeros((end - begin, mask.seq_k), dtype=torch.bool, device=device)
    for q0, q1, k0, k1, lo, hi in slices.tolist():
        q0, q1 = max(q0, begin), min(q1, end)
        k0, k1 = max(k0, q0 + lo), min(k1, q1 + hi)  # what is left of them is seen by some query
        row = torch.arange(q0, q1, device=device)[:, None]
        rows = visible[q0 - begin : q1 - begin]
        # Keys that all queries see need no comparison; in most masks they are nearly all.
        seen_by_all = max(k0, min(q1 - 1 + lo, k1)), min(k1, max(q0 + hi + 1, k0))
        edges = [(k0, k1)]
        if seen_by_all[0] < seen_by_all[1]:
            rows[:, slice(*seen_by_all)] = True
            edges = [(k0, seen_by_all[0]), (seen_by_all[1], k1)]
        for first, last in edges:
            offset = torch.arange(first, max(first, last), device=device) - row
            rows[:, first : max(first, last)] |= (offset >= lo) & (offset <= hi)
    return visible


def visible_end(mask: AttnMask, begin: int, end: int) -> int:
    """The key after the last one that a query of rows ``[begin, end)`` sees; 0 if they see none."""
    slices = mask.slices[(mask.slices[:, 0] < end) & (mask.slices[:, 1] > begin)]
    if not len(slices):
        return 0
    last_row = np.minimum(slices[:, 1], end) - 1
    return int(np.minimum(slices[:, 3], last_row + slices[:, 5] + 1).max())


@functools.lru_cache(maxsize=2)
def slices_by_block(mask: AttnMask, block_q: int, block_k: int) -> tuple[IntArray, IntArray]:
    """The slices of a mask cut along both axes of a grid, and the block ``x * Y + y`` of each;
    sorted by block."""
    edges = [
        np.column_stack([np.arange(0, n, block), np.full(-(-n // block), block)])
        for n, block in ((mask.seq_q, block_q), (mask.seq_k, block_k))
    ]
    slices, _, x = cut_axis(mask.slices, edges[0], axis=0)
    slices, source, y = cut_axis(slices, edges[1], axis=1)
    block = x[source] * len(edges[1]) + y
    order = np.argsort(block, kind="stable")
    return slices[order], block[order]


def visible_pairs(grid: Grid, keys_XT: torch.Tensor) -> int:
    """The number of visible pairs of the keys that blocks of queries select."""
    import torch

    missing = -keys_XT.shape[1] % grid.block_k
    by_block = torch.nn.functional.pad(keys_XT, (0, missing)).unflatten(1, (-1, grid.block_k))
    whole = (by_block.sum(2) * grid.full).sum(1) * grid.block_lengths[0]
    x, key, count = _cut_keys(grid)
    return int(whole.sum() + (keys_XT[x, key] * count).sum())


def _cut_keys(grid: Grid) -> tuple[torch.Tensor, ...]:
    """The keys of blocks that the mask cuts: block of queries, key, and how many of these queries
    see it, ``[n]`` each; computed once per grid."""
    import torch

    if "cut_keys" not in grid.cache:
        slices, block = slices_by_block(grid.mask, grid.block_q, grid.block_k)
        cut = (grid.allowed & ~grid.full).cpu().numpy().reshape(-1)[block]
        slices, x = slices[cut], block[cut] // grid.areas.shape[1]
        source, offset = ragged_indices(slices[:, 3] - slices[:, 2])
        q0, q1, k0, _, lo, hi = slices[source].T
        key = k0 + offset
        count = np.minimum(q1, key - lo + 1) - np.maximum(q0, key - hi)
        grid.cache["cut_keys"] = tuple(
            torch.as_tensor(entry, device=grid.areas.device)
            for entry in (x[source], key, np.maximum(count, 0))
        )
    entries: tuple[torch.Tensor, ...] = grid.cache["cut_keys"]
    return entries
