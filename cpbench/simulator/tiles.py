"""Tiles that a blocked attention kernel visits, counted from the band slices of a mask.

A *tile* is what one thread block computes: a run of queries (forward) or of keys (backward) of one
head; it visits *blocks* of the other axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import HI, K0, K1, LO, Q0, Q1, IntArray, transposed
from cpbench.masks.tiling import strips, tiles

GRIDS = ("mask", "slices")


@dataclass(frozen=True)
class TileCounts:
    """The thread blocks of one head.

    Attributes:
        blocks: blocks that all tiles visit.
        tiles: tiles that visit a block.
        empty: thread blocks that are launched and find nothing to do.
        largest: blocks of the largest tile.
    """

    blocks: int
    tiles: int
    empty: int
    largest: int


@dataclass(frozen=True)
class Tiling:
    """How a kernel divides a mask.

    Attributes:
        fwd: queries of a tile and keys of a block.
        bwd: queries of a block and keys of a tile.
        grid: ``"mask"`` if tiles begin at multiples of their extent (block-sparse kernels), or
            ``"slices"`` if they begin anew in every slice, with a grid of the longest slice times
            the number of slices (kernels for packed documents).
        packs_heads: whether a tile of the forward pass holds the query heads of a key/value head,
            and so many fewer queries.
    """

    fwd: tuple[int, int]
    bwd: tuple[int, int]
    grid: str
    packs_heads: bool = False

    def count(self, mask: AttnMask, phase: str, group: int = 1) -> TileCounts:
        """The tiles of one head in a phase, ``"fwd"`` or ``"bwd"``.

        Args:
            group: query heads of a tile, see :meth:`group`.
        """
        slices = mask.slices
        extents, block = (mask.seq_q, mask.seq_k), (max(self.fwd[0] // group, 1), self.fwd[1])
        if phase == "bwd":
            slices = transposed(slices)
            extents, block = (mask.seq_k, mask.seq_q), (self.bwd[1], self.bwd[0])
        if self.grid == "slices":
            return count_by_slice(slices, *block)
        return count_by_mask(AttnMask.from_slices(*extents, slices), *block)

    def group(self, phase: str, heads_q: int, heads_kv: int) -> int:
        """Query heads that a tile holds."""
        return heads_q // heads_kv if self.packs_heads and phase == "fwd" else 1


def all_full(slices: IntArray) -> bool:
    """Whether canonical slices are full rectangles."""
    q0, q1, k0, k1, lo, hi = slices.T
    return bool(((lo == k0 - q1 + 1) & (hi == k1 - 1 - q0)).all())


def count_by_mask(mask: AttnMask, tile: int, block: int) -> TileCounts:
    """Tiles at multiples of ``tile``; all tiles of the mask are launched."""
    grid = tiles(mask, tile, block)
    visits = np.bincount(grid.run_rows, weights=grid.run_lens, minlength=grid.num_rows)
    return _summarise(visits.astype(np.int64), grid.num_rows)


def count_by_slice(slices: IntArray, tile: int, block: int) -> TileCounts:
    """Tiles that begin anew in every slice; the grid is that of the longest slice for each."""
    if not len(slices):
        return TileCounts(0, 0, 0, 0)
    local = slices.copy()
    shift_q, shift_k = slices[:, Q0], slices[:, K0]
    for column, shift in ((Q0, shift_q), (Q1, shift_q), (K0, shift_k), (K1, shift_k)):
        local[:, column] -= shift
    local[:, LO] -= shift_k - shift_q
    local[:, HI] -= shift_k - shift_q
    launched = int(-(-local[:, Q1].max() // tile)) * len(slices)
    # Ranks that join the chunks of others have thousands of slices, but few different ones.
    local, times = np.unique(local, axis=0, return_counts=True)
    cut, _ = strips(local, tile)
    visits = -(-cut[:, K1] // block) - cut[:, K0] // block
    return _summarise(visits, launched, np.repeat(times, -(-local[:, Q1] // tile)))


def count_documents(
    queries: Sequence[int] | IntArray, keys: Sequence[int] | IntArray, causal: bool, tile: int,
    block: int,
) -> TileCounts:  # fmt: skip
    """Tiles of packed documents with so many queries and keys each; causal ones are aligned to the
    end of the keys.  The grid is that of the longest document for each."""
    q, k = np.asarray(queries, np.int64), np.asarray(keys, np.int64)
    seen = np.flatnonzero((q > 0) & (k > 0))
    q, k = q[seen], k[seen]
    zero, high = np.zeros_like(q), k - q if causal else k
    return count_by_slice(np.column_stack([zero, q, zero, k, -q, high]), tile, block)


def _summarise(visits: IntArray, launched: int, times: IntArray | int = 1) -> TileCounts:
    """Counts of tiles that visit so many blocks, each so many times."""
    busy = int(((visits > 0) * times).sum())
    total, largest = int((visits * times).sum()), int(visits.max(initial=0))
    return TileCounts(total, busy, launched - busy, largest)
