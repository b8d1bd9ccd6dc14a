"""Which tiles of a mask a blocked kernel visits, and how much of each is visible.

The tiling is kept as runs: neighbouring tiles of one row of tiles with the same visible area.  A
million causal tokens are 33 million tiles of 128 x 128 but 16 thousand runs, and everything here
takes time and memory in the number of runs until a list of single tiles is asked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import HI, K0, K1, LO, Q0, Q1, AttnMask, BoolArray, IntArray, areas

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TileGrid:
    """The visited tiles of a mask, sorted by row of tiles, then by column.

    Tile (r, c) holds queries ``[r * block_q, (r + 1) * block_q)`` and keys ``[c * block_k,
    (c + 1) * block_k)``, as far as the mask goes.  A tile is visited when it holds a visible pair.

    Attributes:
        seq_q, seq_k: the mask's extents, tokens.
        block_q, block_k: a tile's extents, tokens.
        run_rows: ``(n,)`` row of each run.
        run_cols: ``(n,)`` its first column.
        run_lens: ``(n,)`` its number of tiles.
        run_areas: ``(n,)`` visible pairs in *each* of its tiles, exactly.
        run_full: ``(n,)`` whether its tiles, clipped to the mask's extents, are entirely visible.
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
        """``(tiles,)`` whether each tile, clipped to the mask's extents, is entirely visible."""
        return np.repeat(self.run_full, self.run_lens)

    @property
    def executed_area(self) -> int:
        """Pairs that a kernel computes that visits whole tiles, also past the mask's edge."""
        return len(self) * self.block_q * self.block_k

    def to_dense(self) -> IntArray:
        """``(num_rows, num_cols)`` visible pairs of every tile: for pictures and tests."""
        dense = np.zeros((self.num_rows, self.num_cols), dtype=np.int64)
        dense[self.rows, self.cols] = self.areas
        return dense


def tiles(mask: AttnMask, block_q: int, block_k: int) -> TileGrid:
    """The tiling of a mask into ``block_q x block_k`` tiles.

    Each slice is cut into rows of tiles; of each such strip, the tiles that its band crosses
    entirely have one known area and become one run, and only the few at its two ends are measured.
    Strips that share tiles are then added up, as changes of the area along the row.

    Raises:
        ValueError: unless both blocks are at least 1.
    """
    if block_q < 1 or block_k < 1:
        raise ValueError(f"tile extents must be at least 1, not {block_q} x {block_k}")
    num_rows, num_cols = -(-mask.seq_q // block_q), -(-mask.seq_k // block_k)
    cut, row = strips(mask.slices, block_q)

    q0, q1, k0, k1, lo, hi = cut.T
    first, end = k0 // block_k, -(-k1 // block_k)  # columns the strip touches
    # Columns in which every row of the strip sees every key.  The last column of the mask may be
    # narrower than the others: it is measured.
    solid = np.maximum(-(-np.maximum(k0, q1 - 1 + lo) // block_k), first)
    solid_end = np.minimum(np.minimum(k1, q0 + hi + 1), mask.seq_k) // block_k
    solid_end = np.maximum(np.minimum(solid_end, end), solid)

    ends = (end - first) - (solid_end - solid)
    strip = np.repeat(np.arange(len(cut)), ends)
    number = np.arange(len(strip)) - np.repeat(np.cumsum(ends) - ends, ends)
    before = (solid - first)[strip]
    col = np.where(number < before, first[strip] + number, solid_end[strip] + number - before)
    part = cut[strip]
    part[:, K0] = np.maximum(part[:, K0], col * block_k)
    part[:, K1] = np.minimum(part[:, K1], (col + 1) * block_k)
    area = areas(part)

    base = row * num_cols
    solid_area = (q1 - q0) * block_k
    edge = np.arange(num_rows, dtype=np.int64) * num_cols
    # A run may not cross into another row, nor into a narrower last column.
    edges = np.concatenate([edge, edge + max(num_cols - 1, 0), [num_rows * num_cols]])
    where = np.concatenate(
        [base[strip] + col, base[strip] + col + 1, base + solid, base + solid_end, edges]
    )
    change = np.concatenate([area, -area, solid_area, -solid_area, np.zeros_like(edges)])
    order = np.argsort(where, kind="stable")
    where, change = where[order], change[order]
    new = np.flatnonzero(np.diff(where, prepend=-1))
    start = where[new]
    level = np.cumsum(np.add.reduceat(change, new)) if len(new) else change
    visited = np.flatnonzero(level[:-1] > 0)

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
        run_areas=level[visited],
        run_full=level[visited] == height * width,
    )


def strips(slices: IntArray, block_q: int) -> tuple[IntArray, IntArray]:
    """Slices cut at every row of tiles, tight in their keys, and the row of each."""
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
