"""CPU plan of the `bands` operator: an attention mask as tiles, in vectorised numpy.

A tile is a range of queries times one or more spans of keys.  Most of its pairs are visible; the
others are listed as hidden regions: the triangle above or below the edge of a band, or, where
slices meet inside a tile in any other way, everything outside the listed slices.  A plan takes
O(tiles + slices): wide tiles are cut into chunks of keys only at run time, and no mask is stored.

All positions are those of the mask: query i, key j, offset j - i.  A strip is a slice of the mask
clipped to one interval of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import K0, K1, Q0, Q1, BoolArray, IntArray, areas, cut_axis

# Adjacent row intervals shorter than this share a tile: a call costs more than hidden pairs.
MIN_INTERVAL_ROWS = 16
# Key ranges at most this far apart share a span, with the gap hidden, for the same reason.
MAX_GAP_KEYS = 16
# Rows of a tile: queries times the query heads that share a key/value head.  Taller tiles make
# larger matrix products but compute more hidden pairs along the edges of a band; rows that see more
# than MIN_WIDE_KEYS keys on average get WIDE_TILE_ROWS.
TILE_ROWS, WIDE_TILE_ROWS, MIN_WIDE_KEYS = 128, 256, 2048

# Minimum rows and keys for which two fused calls, a causal one and a full one, beat tiles.
MIN_FUSED_ROWS = 256

ABOVE, BELOW, OUTSIDE = range(3)


class HiddenRegion(NamedTuple):
    """Hidden pairs of a tile, all with keys ``[k0, k1)``.

    Kind ABOVE hides ``j - i > offset``, BELOW hides ``j - i < offset``, OUTSIDE hides what is in
    none of ``strips``, band slices ``(q0, q1, k0, k1, lo, hi)``.
    """

    kind: int
    k0: int
    k1: int
    offset: int
    strips: tuple[tuple[int, ...], ...] = ()


class Span(NamedTuple):
    """Keys ``[k0, k1)`` of a tile, and their hidden regions."""

    k0: int
    k1: int
    hidden: tuple[HiddenRegion, ...]


class Tile(NamedTuple):
    """Queries ``[q0, q1)`` and the disjoint spans of keys that they see; ``alone`` if no other tile
    or square has these keys, so that their gradients are written, not added."""

    q0: int
    q1: int
    spans: tuple[Span, ...]
    alone: bool = False


class Square(NamedTuple):
    """Queries ``[q0, q1)`` that see the keys ``[k0, k1)`` fully or causally, all of the keys
    ``[prefix, k0)``, and no others; ``alone`` as of a tile."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    prefix: int
    alone: bool = False


@dataclass(frozen=True)
class Layout:
    """The tiles of a mask, and the squares that are left to a fused kernel instead.

    Filling memory with zeros costs as much as some of the products, so the layout also says where
    zeros are needed.

    Attributes:
        tiles: ordered by rows.
        squares: ordered by rows.
        row_gaps: queries ``[q0, q1)`` in no tile and no square.
        key_gaps: keys ``[k0, k1)`` in no tile or square that is alone: their gradients are
            accumulated from zero.
    """

    tiles: tuple[Tile, ...]
    squares: tuple[Square, ...]
    row_gaps: tuple[tuple[int, int], ...]
    key_gaps: tuple[tuple[int, int], ...]


def layout(mask: AttnMask, group: int = 1, tile: int = 0, fused: bool = True) -> Layout:
    """Divide a mask into tiles, in time and memory O(tiles + slices).

    Args:
        mask: any mask.
        group: query heads that share a key/value head; a tile contains all of them.
        tile: maximum rows of a tile, ``group`` per query; 0 depends on the keys that rows see.
        fused: whether there is a fused kernel for squares; tiles cover all without.
    """
    slices = mask.simplify().slices
    rows = _row_intervals(slices)
    squares: tuple[Square, ...] = ()
    if fused:
        squares, rows = _find_squares(slices, rows)
    heights = tile or np.where(_mean_keys(slices, rows) > MIN_WIDE_KEYS, WIDE_TILE_ROWS, TILE_ROWS)
    rows = _split_evenly(rows, np.maximum(heights // group, 1))
    strips, _, row = cut_axis(slices, rows, axis=0)
    order = np.lexsort((strips[:, K0], row))
    tiles = _build_tiles(strips[order], row[order], rows)
    rows_done = [(t.q0, t.q1) for t in tiles] + [(s.q0, s.q1) for s in squares]
    row_gaps = _uncovered(rows_done, mask.seq_q)
    keys = [(t.spans[0].k0, t.spans[-1].k1) for t in tiles] + [(s.prefix, s.k1) for s in squares]
    alone = _alone(keys)
    tiles = tuple(t._replace(alone=a) for t, a in zip(tiles, alone[: len(tiles)], strict=True))
    squares = tuple(s._replace(alone=a) for s, a in zip(squares, alone[len(tiles) :], strict=True))
    written = [(span.k0, span.k1) for t in tiles if t.alone for span in t.spans]
    written += [(s.prefix, s.k1) for s in squares if s.alone]
    return Layout(tiles, squares, row_gaps, _uncovered(written, mask.seq_k))


def _alone(ranges: list[tuple[int, int]]) -> list[bool]:
    """Whether each range overlaps no other."""
    begin, end = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
    order = np.argsort(begin, kind="stable")
    free = np.maximum.accumulate(end[order])[:-1] <= begin[order][1:]  # between neighbours
    alone = np.ones(len(ranges), dtype=bool)
    alone[order[1:]] &= free
    alone[order[:-1]] &= free
    return [bool(x) for x in alone]


def _uncovered(ranges: list[tuple[int, int]], length: int) -> tuple[tuple[int, int], ...]:
    """The parts of ``[0, length)`` that none of the disjoint ranges covers."""
    edges = np.array([(0, 0), *sorted(ranges), (length, length)], dtype=np.int64)
    gap = edges[1:, 0] - edges[:-1, 1]
    return tuple((int(edges[i, 1]), int(edges[i + 1, 0])) for i in np.flatnonzero(gap))


def _row_intervals(slices: IntArray) -> IntArray:
    """``(n, 2)`` starts and lengths of row intervals between slice boundaries, with consecutive
    short ones merged."""
    cuts = np.unique(slices[:, [Q0, Q1]])
    if len(cuts) > 2:
        short = np.diff(cuts) < MIN_INTERVAL_ROWS
        bucket = cuts // (4 * MIN_INTERVAL_ROWS)
        inner = short[:-1] & short[1:] & (bucket[1:-1] == bucket[:-2])
        cuts = cuts[np.concatenate([[True], ~inner, [True]])]
    return np.column_stack([cuts[:-1], np.diff(cuts)])


def _mean_keys(slices: IntArray, rows: IntArray) -> npt.NDArray[np.float64]:
    """``(n,)`` average number of keys that a row of each interval sees."""
    strips, _, row = cut_axis(slices, rows, axis=0)
    return np.bincount(row, weights=areas(strips), minlength=len(rows)) / rows[:, 1]


def _split_evenly(rows: IntArray, height: IntArray) -> IntArray:
    """Split intervals as evenly as possible into intervals of at most ``height`` rows."""
    start, length = rows.T
    count = -(-length // height)
    part = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    start, length, count = (np.repeat(x, count) for x in (start, length, count))
    begin = part * length // count
    return np.column_stack([start + begin, (part + 1) * length // count - begin])


def _find_squares(slices: IntArray, rows: IntArray) -> tuple[tuple[Square, ...], IntArray]:
    """Row intervals for fused causal or full calls, and the remaining intervals.

    A causal band that ends at the last key of the last query is a causal square after a prefix of
    keys that all of its rows see; the second call pays off if both have ``MIN_FUSED_ROWS`` keys.
    """
    strips, _, row = cut_axis(slices, rows, axis=0)
    q0, q1, k0, k1, lo, hi = strips.T
    alone = (np.bincount(row, minlength=len(rows)) == 1)[row]
    no_lower_edge = lo <= k0 - q1 + 1
    full = no_lower_edge & (hi >= k1 - 1 - q0)
    prefix = np.where(full, 0, (k1 - k0) - (q1 - q0))  # keys before the square
    causal = no_lower_edge & ~full & (prefix >= 0) & (hi == k1 - q1)
    pays_off = (prefix == 0) | (np.minimum(prefix, q1 - q0) >= MIN_FUSED_ROWS)
    fused = alone & (q1 - q0 == rows[row, 1]) & (full | causal) & pays_off
    table = np.column_stack([q0, q1, k0 + prefix, k1, causal, k0])[fused].tolist()
    squares = tuple(Square(a, b, c, d, bool(e), f) for a, b, c, d, e, f in table)
    return squares, np.delete(rows, row[fused], axis=0)


def _boundaries(*changes: BoolArray) -> BoolArray:
    """True for the first element, and where one of ``changes`` from the element before is True."""
    changed = np.logical_or.reduce(changes)
    return np.concatenate([[True], changed])


def _build_tiles(strips: IntArray, row: IntArray, rows: IntArray) -> tuple[Tile, ...]:
    """The tiles of strips that are sorted by row interval and first key."""
    if len(strips) == 0:
        return ()
    begin, end = rows[row, 0], rows[row, 0] + rows[row, 1]
    # Running maximum of the last key within a row interval; row * stride separates the intervals.
    stride = int(strips[:, K1].max()) + 1
    reach = np.maximum.accumulate(strips[:, K1] + row * stride) - row * stride
    new_row = row[1:] != row[:-1]
    overlap = ~new_row & (strips[1:, K0] < reach[:-1])
    new_span = _boundaries(new_row, strips[1:, K0] > reach[:-1] + MAX_GAP_KEYS)
    # A strip that is alone in its columns and spans all rows only needs its edges hidden.
    crowded = np.concatenate([overlap, [False]]) | np.concatenate([[False], overlap])
    simple = ~crowded & (strips[:, Q0] == begin) & (strips[:, Q1] == end)
    new_run = _boundaries(new_span[1:], simple[1:], simple[:-1])
    run_begin = np.flatnonzero(new_run)
    run_end = np.append(run_begin[1:], len(strips))

    span_of = np.cumsum(new_span) - 1
    hidden: list[list[HiddenRegion]] = [[] for _ in range(span_of[-1] + 1)]
    q0, q1, k0, k1, lo, hi = strips.T
    upper, lower = np.maximum(k0, q0 + hi + 1), np.minimum(k1, q1 - 1 + lo)
    for kind, x0, x1, offset in ((ABOVE, upper, k1, hi), (BELOW, k0, lower, lo)):
        cut = np.flatnonzero(simple & (x0 < x1))
        columns = (span_of[cut], x0[cut], x1[cut], offset[cut])
        for span, *region in zip(*(c.tolist() for c in columns), strict=True):
            hidden[span].append(HiddenRegion(kind, *region))
    for a, b in zip(run_begin[~simple[run_begin]], run_end[~simple[run_begin]], strict=True):
        inside = tuple(map(tuple, strips[a:b].tolist()))
        hidden[span_of[a]].append(HiddenRegion(OUTSIDE, int(k0[a]), int(reach[b - 1]), 0, inside))
    gaps = np.flatnonzero(new_run[1:] & ~new_span[1:] & (k0[1:] > reach[:-1]))
    for a in gaps.tolist():
        hidden[span_of[a]].append(HiddenRegion(OUTSIDE, int(reach[a]), int(k0[a + 1]), 0))

    first = np.flatnonzero(new_span)
    last = np.append(first[1:], len(strips)) - 1
    keys = zip(k0[first].tolist(), reach[last].tolist(), hidden, strict=True)
    spans = [Span(a, b, tuple(regions)) for a, b, regions in keys]
    first_spans = np.flatnonzero(_boundaries(new_row)[first])  # of each row interval
    end_spans = np.append(first_spans[1:], len(spans))
    leading = first[first_spans]
    table = np.column_stack([begin[leading], end[leading], first_spans, end_spans]).tolist()
    return tuple(Tile(q0, q1, tuple(spans[i:j])) for q0, q1, i, j in table)
