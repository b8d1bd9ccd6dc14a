"""Tilings of a mask: the tiles that a blocked kernel visits, and the visible area of each.

Tilings are stored as runs of neighbouring tiles in a row of tiles with the same visible area.  A
million causal tokens are 33 million tiles of 128 x 128 but 16 thousand runs.  Time and memory are
proportional to the number of runs, except for lists of single tiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import HI, K0, K1, LO, Q0, Q1, BoolArray, IntArray, areas, ragged_indices

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TileGrid:
    """The visited tiles of a mask, sorted by row of tiles, then by column.

    Tile (r, c) has queries ``[r * block_q, (r + 1) * block_q)`` and keys ``[c * block_k,
    (c + 1) * block_k)``, clipped to the mask.  A tile is visited if it has a visible pair.

    Attributes:
        seq_q, seq_k: extents of the mask, tokens.
        block_q, block_k: extents of a tile, tokens.
        run_rows: ``(n,)`` row of each run.
        run_cols: ``(n,)`` its first column.
        run_lens: ``(n,)`` its number of tiles.
        run_areas: ``(n,)`` exact number of visible pairs in *each* of its tiles.
        run_full: ``(n,)`` whether its tiles, clipped to the mask, are entirely visible.
    """

    seq_q: int
    seq_k: int
    block_q: int
    block_k: int
    run_rows: IntArray
    run_cols: IntArray
    run_lens: IntArray
    run_areas: IntArray
    run_full: BoolArray

    @property
    def num_rows(self) -> int:
        """Rows of tiles, visited or not."""
        return -(-self.seq_q // self.block_q)

    @property
    def num_cols(self) -> int:
        """Columns of tiles, visited or not."""
        return -(-self.seq_k // self.block_k)

    def __len__(self) -> int:
        return int(self.run_lens.sum())

    @functools.cached_property
    def row_starts(self) -> IntArray:
        """``(num_rows + 1,)`` CSR: the tiles of row r are ``row_starts[r]:row_starts[r + 1]``."""
        per_row = np.bincount(self.run_rows, weights=self.run_lens, minlength=self.num_rows)
        return np.concatenate([[0], np.cumsum(per_row.astype(np.int64))])

    @functools.cached_property
    def rows(self) -> Int32Array:
        """``(tiles,)`` row of each tile."""
        return np.repeat(self.run_rows.astype(np.int32), self.run_lens)

    @functools.cached_property
    def cols(self) -> Int32Array:
        """``(tiles,)`` column of each tile."""
        first = np.cumsum(self.run_lens) - self.run_lens
        shift = (self.run_cols - first).astype(np.int32)
        return np.arange(len(self), dtype=np.int32) + np.repeat(shift, self.run_lens)

    @functools.cached_property
    def areas(self) -> IntArray:
        """``(tiles,)`` visible pairs of each tile."""
        return np.repeat(self.run_areas, self.run_lens)

    @functools.cached_property
    def full(self) -> BoolArray:
        """``(tiles,)`` whether each tile, clipped to the mask, is entirely visible."""
        return np.repeat(self.run_full, self.run_lens)

    @property
    def executed_area(self) -> int:
        """Pairs that a kernel of whole tiles computes, including those outside the mask."""
        return len(self) * self.block_q * self.block_k

    def to_dense(self) -> IntArray:
        """``(num_rows, num_cols)`` visible pairs of every tile, for pictures and tests."""
        dense = np.zeros((self.num_rows, self.num_cols), dtype=np.int64)
        dense[self.rows, self.cols] = self.areas
        return dense


def tiles(mask: AttnMask, block_q: int, block_k: int) -> TileGrid:
    """Divide a mask into tiles of ``block_q`` queries by ``block_k`` keys.

    Each slice is cut into strips, one per row of tiles.  The tiles of a strip that are entirely
    visible become one run, and only the few at its two ends are measured.  Strips that share tiles
    are added up, as changes of the area along the row.

    Raises:
        ValueError: if ``block_q`` or ``block_k`` is below 1.
    """
    if block_q < 1 or block_k < 1:
        raise ValueError(f"tile extents must be at least 1, not {block_q} x {block_k}")
    num_rows, num_cols = -(-mask.seq_q // block_q), -(-mask.seq_k // block_k)
    cut, row = strips(mask.slices, block_q)

    q0, q1, k0, k1, lo, hi = cut.T
    first, end = k0 // block_k, -(-k1 // block_k)  # columns of the strip
    # Columns in which every row of the strip sees every key.  The last column of the mask may be
    # narrower than the others, so it is measured.
    full = np.maximum(-(-np.maximum(k0, q1 - 1 + lo) // block_k), first)
    full_end = np.minimum(np.minimum(k1, q0 + hi + 1), mask.seq_k) // block_k
    full_end = np.maximum(np.minimum(full_end, end), full)

    partial = (end - first) - (full_end - full)
    strip, number = ragged_indices(partial)
    before = (full - first)[strip]
    col = np.where(number < before, first[strip] + number, full_end[strip] + number - before)
    tile = cut[strip]
    tile[:, K0] = np.maximum(tile[:, K0], col * block_k)
    tile[:, K1] = np.minimum(tile[:, K1], (col + 1) * block_k)
    area = areas(tile)

    base = row * num_cols
    full_area = (q1 - q0) * block_k
    row_starts = np.arange(num_rows, dtype=np.int64) * num_cols
    # A run must not extend into another row or into a narrower last column.
    breaks = np.concatenate([row_starts, row_starts + max(num_cols - 1, 0), [num_rows * num_cols]])
    position = np.concatenate(
        [base[strip] + col, base[strip] + col + 1, base + full, base + full_end, breaks]
    )
    change = np.concatenate([area, -area, full_area, -full_area, np.zeros_like(breaks)])
    order = np.argsort(position, kind="stable")
    position, change = position[order], change[order]
    new = np.flatnonzero(np.diff(position, prepend=-1))
    start = position[new]
    tile_area = np.cumsum(np.add.reduceat(change, new)) if len(new) else change
    visited = np.flatnonzero(tile_area[:-1] > 0)

    run_rows, run_cols = np.divmod(start[visited], max(num_cols, 1))
    height = np.minimum((run_rows + 1) * block_q, mask.seq_q) - run_rows * block_q
    width = np.minimum((run_cols + 1) * block_k, mask.seq_k) - run_cols * block_k
    return TileGrid(
        seq_q=mask.seq_q,
        seq_k=mask.seq_k,
        block_q=block_q,
        block_k=block_k,
        run_rows=run_rows,
        run_cols=run_cols,
        run_lens=(start[1:] - start[:-1])[visited],
        run_areas=tile_area[visited],
        run_full=tile_area[visited] == height * width,
    )


def strips(slices: IntArray, block_q: int) -> tuple[IntArray, IntArray]:
    """Cut slices at every row of tiles.

    Returns:
        ``(m, 6)`` slices with tight key ranges, and ``(m,)``, the row of each.
    """
    first = slices[:, Q0] // block_q
    count = -(-slices[:, Q1] // block_q) - first
    source = np.repeat(np.arange(len(slices)), count)
    row = np.arange(len(source)) - np.repeat(np.cumsum(count) - count - first, count)
    strips = slices[source]
    strips[:, Q0] = np.maximum(strips[:, Q0], row * block_q)
    strips[:, Q1] = np.minimum(strips[:, Q1], (row + 1) * block_q)
    strips[:, K0] = np.maximum(strips[:, K0], strips[:, Q0] + strips[:, LO])
    strips[:, K1] = np.minimum(strips[:, K1], strips[:, Q1] + strips[:, HI])
    return strips, row
