"""Arithmetic on band slices, ``(n, 6)`` int64 arrays with rows ``(q0, q1, k0, k1, lo, hi)``: see
:mod:`cpbench.masks.attn_mask`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

Q0, Q1, K0, K1, LO, HI = range(6)
MOST = 1 << 60  # entries of a slice: sums of a few fit 64 bits
FEW = 512  # slices of a mask up to which the merged ones are cached


def as_slices(rows: IntArray | Iterable[Sequence[int]]) -> IntArray:
    """``(n, 6)`` int64 from any iterable of six-tuples.

    Raises:
        ValueError: unless they are integers, at most 2**60 in size.
    """
    raw = rows if isinstance(rows, np.ndarray) else np.array(list(rows))
    if not raw.size:
        return np.zeros((0, 6), np.int64)
    if raw.dtype.kind not in "iu" or raw.size % 6 or (raw < -MOST).any() or (raw > MOST).any():
        raise ValueError("slices must be rows of six integers up to 2**60: q0, q1, k0, k1, lo, hi")
    return raw.astype(np.int64, copy=False).reshape(-1, 6)


def areas(slices: IntArray) -> IntArray:
    """``(n,)`` visible pairs of each canonical slice.

    O(1) per slice: the pairs of a rectangle with ``j - i <= h`` are a difference of triangular
    numbers, and a band is the difference of two such counts.
    """
    q0, q1, k0, k1, lo, hi = slices.T
    return _pairs_up_to(q0, q1, k0, k1, hi) - _pairs_up_to(q0, q1, k0, k1, lo - 1)


def ragged_indices(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Row and position of each item of ragged rows: ``[2, 0, 1]`` is ``[0, 0, 2], [0, 1, 0]``."""
    source = np.repeat(np.arange(len(counts)), counts)
    return source, np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)


def canonical(slices: IntArray) -> IntArray:
    """Slices with tight rectangles and offsets, in the same order, without empty ones."""
    return canonical_indexed(slices)[0]


def cut_axis(slices: IntArray, ranges: IntArray, axis: int) -> tuple[IntArray, IntArray, IntArray]:
    """Cut slices along one axis at the borders of disjoint ranges; what is in no range is dropped.

    Args:
        slices: ``(n, 6)`` canonical.
        ranges: ``(m, 2)`` rows ``(start, length)``, disjoint, in any order.
        axis: 0 cuts queries, 1 cuts keys.

    Returns:
        ``(p, 6)`` canonical slices, and for each the index of its original slice ``(p,)`` and of
        its range ``(p,)``.
    """
    order = np.lexsort((ranges[:, 1], ranges[:, 0]))
    start, end = ranges[order, 0], ranges[order, 0] + ranges[order, 1]
    low, high = (Q0, Q1) if axis == 0 else (K0, K1)
    first = np.searchsorted(end, slices[:, low], side="right")
    last = np.searchsorted(start, slices[:, high], side="left")
    count = np.maximum(last - first, 0)
    source, range_index = ragged_indices(count)
    range_index += first[source]
    cut = slices[source]
    cut[:, low] = np.maximum(cut[:, low], start[range_index])
    cut[:, high] = np.minimum(cut[:, high], end[range_index])
    cut, kept = canonical_indexed(cut)
    return cut, source[kept], order[range_index[kept]]


def shifted(slices: IntArray, shift_q: IntArray, shift_k: IntArray) -> IntArray:
    """Slices moved by ``(n,)`` numbers of queries and keys each, with their offsets."""
    moved = slices.copy()
    moved[:, Q0] += shift_q
    moved[:, Q1] += shift_q
    moved[:, K0] += shift_k
    moved[:, K1] += shift_k
    moved[:, LO] += shift_k - shift_q
    moved[:, HI] += shift_k - shift_q
    return moved


def strided(
    slices: IntArray, step: int, q_phase: IntArray | int, k_phase: IntArray | int
) -> IntArray:
    """Slices between queries ``q_phase + step * i`` and keys ``k_phase + step * j``, not canonical.

    Args:
        q_phase, k_phase: of all slices, or ``(n,)``.
    """
    q0, q1, k0, k1, lo, hi = slices.T
    columns = [
        ceil_div(q0 - q_phase, step), ceil_div(q1 - q_phase, step),
        ceil_div(k0 - k_phase, step), ceil_div(k1 - k_phase, step),
        ceil_div(lo + q_phase - k_phase, step), (hi + q_phase - k_phase) // step,
    ]  # fmt: skip
    return np.column_stack(columns)


def transposed(slices: IntArray) -> IntArray:
    """Slices with queries and keys exchanged."""
    q0, q1, k0, k1, lo, hi = slices.T
    return np.column_stack([k0, k1, q0, q1, -hi, -lo])


def canonical_indexed(slices: IntArray) -> tuple[IntArray, IntArray]:
    """:func:`canonical`, and the index of the input of each output.

    One pass is exact.  It drops offsets outside the rectangle, rows without visible keys, columns
    that no row sees, and the offsets that only those rows and columns had.
    """
    q0, q1, k0, k1, lo, hi = slices.T
    lo = np.maximum(lo, k0 - q1 + 1)
    hi = np.minimum(hi, k1 - 1 - q0)
    q0, q1 = np.maximum(q0, k0 - hi), np.minimum(q1, k1 - lo)
    k0, k1 = np.maximum(k0, q0 + lo), np.minimum(k1, q1 + hi)
    lo = np.maximum(lo, k0 - q1 + 1)
    hi = np.minimum(hi, k1 - 1 - q0)
    index = np.flatnonzero((q0 < q1) & (k0 < k1) & (lo <= hi))
    return np.column_stack([q0, q1, k0, k1, lo, hi])[index], index


def _pairs_up_to(q0: IntArray, q1: IntArray, k0: IntArray, k1: IntArray, h: IntArray) -> IntArray:
    """``(n,)`` pairs of each rectangle with ``j - i <= h``."""
    # Row i has min(i + h + 1, k1) - k0 keys, at least 0: an arithmetic series, clamped.
    last = q1 + h - k0
    first = q0 + h - k0
    width = k1 - k0
    return _clamped_sum(last, width) - _clamped_sum(first, width)


def _clamped_sum(x: IntArray, width: IntArray) -> IntArray:
    """Sum over y = 1..x of min(y, width), for any integer x."""
    terms = np.maximum(x, 0)
    excess = np.maximum(x - width, 0)
    total: IntArray = (terms * (terms + 1) - excess * (excess + 1)) >> 1
    return total


def visible_keys_per_query(slices: IntArray, length: int) -> IntArray:
    """``(length,)`` visible keys: each slice adds a trapezoid, by its second differences."""
    q0, q1, k0, k1, lo, hi = slices.T
    slope = np.zeros(length + 2, dtype=np.int64)
    offset = np.zeros(length + 2, dtype=np.int64)
    np.add.at(slope, q0 + 1, 1)  # the last visible key moves with i ...
    np.add.at(slope, np.clip(k1 - hi, q0 + 1, q1), -1)  # ... up to the right edge
    np.add.at(slope, np.clip(k0 - lo + 1, q0 + 1, q1), -1)  # the first one moves from the left edge
    np.add.at(slope, q1, 1)

    for row, position, sign in ((q0, q0, 1), (q1 - 1, q1, -1)):
        visible = np.minimum(k1 - 1, row + hi) - np.maximum(k0, row + lo) + 1
        np.add.at(offset, position, sign * visible)
    return np.cumsum(np.cumsum(slope) + offset)[:length]


def row_overlaps(slices: IntArray) -> tuple[IntArray, IntArray]:
    """Index pairs (a < b) of slices with intersecting query ranges; slices are sorted by q0."""
    end = np.searchsorted(slices[:, Q0], slices[:, Q1], side="left")
    index = np.arange(len(slices))
    count = np.maximum(end - index - 1, 0)
    first, second = ragged_indices(count)
    return first, second + first + 1


def merged(slices: IntArray) -> IntArray:
    """Canonical slices with neighbours in row order and in column order merged, until nothing
    merges.  The result for up to ``FEW`` slices is cached: the steps of a ring have few different
    masks."""
    if len(slices) > FEW:
        return _merge_all(slices)
    return np.frombuffer(_merge_few(slices.tobytes()), np.int64).reshape(-1, 6)


@functools.lru_cache(maxsize=512)
def _merge_few(rows: bytes) -> bytes:
    return _merge_all(np.frombuffer(rows, np.int64).reshape(-1, 6)).tobytes()


def _merge_all(slices: IntArray) -> IntArray:
    while True:
        count = len(slices)
        for keys in ((LO, K0, Q0), (LO, Q0, K0)):
            slices = _merge_neighbours(slices, keys)
        if len(slices) == count:
            return slices


def _merge_neighbours(slices: IntArray, keys: tuple[int, int, int]) -> IntArray:
    """Merge slice 2m with 2m+1, then 2m+1 with 2m+2, in the order of ``keys`` (last is primary)."""
    for parity in (0, 1):
        slices = slices[np.lexsort([slices[:, c] for c in keys])]
        a, b = slices[parity:-1:2], slices[parity + 1 :: 2]
        a = a[: len(b)]
        hull = np.column_stack(
            [
                np.minimum(a[:, c], b[:, c]) if c in (Q0, K0, LO) else np.maximum(a[:, c], b[:, c])
                for c in range(6)
            ]
        )
        area = areas(slices)
        fits = areas(hull) == area[parity:-1:2][: len(b)] + area[parity + 1 :: 2]
        slices = slices.copy()
        slices[parity:-1:2][: len(b)][fits] = hull[fits]
        keep = np.ones(len(slices), dtype=np.bool_)
        keep[parity + 1 :: 2] = ~fits
        slices = slices[keep]
    return canonical(slices)


def local_starts(ranges: IntArray) -> IntArray:
    """The start of each range in the concatenation of all."""
    return np.cumsum(ranges[:, 1]) - ranges[:, 1]


def ceil_div(x: IntArray, y: int) -> IntArray:
    return -(-x // y)
