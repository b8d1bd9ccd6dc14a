"""Conversions of ``AttnMask`` to formats of attention libraries that can express any mask, and from
booleans.

All formats are numpy arrays.

* :func:`to_typed_slices`: rectangles of type full, causal, inverse or bi-causal (MagiAttention).
* :func:`to_block_mask_tables` and :func:`row_intervals`: lists of blocks and a table of visible
  keys per query (FlexAttention).
* :func:`from_dense`: a mask from booleans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cpbench.core.untraced import untraced
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import BoolArray, IntArray
from cpbench.masks.tiling import TileGrid, tiles

Int32Array = npt.NDArray[np.int32]

FULL, CAUSAL, INVERSE, BICAUSAL = range(4)


@dataclass(frozen=True, eq=False)
class TypedSlices:
    """Disjoint rectangles, each of one of four types.

    ``FULL``: all pairs are visible.  ``CAUSAL`` is aligned bottom-right: the last query sees up to
    the last key.  ``INVERSE`` is aligned top-left: the first query sees from the first key on.
    ``BICAUSAL`` is the intersection of both.  The codes are those of MagiAttention's
    ``attn_type_map`` (arXiv:2505.13211).

    Attributes:
        ranges: ``(n, 4)`` int64 rows ``(q0, q1, k0, k1)``.
        types: ``(n,)`` int64, the codes.
        source: ``(n,)`` index of the band slice of each.
    """

    ranges: IntArray
    types: IntArray
    source: IntArray

    def to_dense(self, seq_q: int, seq_k: int) -> BoolArray:
        """``(seq_q, seq_k)`` booleans, from the definition of the types: for tests only."""
        dense = np.zeros((seq_q, seq_k), dtype=np.bool_)
        for (q0, q1, k0, k1), code in zip(self.ranges, self.types, strict=True):
            i, j = np.ogrid[q0:q1, k0:k1]
            below_upper = (j - k1 <= i - q1) | (code in (FULL, INVERSE))
            above_lower = (j - k0 >= i - q0) | (code in (FULL, CAUSAL))
            dense[q0:q1, k0:k1] |= below_upper & above_lower
        return dense


@untraced
def from_dense(parts: Sequence[BoolArray]) -> AttnMask:
    """The mask that shows the true pairs, with as few slices as neighbours can be merged into.

    Args:
        parts: ``[s, T]`` booleans, of consecutive queries.
    """
    seq_k, row, found = parts[0].shape[1], 0, []
    for part in parts:
        edges = np.diff(part.astype(np.int8), axis=1, prepend=0, append=0)
        queries, starts = np.nonzero(edges == 1)
        _, ends = np.nonzero(edges == -1)
        queries = queries + row
        low, high = starts - queries, ends - 1 - queries
        slices = np.column_stack([queries, queries + 1, starts, ends, low, high])
        found.append(AttnMask.from_slices(row + len(part), seq_k, slices).simplify().slices)
        row += len(part)
    return AttnMask.from_slices(row, seq_k, np.concatenate(found)).simplify()


def to_typed_slices(mask: AttnMask) -> TypedSlices:
    """Convert each band slice to at most three typed rectangles, one below the other.

    In a canonical slice the upper offset hides keys from rows before ``k1 - hi - 1``, the first
    row that sees the last key; the lower offset hides keys from rows after ``k0 - lo``, the last
    row that sees the first key.  The rows are split there: causal above, full or bi-causal
    between, inverse below.
    """
    q0, q1, k0, k1, lo, hi = mask.slices.T
    # End of the causal part and start of the inverse one.  Each includes the first row that its
    # offset does not cut, as its alignment requires, unless that would be its only row.
    causal_end = np.where(k1 - hi == q0 + 1, q0, k1 - hi)
    inverse_start = np.where(k0 - lo == q1 - 1, q1, k0 - lo)
    # A single row that is in both parts goes to the causal one.
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
    of each row and ``kv_indices`` ``(1, 1, R, C)`` lists their columns, ascending, padded with
    zeros; ``full_kv_*`` are the same for full blocks; ``q_*`` ``(1, 1, C)`` and ``full_q_*``
    ``(1, 1, C, R)`` are the same by column.  In a full block every pair is visible; as in
    ``create_block_mask``, blocks that extend past the edge of the mask are partial.

    Attributes:
        block: tokens per block, for queries and keys.
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
    """List the partial and full blocks by row and, from the transposed mask, by column.

    FlexAttention needs lists of full width, so this takes ``16 R C`` bytes: 1 GB for a million
    tokens in blocks of 128.

    Args:
        block: tokens per block.

    Raises:
        ValueError: if ``block`` is below 1.
    """
    by_row = tiles(mask, block, block)
    by_column = tiles(mask.transpose(), block, block)
    partial_kv, full_kv = _block_lists(by_row, full=False), _block_lists(by_row, full=True)
    partial_q, full_q = _block_lists(by_column, full=False), _block_lists(by_column, full=True)
    return BlockMaskTables(block, *partial_kv, *full_kv, *partial_q, *full_q)


def _block_lists(grid: TileGrid, full: bool) -> tuple[Int32Array, Int32Array]:
    """``(1, 1, R)`` counts and ``(1, 1, R, C)`` columns of either the full or the partial tiles."""
    runs = np.flatnonzero((grid.run_areas == grid.block_q * grid.block_k) == full)
    rows, cols, lens = grid.run_rows[runs], grid.run_cols[runs], grid.run_lens[runs]
    count = np.bincount(rows, weights=lens, minlength=grid.num_rows).astype(np.int64)
    before = np.cumsum(lens) - lens
    first = rows * grid.num_cols + before - (np.cumsum(count) - count)[rows]
    indices = np.zeros(grid.num_rows * grid.num_cols, dtype=np.int32)
    # In chunks of about 2**18 tiles, so that only the table itself takes new memory, and only the
    # pages that are used: first touching memory costs more than everything else.
    chunks = np.searchsorted(before, np.arange(0, int(lens.sum()), 1 << 18))
    for begin, end in pairwise([*chunks, len(lens)]):
        run_lens = lens[begin:end]
        tile = np.arange(int(run_lens.sum())) - np.repeat(np.cumsum(run_lens) - run_lens, run_lens)
        position = tile + np.repeat(first[begin:end], run_lens)
        indices[position] = tile + np.repeat(cols[begin:end], run_lens)
    shape = (1, 1, grid.num_rows, grid.num_cols)
    return count.astype(np.int32)[None, None], indices.reshape(shape)


def row_intervals(mask: AttnMask) -> Int32Array:
    """The visible keys of each query, as intervals.

    Time and memory grow with ``seq_q`` times slices per query.

    Returns:
        ``(seq_q, m, 2)`` int32: disjoint, ascending intervals ``[start, end)`` of keys.  m is the
        largest number of intervals of a query, at least 1; unused ones are empty, ``(0, 0)``.
        Adjacent intervals are merged.
    """
    q0, q1, k0, k1, lo, hi = mask.slices.T
    count = q1 - q0
    source = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(source)) - np.repeat(np.cumsum(count) - count - q0, count)
    start = np.maximum(k0[source], row + lo[source])
    end = np.minimum(k1[source], row + hi[source] + 1)
    if np.any(np.diff(row) <= 0):  # not yet sorted by row, with one slice each
        order = np.lexsort((start, row))
        row, start, end = row[order], start[order], end[order]
    continues = np.zeros(len(row), dtype=np.bool_)
    continues[1:] = (row[1:] == row[:-1]) & (start[1:] == end[:-1])
    first = np.flatnonzero(~continues)
    last = np.append(first[1:] - 1, len(row) - 1)[: len(first)]
    row, start, end = row[first], start[first], end[last]

    per_row = np.bincount(row, minlength=mask.seq_q)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    table = np.zeros((mask.seq_q, max(int(per_row.max(initial=0)), 1), 2), dtype=np.int32)
    table[row, slot, 0] = start
    table[row, slot, 1] = end
    return table
