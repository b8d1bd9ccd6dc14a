"""An ``AttnMask`` as the arguments of attention libraries that do not take every mask.

* :func:`to_varlen`: documents under one window (FlashAttention, TransformerEngine, FlashInfer).
* :func:`to_flashmask`: masked rows of each key (FlashMask).
* :func:`to_bsr`: blocks, and the bits of those that are not full (FlashInfer).

Each is exact, or raises :class:`Unconvertible`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import (
    HI,
    K0,
    K1,
    LO,
    Q0,
    Q1,
    AttnMask,
    BoolArray,
    IntArray,
    canonical,
    cut_axis,
)
from cpbench.masks.convert import Int32Array, row_intervals
from cpbench.masks.tiling import TileGrid, tiles

UNBOUNDED = -1
_FAR = 1 << 40  # an offset that cuts nothing
_CELLS = 1 << 24  # expanded at once


class Unconvertible(ValueError):
    """A mask that a form cannot say: one line, what of it is in the way and what the form takes."""


# --- documents under one window -----------------------------------------------------------------

_VARLEN_TAKES = (
    "a variable-length call takes documents that follow each other in queries and keys alike, "
    "under one window that ends at their last query and key"
)


@dataclass(frozen=True, eq=False)
class Varlen:
    """Documents one after another, each with the same window, aligned bottom-right.

    Query i of a document of n queries and m keys sees its key j when ``-left <= j - i - (m - n) <=
    right``; a bound of -1 is none.  This is how FlashAttention counts.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: ``(documents + 1,)`` int32, where each begins, and the ends.
        max_q, max_k: tokens of the longest.
        left, right: 0 or more, or -1.
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
        """Whether no query sees past its own position, whatever the other bound."""
        return self.right == 0

    @property
    def surplus(self) -> int:
        """Most queries of a document beyond its keys: from 1 on, bounds may leave some blind."""
        return int((np.diff(self.cu_seqlens_q) - np.diff(self.cu_seqlens_k)).max())

    def to_dense(self) -> BoolArray:
        """``(seq_q, seq_k)`` booleans, from the definition: for tests only."""
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
    """Documents and the window that they share.

    A document that a bound does not cut agrees with any bound that is wide enough for it.

    Raises:
        Unconvertible: for any other mask.
    """
    try:
        return _documents(mask, mask.slices)
    except Unconvertible:
        return _documents(mask, mask.simplify().slices)  # neighbours may be parts of one document


def _documents(mask: AttnMask, slices: IntArray) -> Varlen:
    """One document a slice.

    A window that holds offset 0 lets the last query see the last key, so a slice ends where its
    document does; what lies between it and the one before is its own: queries and keys that its
    window leaves out.
    """
    if not len(slices):
        raise Unconvertible(f"nothing is visible; {_VARLEN_TAKES}")
    slices = slices[np.argsort(slices[:, Q1], kind="stable")]
    end_q, end_k = slices[:, Q1], slices[:, K1]
    start_q, start_k = np.append(0, end_q[:-1]), np.append(0, end_k[:-1])
    if (slices[:, Q0] < start_q).any() or (slices[:, K0] < start_k).any():
        raise Unconvertible(f"its bands share queries or keys; {_VARLEN_TAKES}")
    if (end_q[-1], end_k[-1]) != (mask.seq_q, mask.seq_k):
        raise Unconvertible(f"its last query or key sees nothing or is not seen; {_VARLEN_TAKES}")
    corner = end_k - end_q
    left, right = corner - slices[:, LO], slices[:, HI] - corner
    if (left < 0).any() or (right < 0).any():
        raise Unconvertible(f"a last query does not see the last key; {_VARLEN_TAKES}")
    bounds = []
    for side, bound, reach in (
        ("back", left, end_k - start_k - 1),
        ("ahead", right, end_q - start_q - 1),
    ):
        free = bound >= reach
        cut = np.unique(bound[~free])
        if len(cut) > 1:
            raise Unconvertible(
                f"its documents see {int(cut[0])} and {int(cut[1])} tokens {side}; {_VARLEN_TAKES}"
            )
        if len(cut) and (reach[free] > cut[0]).any():
            raise Unconvertible(
                f"some documents see {int(cut[0])} tokens {side}, others all; {_VARLEN_TAKES}"
            )
        bounds.append(int(cut[0]) if len(cut) else UNBOUNDED)
    low, high = (_FAR if bound == UNBOUNDED else bound for bound in bounds)
    meant = np.column_stack([start_q, end_q, start_k, end_k, corner - low, corner + high])
    if not np.array_equal(canonical(meant), slices):
        raise Unconvertible(f"queries see nothing, or keys are not seen; {_VARLEN_TAKES}")
    return Varlen(
        cu_seqlens_q=np.append(0, end_q).astype(np.int32),
        cu_seqlens_k=np.append(0, end_k).astype(np.int32),
        max_q=int((end_q - start_q).max()),
        max_k=int((end_k - start_k).max()),
        left=bounds[0],
        right=bounds[1],
    )


# --- masked rows of each key --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FlashMaskColumns:
    """FlashMask's ``startend_row_indices``: for each key, the queries that do not see it.

    With ``causal`` also those before its own position, counted from the last key and query, do not.

    Attributes:
        startend: ``(1, 1, T, n)`` int32.  Masked are, of key j with row r of it:
            n = 1, causal: ``i >= r[0]``;
            n = 2, causal: ``r[0] <= i < r[1]``;
            n = 2: ``i >= r[0]`` or ``i < r[1]``;
            n = 4: ``r[0] <= i < r[1]`` or ``r[2] <= i < r[3]``.
        causal: whether the causal flag is set.
    """

    startend: Int32Array
    causal: bool

    def to_dense(self, seq_q: int) -> BoolArray:
        """``(seq_q, T)`` booleans, from the definition: for tests only."""
        rows = self.startend[0, 0].astype(np.int64)
        none, end = np.zeros(len(rows), dtype=np.int64), np.full(len(rows), seq_q)
        if self.causal:  # before its own position, and below
            first = np.arange(len(rows)) - (len(rows) - seq_q)
            last = rows[:, 1] if rows.shape[1] == 2 else end
            hidden = [(none, first), (rows[:, 0], last)]
        elif rows.shape[1] == 2:
            hidden = [(rows[:, 0], end), (none, rows[:, 1])]
        else:
            hidden = [(rows[:, 0], rows[:, 1]), (rows[:, 2], rows[:, 3])]
        i = np.arange(seq_q)[:, None]
        masked = np.zeros((seq_q, len(rows)), dtype=np.bool_)
        for start, stop in hidden:
            masked |= (start <= i) & (i < stop)
        return ~masked


def to_flashmask(mask: AttnMask) -> FlashMaskColumns:
    """The smallest form: causal with one number a key or with two, then without with two or four.

    Raises:
        Unconvertible: where some key is hidden from queries in three intervals or more.
    """
    seq_q, seq_k = mask.seq_q, mask.seq_k
    seen = row_intervals(mask.transpose()).astype(np.int64)  # [T, m, 2], of queries
    seen[seen[..., 0] == seen[..., 1]] = seq_q  # those that pad go behind the others
    own = np.clip(np.arange(seq_k) - (seq_k - seq_q), 0, seq_q)
    if (seen[:, 0, 0] >= own).all():
        gaps, count = _gaps(seen, own, seq_q)
        if count.max(initial=0) <= 1:
            start, end = gaps[:, 0].T
            if (end == seq_q).all():
                return FlashMaskColumns(_columns(start), causal=True)
            return FlashMaskColumns(_columns(start, end), causal=True)
    if (seen[:, 1:] == seq_q).all():
        start, end = seen[:, 0].T
        return FlashMaskColumns(_columns(end, start), causal=False)
    gaps, count = _gaps(seen, np.zeros(seq_k, dtype=np.int64), seq_q)
    if count.max(initial=0) > 2:
        key = int(np.argmax(count))
        raise Unconvertible(
            f"key {key} is hidden from queries in {int(count[key])} intervals; FlashMask takes two "
            "of each key"
        )
    upper, lower = gaps[:, 0].copy(), gaps[:, 1].copy()
    alone = (count == 1) & (upper[:, 0] > 0)  # a gap that is not the first queries' goes below
    lower[alone], upper[alone] = upper[alone], 0
    return FlashMaskColumns(_columns(*lower.T, *upper.T), causal=False)


def _columns(*numbers: npt.NDArray[np.int64]) -> Int32Array:
    return np.ascontiguousarray(np.column_stack(numbers)[None, None], dtype=np.int32)


def _gaps(seen: IntArray, begin: IntArray, end: int) -> tuple[IntArray, IntArray]:
    """Between ``begin`` and ``end``, the first two intervals ``[T, 2, 2]`` that are not in ``seen``
    (empty ones last, at ``end``) and how many there are of each row."""
    edge = np.full((len(seen), 1), end, dtype=np.int64)
    gaps = np.stack(
        [
            np.column_stack([begin, seen[..., 1]]),
            np.column_stack([seen[..., 0], edge]),
        ],
        axis=-1,
    )
    hollow = gaps[..., 0] >= gaps[..., 1]
    gaps[hollow] = end
    order = np.argsort(hollow, axis=1, kind="stable")[:, :2]
    first: IntArray = np.take_along_axis(gaps, order[..., None], axis=1)
    return first, (~hollow).sum(axis=1)


# --- blocks -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bsr:
    """Block rows as scipy's BSR lists them, and what is visible inside the kept blocks.

    Attributes:
        seq_q, seq_k: of the mask.
        block_q, block_k: R and C, tokens of a block.
        indptr: ``(block rows + 1,)`` int32.
        indices: ``(nnz,)`` int32, columns of blocks, ascending in a row.
        packed: uint8, the bits of ``(nnz, R, C)``, the lowest first; None where every kept block
            shows all C keys to all of its queries.
    """

    seq_q: int
    seq_k: int
    block_q: int
    block_k: int
    indptr: Int32Array
    indices: Int32Array
    packed: npt.NDArray[np.uint8] | None

    def blocks(self) -> BoolArray:
        """``(nnz, R, C)`` booleans."""
        shape = (len(self.indices), self.block_q, self.block_k)
        if self.packed is None:
            return np.ones(shape, dtype=np.bool_)
        bits = np.unpackbits(self.packed, count=int(np.prod(shape)), bitorder="little")
        return bits.view(np.bool_).reshape(shape)

    def to_dense(self) -> BoolArray:
        """``(seq_q, seq_k)`` booleans: for tests only."""
        rows, cols = (len(self.indptr) - 1) * self.block_q, -(-self.seq_k // self.block_k)
        dense = np.zeros((rows, cols * self.block_k), dtype=np.bool_)
        row = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        for r, c, block in zip(row, self.indices, self.blocks(), strict=True):
            q0, k0 = r * self.block_q, c * self.block_k
            dense[q0 : q0 + self.block_q, k0 : k0 + self.block_k] = block
        return dense[: self.seq_q, : self.seq_k]


def to_bsr(mask: AttnMask, block_q: int, block_k: int) -> Bsr:
    """The blocks in which anything is visible; only those are ever expanded.

    Raises:
        ValueError: unless both blocks are at least 1.
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
    """The bits of the visited tiles; of whole bytes, only those that are not full are expanded."""
    size = grid.block_q * grid.block_k
    some = np.arange(len(grid))
    if size % 8 == 0:
        some = np.flatnonzero(grid.areas != size)
    bits = _bits(mask, grid, some)
    if size % 8 or len(some) == len(grid):
        return bits
    found = np.full((len(grid), size // 8), 255, dtype=np.uint8)
    found[some] = bits.reshape(len(some), -1)
    return found.ravel()


def _bits(mask: AttnMask, grid: TileGrid, some: IntArray) -> npt.NDArray[np.uint8]:
    """The bits of some of the visited tiles, a number of them at a time."""
    block_q, block_k = grid.block_q, grid.block_k
    starts_q = np.arange(0, mask.seq_q, block_q)
    starts_k = np.arange(0, mask.seq_k, block_k)
    cut, _, row = cut_axis(mask.slices, _ranges(starts_q, block_q), axis=0)
    cut, source, col = cut_axis(cut, _ranges(starts_k, block_k), axis=1)
    row = row[source]
    place = np.full(len(grid), -1)
    place[some] = np.arange(len(some))
    visited = grid.rows.astype(np.int64) * grid.num_cols + grid.cols
    tile = place[np.searchsorted(visited, row * grid.num_cols + col)]
    order = np.argsort(tile, kind="stable")
    order = order[tile[order] >= 0]
    tile = tile[order]
    cut = cut[order] - _corner(row[order] * block_q, col[order] * block_k)
    # Eight tiles are whole bytes.
    step = max(_CELLS // (8 * block_q * block_k), 1) * 8
    found = [np.zeros(0, dtype=np.uint8)]
    for begin in range(0, len(some), step):
        end = min(begin + step, len(some))
        these = slice(*np.searchsorted(tile, [begin, end]))
        cells = _cells(cut[these], tile[these] - begin, end - begin, block_q, block_k)
        found.append(np.packbits(cells, bitorder="little"))
    return np.concatenate(found)


def _ranges(starts: IntArray, length: int) -> IntArray:
    return np.column_stack([starts, np.full(len(starts), length)])


def _corner(q: IntArray, k: IntArray) -> IntArray:
    """What takes a slice into the coordinates of its tile."""
    return np.column_stack([q, q, k, k, k - q, k - q])


def _cells(
    slices: IntArray, tile: IntArray, count: int, block_q: int, block_k: int
) -> npt.NDArray[np.uint8]:
    """The flat cells of ``count`` tiles, 0 or 1, from the slices that lie in each."""
    q0, q1, k0, k1, lo, hi = slices.T
    rows = q1 - q0
    source = np.repeat(np.arange(len(rows)), rows)
    row = np.arange(len(source)) - np.repeat(np.cumsum(rows) - rows - q0, rows)
    start = np.maximum(k0[source], row + lo[source])
    end = np.minimum(k1[source], row + hi[source] + 1)
    base = (tile[source] * block_q + row) * block_k
    size = count * block_q * block_k
    # Slices are disjoint, so a cell is entered at most once more than it is left.
    change = np.bincount(base + start, minlength=size + 1).astype(np.int8)
    change -= np.bincount(base + end, minlength=size + 1).astype(np.int8)
    return np.cumsum(change[:size], dtype=np.int8).view(np.uint8)
