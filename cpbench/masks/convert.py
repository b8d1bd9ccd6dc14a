"""An ``AttnMask`` in the forms that attention libraries take, as numpy arrays.

* :func:`to_typed_slices`: rectangles of type full, causal, inverse or bi-causal (MagiAttention).
* :func:`to_block_mask_tables` and :func:`row_intervals`: lists of blocks and a table of visible
  keys per query (FlexAttention).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import AttnMask, BoolArray, IntArray
from cpbench.masks.tiling import TileGrid, tiles

Int32Array = npt.NDArray[np.int32]

FULL, CAUSAL, INVERSE, BICAUSAL = range(4)


@dataclass(frozen=True, eq=False)
class TypedSlices:
    """Disjoint rectangles, each with one of four shapes.

    ``FULL`` sees all of the rectangle; ``CAUSAL`` is aligned bottom-right, its last query sees up
    to the last key; ``INVERSE`` is aligned top-left, its first query sees from the first key on;
    ``BICAUSAL`` is both.  The codes are those of MagiAttention's ``attn_type_map``
    (arXiv:2505.13211).

    Attributes:
        ranges: ``(n, 4)`` int64 rows ``(q0, q1, k0, k1)``.
        types: ``(n,)`` int64, one of the four codes.
        source: ``(n,)`` the band slice each came from.
    """

    ranges: IntArray
    types: IntArray
    source: IntArray

    def to_dense(self, seq_q: int, seq_k: int) -> BoolArray:
        """``(seq_q, seq_k)`` booleans, as the four types define them: for tests only."""
        dense = np.zeros((seq_q, seq_k), dtype=np.bool_)
        for (q0, q1, k0, k1), code in zip(self.ranges, self.types, strict=True):
            i, j = np.ogrid[q0:q1, k0:k1]
            up_to = (j - k1 <= i - q1) | (code in (FULL, INVERSE))
            since = (j - k0 >= i - q0) | (code in (FULL, CAUSAL))
            dense[q0:q1, k0:k1] |= up_to & since
        return dense


def to_typed_slices(mask: AttnMask) -> TypedSlices:
    """Each band slice as at most three typed rectangles, one below the other.

    In a canonical slice the upper offset cuts keys off rows before ``k1 - hi - 1``, which just
    reaches the last key; the lower one off rows after ``k0 - lo``, the last that sees the first
    key.  So rows split there: causal above, full or bi-causal between, inverse below.
    """
    q0, q1, k0, k1, lo, hi = mask.slices.T
    # Ends of the causal part and start of the inverse one; each includes the row that its offset
    # just does not cut, which is what its alignment asks for, unless it would be that row alone.
    causal_end = np.where(k1 - hi == q0 + 1, q0, k1 - hi)
    inverse_start = np.where(k0 - lo == q1 - 1, q1, k0 - lo)
    # One row cut by neither may belong to both parts: it goes to the causal one.
    inverse_start = np.where(inverse_start == causal_end - 1, causal_end, inverse_start)

    edge = np.sort([causal_end, inverse_start], axis=0)
    row0 = np.stack([q0, edge[0], edge[1]], axis=1).ravel()
    row1 = np.stack([edge[0], edge[1], q1], axis=1).ravel()
    source = np.repeat(np.arange(len(q0)), 3)
    is_causal = row0 < causal_end[source]
    is_inverse = row1 > inverse_start[source]
    key0 = np.where(is_inverse, np.maximum(k0[source], row0 + lo[source]), k0[source])
    key1 = np.where(is_causal, np.minimum(k1[source], row1 + hi[source]), k1[source])
    kept = np.flatnonzero(row0 < row1)
    return TypedSlices(
        ranges=np.column_stack([row0, row1, key0, key1])[kept],
        types=(is_causal * CAUSAL + is_inverse * INVERSE)[kept],
        source=source[kept],
    )


@dataclass(frozen=True, eq=False)
class BlockMaskTables:
    """The arguments of FlexAttention's ``BlockMask``, all int32.

    With R rows and C columns of blocks: ``kv_num_blocks`` ``(1, 1, R)`` counts the partial blocks
    of each row and ``kv_indices`` ``(1, 1, R, C)`` lists their columns, ascending, then zeros;
    ``full_kv_*`` likewise for full blocks; ``q_*`` and ``full_q_*`` the same by column, ``(1, 1,
    C)`` and ``(1, 1, C, R)``.  A full block is one whose every pair is visible and inside the mask;
    like ``create_block_mask``, blocks that reach past its edge are partial.

    Attributes:
        block: extents of a block, tokens, for queries and keys alike.
    """

    block: int
    kv_num_blocks: Int32Array
    kv_indices: Int32Array
    full_kv_num_blocks: Int32Array
    full_kv_indices: Int32Array
    q_num_blocks: Int32Array
    q_indices: Int32Array
    full_q_num_blocks: Int32Array
    full_q_indices: Int32Array


def to_block_mask_tables(mask: AttnMask, block: int) -> BlockMaskTables:
    """Lists of partial and full blocks by row and, from the transposed mask, by column.

    FlexAttention wants lists of full width, so this takes ``16 R C`` bytes: 1 GB for a million
    tokens in blocks of 128.

    Raises:
        ValueError: unless ``block`` is at least 1.
    """
    by_row = tiles(mask, block, block)
    by_column = tiles(mask.transpose(), block, block)
    partial_kv, full_kv = _block_lists(by_row, full=False), _block_lists(by_row, full=True)
    partial_q, full_q = _block_lists(by_column, full=False), _block_lists(by_column, full=True)
    return BlockMaskTables(block, *partial_kv, *full_kv, *partial_q, *full_q)


def _block_lists(grid: TileGrid, full: bool) -> tuple[Int32Array, Int32Array]:
    """``(1, 1, R)`` counts and ``(1, 1, R, C)`` columns of the full or of the other tiles."""
    runs = np.flatnonzero((grid.run_areas == grid.block_q * grid.block_k) == full)
    rows, cols, lens = grid.run_rows[runs], grid.run_cols[runs], grid.run_lens[runs]
    count = np.bincount(rows, weights=lens, minlength=grid.num_rows).astype(np.int64)
    before = np.cumsum(lens) - lens
    first = rows * grid.num_cols + before - (np.cumsum(count) - count)[rows]
    listed = np.zeros(grid.num_rows * grid.num_cols, dtype=np.int32)
    # In rounds of about 2**18 tiles, so that only the table itself takes fresh memory, and of that
    # only the pages that are used: first touching memory costs more than all the rest.
    rounds = np.searchsorted(before, np.arange(0, int(lens.sum()), 1 << 18))
    for begin, end in pairwise([*rounds, len(lens)]):
        size = lens[begin:end]
        number = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
        place = number + np.repeat(first[begin:end], size)
        listed[place] = number + np.repeat(cols[begin:end], size)
    shape = (1, 1, grid.num_rows, grid.num_cols)
    return count.astype(np.int32)[None, None], listed.reshape(shape)


def row_intervals(mask: AttnMask) -> Int32Array:
    """``(seq_q, m, 2)`` int32: disjoint, ascending key intervals ``[start, end)`` of each query.

    m is the largest number of intervals of a query, at least 1; the others are empty, ``(0, 0)``.
    So query i sees key j exactly when ``start <= j < end`` for one of ``table[i]``.  Intervals that
    touch are one.  Time and memory go with ``seq_q`` times slices per query.
    """
    q0, q1, k0, k1, lo, hi = mask.slices.T
    count = q1 - q0
    source = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(source)) - np.repeat(np.cumsum(count) - count - q0, count)
    start = np.maximum(k0[source], row + lo[source])
    end = np.minimum(k1[source], row + hi[source] + 1)
    if np.any(np.diff(row) <= 0):  # not already one slice a row, in order
        order = np.lexsort((start, row))
        row, start, end = row[order], start[order], end[order]
    joins = np.zeros(len(row), dtype=np.bool_)
    joins[1:] = (row[1:] == row[:-1]) & (start[1:] == end[:-1])
    first = np.flatnonzero(~joins)
    last = np.append(first[1:] - 1, len(row) - 1)[: len(first)]
    row, start, end = row[first], start[first], end[last]

    per_row = np.bincount(row, minlength=mask.seq_q)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    table = np.zeros((mask.seq_q, max(int(per_row.max(initial=0)), 1), 2), dtype=np.int32)
    table[row, slot, 0] = start
    table[row, slot, 1] = end
    return table
