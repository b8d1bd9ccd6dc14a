"""What a selector chose from queries and keys: a mask that depends on the inputs, on their device.

A :class:`Blocks` keeps blocks of keys for each block of queries (or for each query: blocks of one);
a :class:`Tokens` lists single keys.  Both lie within an :class:`~cpbench.masks.attn_mask.AttnMask`,
and both are masks for those who compute: kernels take them by kind, as they take causal or bands.

Legend: B batch, H query heads, S queries, T keys; X blocks of queries, Y blocks of keys; n listed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.masks.attn_mask import AttnMask, IntArray, cut_axis
from cpbench.masks.head_masks import HeadMasks
from cpbench.masks.tiling import tiles

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Grid:
    """A mask in blocks of queries by blocks of keys, on a device.

    Attributes:
        mask: what is visible at all.
        block_q, block_k: tokens of a block.
        areas: ``[X, Y]`` int32, visible pairs.
        memo: what kernels make of it, by their names: it goes when the grid does.
    """

    mask: AttnMask
    block_q: int
    block_k: int
    areas: torch.Tensor
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def allowed(self) -> torch.Tensor:
        """``[X, Y]``, blocks with anything to see."""
        return self.areas > 0

    @functools.cached_property
    def whole(self) -> torch.Tensor:
        """``[X, Y]``, blocks in which everything is visible."""
        height, width = self.extents
        return self.areas == height[:, None] * width

    @functools.cached_property
    def extents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of each block of queries ``[X]`` and of keys ``[Y]``: the last may be shorter."""
        import torch

        found = []
        for length, block in ((self.mask.seq_q, self.block_q), (self.mask.seq_k, self.block_k)):
            starts = torch.arange(0, length, block, device=self.areas.device)
            found.append((length - starts).clamp(max=block))
        return found[0], found[1]

    @functools.cached_property
    def own(self) -> torch.Tensor:
        """``[X, Y]``, the blocks that hold the queries' own positions (the last ``seq_q`` keys)."""
        import torch

        shift = self.mask.seq_k - self.mask.seq_q
        first = torch.arange(len(self.areas), device=self.areas.device) * self.block_q + shift
        last = first + self.extents[0] - 1
        column = torch.arange(self.areas.shape[1], device=self.areas.device)
        from_, to = (x.clamp(min=0)[:, None] // self.block_k for x in (first, last))
        return (column >= from_) & (column <= to) & self.allowed

    @functools.cached_property
    def visible(self) -> torch.Tensor:
        """``[X]``, how many blocks have anything to see."""
        return self.allowed.sum(1)


def grid(mask: AttnMask, block_q: int, block_k: int, device: str) -> Grid:
    """The blocks of a mask.

    Raises:
        ValueError: for blocks of no tokens.
    """
    import torch

    areas = tiles(mask, block_q, block_k).to_dense().astype(np.int32)
    return Grid(mask, block_q, block_k, torch.as_tensor(areas, device=device))


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of keys for each block of queries, and whole columns beside them.

    Attributes:
        grid: the mask within which all lies, in blocks.
        kept: ``[B, H, X, Y]`` booleans; blocks with nothing to see count for nothing.
        columns: ``[B, H, T]`` booleans: keys that all queries see where the mask lets them; or
            None.
    """

    grid: Grid
    kept: torch.Tensor
    columns: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        """``"lines"`` with columns, ``"rows"`` where each query has blocks of its own, else
        ``"blocks"``."""
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
        """Visible pairs of a head, on average over batch and heads."""
        pairs = int((self.kept.sum((0, 1)) * self.grid.areas).sum())
        if self.columns is not None:
            each = grid(self.grid.mask, self.grid.block_q, 1, str(self.kept.device)).areas
            for kept, columns in zip(
                self.kept.flatten(0, 1), self.columns.flatten(0, 1), strict=True
            ):
                alone = columns & ~kept.repeat_interleave(self.grid.block_k, 1)[:, : self.seq_k]
                pairs += int((alone * each).sum())
        return pairs / (self.batch * self.heads)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """``[B, H, end - begin, T]`` booleans: what queries ``[begin, end)`` see."""
        import torch

        device, block_k = self.kept.device, self.grid.block_k
        block = torch.arange(begin, end, device=device) // self.grid.block_q
        found = self.kept[:, :, block].repeat_interleave(block_k, 3)[..., : self.seq_k]
        if self.columns is not None:
            found = found | self.columns[:, :, None]
        return found & visible(self.grid.mask, begin, end, device)

    def seen(self, b: int, h: int, query: int) -> torch.Tensor:
        """Keys that one query sees."""
        import torch

        kept = self.kept[b, h, query // self.grid.block_q]
        found = kept.repeat_interleave(self.grid.block_k)[: self.seq_k]
        if self.columns is not None:
            found = found | self.columns[b, h]
        return torch.nonzero(found & visible(self.grid.mask, query, query + 1, found.device)[0])[
            :, 0
        ]

    def seers(self, b: int, h: int, key: int) -> torch.Tensor:
        """Queries that see one key."""
        import torch

        kept = self.kept[b, h, :, key // self.grid.block_k]
        found = kept.repeat_interleave(self.grid.block_q)[: self.seq_q]
        if self.columns is not None:
            found = found | self.columns[b, h, key]
        turned = _turned(self.grid.mask)
        return torch.nonzero(found & visible(turned, key, key + 1, found.device)[0])[:, 0]

    def to_heads(self) -> HeadMasks:
        """The same on the host, a mask for each head of each batch: ``B * H`` heads."""
        kept = self.kept.flatten(0, 1).cpu().numpy()
        lines = None if self.columns is None else self.columns.flatten(0, 1).cpu().numpy()
        cells = cells_of(self.grid.mask, self.grid.block_q, self.grid.block_k)
        return HeadMasks(
            tuple(
                _within(self.grid, cells, kept[i], None if lines is None else lines[i])
                for i in range(len(kept))
            )
        )


@dataclass(frozen=True, eq=False)
class Tokens:
    """Single keys for each query.

    Attributes:
        mask: what is visible at all; every listed key is.
        index: ``[B, H, S, n]`` integers, or ``[B, 1, S, n]`` where heads share them; each key of a
            query once; -1 is none.
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

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """As :meth:`Blocks.rows`."""
        import torch

        index = self.index[:, :, begin:end].long()
        shape = (*index.shape[:3], self.seq_k + 1)
        found = torch.zeros(shape, dtype=torch.bool, device=index.device)
        found.scatter_(3, torch.where(index < 0, self.seq_k, index), True)
        return found[..., : self.seq_k].expand(-1, self.heads, -1, -1)

    def seen(self, b: int, h: int, query: int) -> torch.Tensor:
        """As :meth:`Blocks.seen`."""
        listed = self.index[b, h % self.index.shape[1], query].long()
        return listed[listed >= 0].sort().values

    def seers(self, b: int, h: int, key: int) -> torch.Tensor:
        """As :meth:`Blocks.seers`."""
        import torch

        return torch.nonzero((self.index[b, h % self.index.shape[1]] == key).any(1))[:, 0]


Selection = Blocks | Tokens
SELECTIONS = ("blocks", "lines", "rows", "tokens")  # kinds of selections


@functools.lru_cache(maxsize=2)
def _turned(mask: AttnMask) -> AttnMask:
    return mask.transpose()


FEW_SLICES = 16  # whose pairs are told apart on the device


def visible(mask: AttnMask, begin: int, end: int, device: torch.device | str) -> torch.Tensor:
    """``[end - begin, T]`` booleans of some rows of a mask; of few slices, nothing waits for it."""
    import torch

    here = mask.slices[(mask.slices[:, 0] < end) & (mask.slices[:, 1] > begin)]
    if len(here) > FEW_SLICES:
        dense = mask.crop(begin, end, 0, mask.seq_k).to_dense()
        return torch.as_tensor(dense, device=device)
    row = torch.arange(begin, end, device=device)[:, None]
    key = torch.arange(mask.seq_k, device=device)
    found = torch.zeros((end - begin, mask.seq_k), dtype=torch.bool, device=device)
    for q0, q1, k0, k1, lo, hi in here.tolist():
        rows, keys = (row >= q0) & (row < q1), (key >= k0) & (key < k1)
        offset = key - row
        found |= rows & keys & (offset >= lo) & (offset <= hi)
    return found


@functools.lru_cache(maxsize=2)
def cells_of(mask: AttnMask, block_q: int, block_k: int) -> tuple[IntArray, IntArray]:
    """A mask cut along both axes of a grid: slices, and the cell ``x * Y + y`` of each, sorted."""
    edges = [
        np.column_stack([np.arange(0, n, block), np.full(-(-n // block), block)])
        for n, block in ((mask.seq_q, block_q), (mask.seq_k, block_k))
    ]
    cut, _, x = cut_axis(mask.slices, edges[0], axis=0)
    cut, source, y = cut_axis(cut, edges[1], axis=1)
    cell = x[source] * len(edges[1]) + y
    order = np.argsort(cell, kind="stable")
    return cut[order], cell[order]


def _within(
    grid: Grid,
    cells: tuple[IntArray, IntArray],
    kept: np.ndarray[tuple[int, int], np.dtype[np.bool_]],
    columns: np.ndarray[tuple[int], np.dtype[np.bool_]] | None,
) -> AttnMask:
    """The mask of one head."""
    mask = grid.mask
    cut, cell = cells
    rows = cut[kept.reshape(-1)[cell]]
    if columns is not None:
        # Of the blocks that are not kept, the columns alone.
        rest = cut[~kept.reshape(-1)[cell]]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], columns, [False]]).astype(np.int8)))
        runs = edges.reshape(-1, 2)
        runs = np.column_stack([runs[:, 0], runs[:, 1] - runs[:, 0]])
        rows = np.concatenate([rows, cut_axis(rest, runs, axis=1)[0]])
    return AttnMask.from_slices(mask.seq_q, mask.seq_k, rows)
