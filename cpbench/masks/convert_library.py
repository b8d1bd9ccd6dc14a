"""Conversions of ``AttnMask`` to the arguments of attention libraries.

* :func:`to_varlen`: documents under one window (FlashAttention, TransformerEngine, FlashInfer).
* :func:`to_flashmask`: the masked queries of each key (FlashMask).
* :func:`to_bsr`: visible blocks, with a bit per pair of partial ones (FlashInfer).

A conversion is exact, or raises :class:`Unconvertible`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.convert import Int32Array, row_intervals
from cpbench.masks.slices import HI, K0, K1, LO, Q0, Q1, BoolArray, IntArray, canonical, cut_axis
from cpbench.masks.tiling import TileGrid, tiles

UNBOUNDED = -1
_NO_LIMIT = 1 << 40  # an offset beyond any mask
_MAX_CELLS = 1 << 24  # pairs that are expanded at a time


class Unconvertible(ValueError):
    """The format cannot express the mask; one line says why and what it supports."""


# --- documents under one window -----------------------------------------------------------------

_VARLEN_SUPPORTS = (
    "a variable-length call supports consecutive documents, in queries and keys alike, under one "
    "window aligned to their last query and key"
)


@dataclass(frozen=True, eq=False)
class Varlen:
    """Consecutive documents with the same window, aligned bottom-right.

    In a document of n queries and m keys, query i sees key j when ``-left <= j - i - (m - n) <=
    right``; a bound of -1 means no limit.  This is the definition of FlashAttention.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: ``(documents + 1,)`` int32, cumulative lengths.
        max_q, max_k: queries and keys of the longest document.
        left, right: bounds of the window, -1 or at least 0.
    """

    cu_seqlens_q: Int32Array
    cu_seqlens_k: Int32Array
    max_q: int
    max_k: int
    left: int
    right: int

    @property
    def documents(self) -> int:
        return len(self.cu_seqlens_q) - 1

    @property
    def causal(self) -> bool:
        """Whether no query sees keys after its own position."""
        return self.right == 0

    @property
    def surplus(self) -> int:
        """Maximum of queries minus keys of a document; above 0, a query may have no visible key."""
        return int((np.diff(self.cu_seqlens_q) - np.diff(self.cu_seqlens_k)).max())

    def to_dense(self) -> BoolArray:
        """``(seq_q, seq_k)`` booleans, from the definition, for tests only."""
        dense = np.zeros((self.cu_seqlens_q[-1], self.cu_seqlens_k[-1]), dtype=np.bool_)
        for d in range(self.documents):
            q0, q1 = self.cu_seqlens_q[d : d + 2]
            k0, k1 = self.cu_seqlens_k[d : d + 2]
            i, j = np.ogrid[0 : q1 - q0, 0 : k1 - k0]
            offset = j - i - ((k1 - k0) - (q1 - q0))
            inside = np.ones(offset.shape, dtype=np.bool_)
            if self.left >= 0:
                inside &= offset >= -self.left
            if self.right >= 0:
                inside &= offset <= self.right
            dense[q0:q1, k0:k1] = inside
        return dense


def to_varlen(mask: AttnMask) -> Varlen:
    """Convert a mask to documents with a common window.

    A document that a bound does not cut is compatible with any bound that is at least as wide.

    Raises:
        Unconvertible: for any other mask.
    """
    try:
        return _documents(mask, mask.slices)
    except Unconvertible:
        return _documents(mask, mask.simplify().slices)  # a document may be in several slices


def _documents(mask: AttnMask, slices: IntArray) -> Varlen:
    """Convert slices to documents, one each.

    In a window that contains offset 0, the last query sees the last key, so a slice ends where its
    document ends.  Queries and keys between two slices belong to the second one, as part of its
    document outside the window.
    """
    if not len(slices):
        raise Unconvertible(f"it has no visible pairs; {_VARLEN_SUPPORTS}")
    slices = slices[np.argsort(slices[:, Q1], kind="stable")]
    end_q, end_k = slices[:, Q1], slices[:, K1]
    start_q, start_k = np.append(0, end_q[:-1]), np.append(0, end_k[:-1])
    if (slices[:, Q0] < start_q).any() or (slices[:, K0] < start_k).any():
        raise Unconvertible(f"its bands share queries or keys; {_VARLEN_SUPPORTS}")
    if (end_q[-1], end_k[-1]) != (mask.seq_q, mask.seq_k):
        raise Unconvertible(f"its last query or key has no visible pairs; {_VARLEN_SUPPORTS}")
    corner = end_k - end_q
    left, right = corner - slices[:, LO], slices[:, HI] - corner
    if (left < 0).any() or (right < 0).any():
        raise Unconvertible(f"a last query does not see the last key; {_VARLEN_SUPPORTS}")
    bounds = []
    for side, bound, reach in (
        ("back", left, end_k - start_k - 1),
        ("ahead", right, end_q - start_q - 1),
    ):
        unlimited = bound >= reach
        limits = np.unique(bound[~unlimited])
        if len(limits) > 1:
            seen = f"{int(limits[0])} and {int(limits[1])} tokens {side}"
            raise Unconvertible(f"its documents see {seen}; {_VARLEN_SUPPORTS}")
        if len(limits) and (reach[unlimited] > limits[0]).any():
            raise Unconvertible(
                f"some documents see {int(limits[0])} tokens {side}, others all; {_VARLEN_SUPPORTS}"
            )
        bounds.append(int(limits[0]) if len(limits) else UNBOUNDED)
    low, high = (_NO_LIMIT if bound == UNBOUNDED else bound for bound in bounds)
    expected = np.column_stack([start_q, end_q, start_k, end_k, corner - low, corner + high])
    if not np.array_equal(canonical(expected), slices):
        raise Unconvertible(f"some queries or keys have no visible pairs; {_VARLEN_SUPPORTS}")
    return Varlen(
        cu_seqlens_q=np.append(0, end_q).astype(np.int32),
        cu_seqlens_k=np.append(0, end_k).astype(np.int32),
        max_q=int((end_q - start_q).max()),
        max_k=int((end_k - start_k).max()),
        left=bounds[0],
        right=bounds[1],
    )


# --- masked queries of each key -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FlashMaskColumns:
    """FlashMask's ``startend_row_indices``: the masked queries of each key.

    With ``causal``, queries before the key's own position (counted from the last key and query)
    are masked, too.

    Attributes:
        startend: ``(1, 1, T, n)`` int32.  With ``r = startend[0, 0, j]``, query i is masked for
            key j if
            n = 1, causal: ``i >= r[0]``;
            n = 2, causal: ``r[0] <= i < r[1]``;
            n = 2: ``i >= r[0]`` or ``i < r[1]``;
            n = 4: ``r[0] <= i < r[1]`` or ``r[2] <= i < r[3]``.
        causal: the causal flag.
    """

    startend: Int32Array
    causal: bool

    def to_dense(self, seq_q: int) -> BoolArray:
        """``(seq_q, T)`` booleans, from the definition, for tests only."""
        rows = self.startend[0, 0].astype(np.int64)
        zero, end = np.zeros(len(rows), dtype=np.int64), np.full(len(rows), seq_q)
        if self.causal:  # before its own position, and the listed interval
            own = np.arange(len(rows)) - (len(rows) - seq_q)
            stop = rows[:, 1] if rows.shape[1] == 2 else end
            hidden = [(zero, own), (rows[:, 0], stop)]
        elif rows.shape[1] == 2:
            hidden = [(rows[:, 0], end), (zero, rows[:, 1])]
        else:
            hidden = [(rows[:, 0], rows[:, 1]), (rows[:, 2], rows[:, 3])]
        i = np.arange(seq_q)[:, None]
        masked = np.zeros((seq_q, len(rows)), dtype=np.bool_)
        for start, stop in hidden:
            masked |= (start <= i) & (i < stop)
        return ~masked


def to_flashmask(mask: AttnMask) -> FlashMaskColumns:
    """Convert a mask to FlashMask's format with the fewest numbers per key.

    Tried in order: causal with one number per key, causal with two, not causal with two, with four.

    Raises:
        Unconvertible: if a key is masked for three or more intervals of queries.
    """
    seq_q, seq_k = mask.seq_q, mask.seq_k
    visible = row_intervals(mask.transpose()).astype(np.int64)  # [T, m, 2], of queries
    visible[visible[..., 0] == visible[..., 1]] = seq_q  # sort unused intervals last
    own = np.clip(np.arange(seq_k) - (seq_k - seq_q), 0, seq_q)
    if (visible[:, 0, 0] >= own).all():
        gaps, count = _hidden_intervals(visible, own, seq_q)
        if count.max(initial=0) <= 1:
            start, end = gaps[:, 0].T
            if (end == seq_q).all():
                return FlashMaskColumns(_columns(start), causal=True)
            return FlashMaskColumns(_columns(start, end), causal=True)
    if (visible[:, 1:] == seq_q).all():
        start, end = visible[:, 0].T
        return FlashMaskColumns(_columns(end, start), causal=False)
    gaps, count = _hidden_intervals(visible, np.zeros(seq_k, dtype=np.int64), seq_q)
    if count.max(initial=0) > 2:
        key = int(np.argmax(count))
        raise Unconvertible(
            f"key {key} is hidden from {int(count[key])} intervals of queries; FlashMask supports "
            "two per key"
        )
    upper, lower = gaps[:, 0].copy(), gaps[:, 1].copy()
    # A single interval that does not start at the first query goes below.
    only_lower = (count == 1) & (upper[:, 0] > 0)
    lower[only_lower], upper[only_lower] = upper[only_lower], 0
    return FlashMaskColumns(_columns(*lower.T, *upper.T), causal=False)


def _columns(*numbers: npt.NDArray[np.int64]) -> Int32Array:
    """``(1, 1, T, n)`` int32 from n arrays ``(T,)``."""
    return np.ascontiguousarray(np.column_stack(numbers)[None, None], dtype=np.int32)


def _hidden_intervals(visible: IntArray, begin: IntArray, end: int) -> tuple[IntArray, IntArray]:
    """The intervals between ``begin`` and ``end`` that are not in ``visible``.

    Returns:
        ``(T, 2, 2)``, the first two of each key (empty ones last, at ``end``), and ``(T,)``, their
        number.
    """
    edge = np.full((len(visible), 1), end, dtype=np.int64)
    gaps = np.stack(
        [
            np.column_stack([begin, visible[..., 1]]),
            np.column_stack([visible[..., 0], edge]),
        ],
        axis=-1,
    )
    empty = gaps[..., 0] >= gaps[..., 1]
    gaps[empty] = end
    order = np.argsort(empty, axis=1, kind="stable")[:, :2]
    first: IntArray = np.take_along_axis(gaps, order[..., None], axis=1)
    return first, (~empty).sum(axis=1)


# --- blocks -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bsr:
    """The visible blocks of a mask as block-sparse rows (as in scipy), with the bits of each.

    Attributes:
        seq_q, seq_k: extents of the mask.
        block_q, block_k: R and C, queries and keys per block.
        indptr: ``(block rows + 1,)`` int32.
        indices: ``(nnz,)`` int32, column of each block, ascending in a row.
        packed: uint8, the bits of ``(nnz, R, C)``, lowest first; None if in every block all
            queries see all C keys.
    """

    seq_q: int
    seq_k: int
    block_q: int
    block_k: int
    indptr: Int32Array
    indices: Int32Array
    packed: npt.NDArray[np.uint8] | None

    def blocks(self) -> BoolArray:
        """``(nnz, R, C)`` booleans: which pairs of each block are visible."""
        shape = (len(self.indices), self.block_q, self.block_k)
        if self.packed is None:
            return np.ones(shape, dtype=np.bool_)
        bits = np.unpackbits(self.packed, count=int(np.prod(shape)), bitorder="little")
        return bits.view(np.bool_).reshape(shape)

    def to_dense(self) -> BoolArray:
        """``(seq_q, seq_k)`` booleans, for tests only."""
        rows, cols = (len(self.indptr) - 1) * self.block_q, -(-self.seq_k // self.block_k)
        dense = np.zeros((rows, cols * self.block_k), dtype=np.bool_)
        row = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        for r, c, block in zip(row, self.indices, self.blocks(), strict=True):
            q0, k0 = r * self.block_q, c * self.block_k
            dense[q0 : q0 + self.block_q, k0 : k0 + self.block_k] = block
        return dense[: self.seq_q, : self.seq_k]


def to_bsr(mask: AttnMask, block_q: int, block_k: int) -> Bsr:
    """Convert a mask to its blocks with visible pairs; only those are expanded.

    Raises:
        ValueError: if ``block_q`` or ``block_k``, queries and keys per block, is below 1.
    """
    grid = tiles(mask, block_q, block_k)
    height = np.minimum(block_q, mask.seq_q - grid.run_rows * block_q)
    whole = bool((grid.run_areas == height * block_k).all())
    return Bsr(
        mask.seq_q,
        mask.seq_k,
        block_q,
        block_k,
        grid.row_starts.astype(np.int32),
        grid.cols,
        None if whole else _packed(mask, grid),
    )


def _packed(mask: AttnMask, grid: TileGrid) -> npt.NDArray[np.uint8]:
    """The bits of the visited tiles; full tiles of whole bytes are not expanded."""
    size = grid.block_q * grid.block_k
    expanded = np.arange(len(grid))
    if size % 8 == 0:
        expanded = np.flatnonzero(grid.areas != size)
    bits = _tile_bits(mask, grid, expanded)
    if size % 8 or len(expanded) == len(grid):
        return bits
    packed = np.full((len(grid), size // 8), 255, dtype=np.uint8)
    packed[expanded] = bits.reshape(len(expanded), -1)
    return packed.ravel()


def _tile_bits(mask: AttnMask, grid: TileGrid, numbers: IntArray) -> npt.NDArray[np.uint8]:
    """The packed bits of the visited tiles with these numbers, in chunks of tiles."""
    block_q, block_k = grid.block_q, grid.block_k
    starts_q = np.arange(0, mask.seq_q, block_q)
    starts_k = np.arange(0, mask.seq_k, block_k)
    cut, _, row = cut_axis(mask.slices, _ranges(starts_q, block_q), axis=0)
    cut, source, col = cut_axis(cut, _ranges(starts_k, block_k), axis=1)
    row = row[source]
    position = np.full(len(grid), -1)
    position[numbers] = np.arange(len(numbers))
    visited = grid.rows.astype(np.int64) * grid.num_cols + grid.cols
    tile = position[np.searchsorted(visited, row * grid.num_cols + col)]
    order = np.argsort(tile, kind="stable")
    order = order[tile[order] >= 0]
    tile = tile[order]
    cut = cut[order] - _tile_origin(row[order] * block_q, col[order] * block_k)
    # A multiple of eight tiles is a whole number of bytes.
    step = max(_MAX_CELLS // (8 * block_q * block_k), 1) * 8
    chunks = [np.zeros(0, dtype=np.uint8)]
    for begin in range(0, len(numbers), step):
        end = min(begin + step, len(numbers))
        chunk = slice(*np.searchsorted(tile, [begin, end]))
        cells = _expand(cut[chunk], tile[chunk] - begin, end - begin, block_q, block_k)
        chunks.append(np.packbits(cells, bitorder="little"))
    return np.concatenate(chunks)


def _ranges(starts: IntArray, length: int) -> IntArray:
    """``(n, 2)`` rows ``(start, length)``."""
    return np.column_stack([starts, np.full(len(starts), length)])


def _tile_origin(q: IntArray, k: IntArray) -> IntArray:
    """``(n, 6)`` to subtract from slices to get them in the coordinates of their tiles."""
    return np.column_stack([q, q, k, k, k - q, k - q])


def _expand(
    slices: IntArray, tile: IntArray, count: int, block_q: int, block_k: int
) -> npt.NDArray[np.uint8]:
    """``(count * block_q * block_k,)`` pairs of tiles, 0 or 1, from the slices in each tile."""
    q0, q1, k0, k1, lo, hi = slices.T
    rows = q1 - q0
    source = np.repeat(np.arange(len(rows)), rows)
    row = np.arange(len(source)) - np.repeat(np.cumsum(rows) - rows - q0, rows)
    start = np.maximum(k0[source], row + lo[source])
    end = np.minimum(k1[source], row + hi[source] + 1)
    base = (tile[source] * block_q + row) * block_k
    size = count * block_q * block_k
    # Slices are disjoint, so the running sum of starts minus ends is 0 or 1.
    change = np.bincount(base + start, minlength=size + 1).astype(np.int8)
    change -= np.bincount(base + end, minlength=size + 1).astype(np.int8)
    return np.cumsum(change[:size], dtype=np.int8).view(np.uint8)
