"""Selections: masks that a selector computes from queries and keys, on their device.

:class:`Blocks` keeps blocks of keys per block of queries (of one query for kind ``"rows"``);
:class:`Tokens` lists single keys per query.  Both are subsets of an
:class:`~cpbench.masks.attn_mask.AttnMask`.  Kernels declare the kinds of selections they take in
``OperatorInfo.masks``, beside the kinds of static masks.

Legend: B batch, H query heads, S queries, T keys; X blocks of queries, Y blocks of keys; n listed
keys of a query.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.masks.slices import IntArray, cut_axis
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


@dataclass(frozen=True, eq=False)
class Blocks:
    """A selection of blocks of keys per block of queries, and optionally of columns.

    Attributes:
        grid: the mask that the selection is a subset of, in blocks.
        kept: ``[B, H, X, Y]`` booleans, the selected blocks; those not allowed are ignored.
        columns: ``[B, H, T]`` booleans, keys that every query attends to where the mask allows it;
            None without columns.
    """

    grid: Grid
    kept: torch.Tensor
    columns: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        """``"lines"`` with columns, ``"rows"`` for blocks of one query, else ``"blocks"``."""
        if self.columns is not None:
            return "lines"
        return "rows" if self.grid.block_q == 1 else "blocks"

    @property
    def seq_q(self) -> int:
        return self.grid.mask.seq_q

    @property
    def seq_k(self) -> int:
        return self.grid.mask.seq_k

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
        if self.columns is not None:
            areas = block_grid(self.grid.mask, self.grid.block_q, 1, str(self.kept.device)).areas
            for kept, columns in zip(
                self.kept.flatten(0, 1), self.columns.flatten(0, 1), strict=True
            ):
                kept_keys = kept.repeat_interleave(self.grid.block_k, 1)[:, : self.seq_k]
                pairs += int(((columns & ~kept_keys) * areas).sum())
        return pairs / (self.batch * self.heads)

    def dense_rows(self, begin: int, end: int) -> torch.Tensor:
        """``[B, H, end - begin, T]`` booleans: pairs visible to queries ``[begin, end)``."""
        import torch

        device, block_k = self.kept.device, self.grid.block_k
        block = torch.arange(begin, end, device=device) // self.grid.block_q
        selected = self.kept[:, :, block].repeat_interleave(block_k, 3)[..., : self.seq_k]
        if self.columns is not None:
            selected = selected | self.columns[:, :, None]
        return selected & dense_mask_rows(self.grid.mask, begin, end, device)

    def of_heads(self, b: int, heads: slice) -> Blocks:
        """The selection of some heads of one batch."""
        columns = None if self.columns is None else self.columns[b : b + 1, heads]
        return Blocks(self.grid, self.kept[b : b + 1, heads], columns)

    def visible_keys(self, b: int, h: int, query: int) -> torch.Tensor:
        """Indices of the keys that one query attends to."""
        import torch

        kept = self.kept[b, h, query // self.grid.block_q]
        selected = kept.repeat_interleave(self.grid.block_k)[: self.seq_k]
        if self.columns is not None:
            selected = selected | self.columns[b, h]
        allowed = dense_mask_rows(self.grid.mask, query, query + 1, selected.device)[0]
        return torch.nonzero(selected & allowed)[:, 0]

    def visible_queries(self, b: int, h: int, key: int) -> torch.Tensor:
        """Indices of the queries that attend to one key."""
        import torch

        kept = self.kept[b, h, :, key // self.grid.block_k]
        selected = kept.repeat_interleave(self.grid.block_q)[: self.seq_q]
        if self.columns is not None:
            selected = selected | self.columns[b, h, key]
        transposed = _transposed(self.grid.mask)
        allowed = dense_mask_rows(transposed, key, key + 1, selected.device)[0]
        return torch.nonzero(selected & allowed)[:, 0]

    def to_heads(self) -> HeadMasks:
        """Convert to static masks on the host, one per head of each batch: ``B * H`` heads."""
        kept = self.kept.flatten(0, 1).cpu().numpy()
        columns = None if self.columns is None else self.columns.flatten(0, 1).cpu().numpy()
        block_slices = slices_by_block(self.grid.mask, self.grid.block_q, self.grid.block_k)
        return HeadMasks(
            tuple(
                _head_mask(
                    self.grid.mask, block_slices, kept[i], None if columns is None else columns[i]
                )
                for i in range(len(kept))
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
        """As :attr:`Blocks.area`."""
        return int((self.index >= 0).sum()) / (self.batch * self.index.shape[1])

    def dense_rows(self, begin: int, end: int) -> torch.Tensor:
        """As :meth:`Blocks.dense_rows`."""
        import torch

        index = self.index[:, :, begin:end].long()
        shape = (*index.shape[:3], self.seq_k + 1)
        rows = torch.zeros(shape, dtype=torch.bool, device=index.device)
        rows.scatter_(3, torch.where(index < 0, self.seq_k, index), True)
        return rows[..., : self.seq_k].expand(-1, self.heads, -1, -1)

    def of_heads(self, b: int, heads: slice) -> Tokens:
        """As :meth:`Blocks.of_heads`."""
        own = slice(None) if self.index.shape[1] == 1 else heads
        return Tokens(self.mask, self.index[b : b + 1, own], len(range(self.heads)[heads]))

    def visible_keys(self, b: int, h: int, query: int) -> torch.Tensor:
        """As :meth:`Blocks.visible_keys`."""
        keys = self.index[b, h % self.index.shape[1], query].long()
        return keys[keys >= 0].sort().values

    def visible_queries(self, b: int, h: int, key: int) -> torch.Tensor:
        """As :meth:`Blocks.visible_queries`."""
        import torch

        return torch.nonzero((self.index[b, h % self.index.shape[1]] == key).any(1))[:, 0]


Selection = Blocks | Tokens
SELECTIONS = ("blocks", "lines", "rows", "tokens")  # kinds of selections


@functools.lru_cache(maxsize=2)
def _transposed(mask: AttnMask) -> AttnMask:
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


def _head_mask(
    mask: AttnMask,
    block_slices: tuple[IntArray, IntArray],
    kept: np.ndarray[tuple[int, int], np.dtype[np.bool_]],
    columns: np.ndarray[tuple[int], np.dtype[np.bool_]] | None,
) -> AttnMask:
    """The selection of one head as a static mask.

    Args:
        block_slices: see :func:`slices_by_block`.
        kept: ``[X, Y]``; columns: ``[T]``.
    """
    slices, block = block_slices
    selected = slices[kept.reshape(-1)[block]]
    if columns is not None:
        # Outside the selected blocks only the columns are visible.
        outside = slices[~kept.reshape(-1)[block]]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], columns, [False]]).astype(np.int8)))
        runs = edges.reshape(-1, 2)
        runs = np.column_stack([runs[:, 0], runs[:, 1] - runs[:, 0]])
        selected = np.concatenate([selected, cut_axis(outside, runs, axis=1)[0]])
    return AttnMask.from_slices(mask.seq_q, mask.seq_k, selected)
