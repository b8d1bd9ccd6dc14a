"""Where the `bands` operator works: an attention mask as tiles, in vectorised numpy.

A tile is some query rows times one range of keys.  Most of its cells are visible; a *fix* hides
those that are not: the triangle above or below a band's edge, or, where slices meet inside a tile
in any other way, whatever lies outside a few listed pieces.  A plan is O(tiles + slices): wide
tiles are cut into chunks of keys only while they run, and no mask is stored.

All positions are those of the mask: query i, key j, offset j - i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import (
    K0,
    K1,
    Q0,
    Q1,
    AttnMask,
    BoolArray,
    IntArray,
    areas,
    cut_axis,
)

# Neighbouring row intervals shorter than this share a tile: a call costs more than hidden cells.
SHORT_ROWS = 16
# Key ranges at most this far apart share a tile, with the gap hidden, for the same reason.
GAP_KEYS = 16
# Queries (times the query heads that share a key/value head) of a tile.  Taller tiles make better
# matrix products but compute more hidden cells along the edges of a band, so wide rows get more.
ROWS, WIDE_ROWS, WIDE_KEYS = 128, 256, 2048

# Least rows and keys for which a fused causal call and one for the keys before it beat tiles.
FUSED_ROWS = 256

ABOVE, BELOW, OUTSIDE = range(3)


class Fix(NamedTuple):
    """Cells of a tile to hide, all in key columns ``[k0, k1)``.

    ``kind`` ABOVE hides ``j - i > offset``, BELOW hides ``j - i < offset``, OUTSIDE hides what is
    in none of ``pieces``, band slices ``(q0, q1, k0, k1, lo, hi)``.
    """

    kind: int
    k0: int
    k1: int
    offset: int
    pieces: tuple[tuple[int, ...], ...] = ()


class Span(NamedTuple):
    """Keys ``[k0, k1)`` of a tile."""

    k0: int
    k1: int
    fixes: tuple[Fix, ...]


class Tile(NamedTuple):
    """Queries ``[q0, q1)`` and all they see: disjoint spans of keys."""

    q0: int
    q1: int
    spans: tuple[Span, ...]


class Square(NamedTuple):
    """Queries ``[q0, q1)`` that see keys ``[k0, k1)``, all or causally, all of the keys
    ``[before, k0)``, and nothing else."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    before: int


@dataclass(frozen=True)
class Layout:
    """The tiles of a mask, by rows; ``squares`` are rows left to a fused kernel instead.

    Filling memory with zeros costs as much as some of the products, so a plan also says where zeros
    are needed: ``row_gaps`` are queries ``[q0, q1)`` in no tile and no square; ``key_gaps`` keys in
    no square, or None where keys are shared, so that their gradients must be added up from zero.
    """

    tiles: tuple[Tile, ...]
    squares: tuple[Square, ...]
    row_gaps: tuple[tuple[int, int], ...]
    key_gaps: tuple[tuple[int, int], ...] | None


def layout(mask: AttnMask, group: int = 1, tile: int = 0) -> Layout:
    """Cut a mask into tiles, in time and memory O(tiles + slices).

    Args:
        mask: any mask.
        group: query heads that share a key/value head, which are worked on as one.
        tile: most rows of scores of a tile, ``group`` a query; 0 chooses by how much rows see.
    """
    slices = mask.simplify().slices
    rows = _row_intervals(slices)
    squares, rows = _squares(slices, rows)
    heights = tile or np.where(_mean_keys(slices, rows) > WIDE_KEYS, WIDE_ROWS, ROWS)
    rows = _split_evenly(rows, np.maximum(heights // group, 1))
    pieces, _, row = cut_axis(slices, rows, axis=0)
    order = np.lexsort((pieces[:, K0], row))
    tiles = _tiles(pieces[order], row[order], rows)
    taken = [(t.q0, t.q1) for t in tiles] + [(s.q0, s.q1) for s in squares]
    row_gaps = _gaps(taken, mask.seq_q)
    key_gaps = None if tiles else _gaps([(s.before, s.k1) for s in squares], mask.seq_k)
    return Layout(tiles, squares, row_gaps or (), key_gaps)


def _gaps(ranges: list[tuple[int, int]], length: int) -> tuple[tuple[int, int], ...] | None:
    """What ranges leave of ``[0, length)``; None when they overlap."""
    edges = np.array([(0, 0), *sorted(ranges), (length, length)], dtype=np.int64)
    free = edges[1:, 0] - edges[:-1, 1]
    if (free < 0).any():
        return None
    return tuple((int(edges[i, 1]), int(edges[i + 1, 0])) for i in np.flatnonzero(free))


def _row_intervals(slices: IntArray) -> IntArray:
    """``(n, 2)`` starts and lengths between slice boundaries; runs of short ones are merged."""
    cuts = np.unique(slices[:, [Q0, Q1]])
    if len(cuts) > 2:
        short = np.diff(cuts) < SHORT_ROWS
        bucket = cuts // (4 * SHORT_ROWS)
        inner = short[:-1] & short[1:] & (bucket[1:-1] == bucket[:-2])
        cuts = cuts[np.concatenate([[True], ~inner, [True]])]
    return np.column_stack([cuts[:-1], np.diff(cuts)])


def _mean_keys(slices: IntArray, rows: IntArray) -> npt.NDArray[np.float64]:
    """``(n,)`` keys that a row of each interval sees, on average."""
    pieces, _, row = cut_axis(slices, rows, axis=0)
    return np.bincount(row, weights=areas(pieces), minlength=len(rows)) / rows[:, 1]


def _split_evenly(rows: IntArray, height: IntArray) -> IntArray:
    """Intervals of at most ``height`` rows each, as even as they can be."""
    start, length = rows.T
    count = -(-length // height)
    part = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    start, length, count = (np.repeat(x, count) for x in (start, length, count))
    begin = part * length // count
    return np.column_stack([start + begin, (part + 1) * length // count - begin])


def _squares(slices: IntArray, rows: IntArray) -> tuple[tuple[Square, ...], IntArray]:
    """Row intervals that fused causal or full calls serve, and the other intervals.

    A causal band that ends at the last key of the last query is a causal square behind keys that
    all of its rows see; that is worth a second call where both have a few hundred keys.
    """
    pieces, _, row = cut_axis(slices, rows, axis=0)
    q0, q1, k0, k1, lo, hi = pieces.T
    alone = (np.bincount(row, minlength=len(rows)) == 1)[row]
    free = lo <= k0 - q1 + 1  # no lower edge
    full = free & (hi >= k1 - 1 - q0)
    behind = np.where(full, 0, (k1 - k0) - (q1 - q0))
    causal = free & ~full & (behind >= 0) & (hi == k1 - q1)
    worth = (behind == 0) | (np.minimum(behind, q1 - q0) >= FUSED_ROWS)
    chosen = alone & (q1 - q0 == rows[row, 1]) & (full | causal) & worth
    found = np.column_stack([q0, q1, k0 + behind, k1, causal, k0])[chosen].tolist()
    squares = tuple(Square(a, b, c, d, bool(e), f) for a, b, c, d, e, f in found)
    return squares, np.delete(rows, row[chosen], axis=0)


def _starts(*changes: BoolArray) -> BoolArray:
    """True at the first element and wherever one of ``changes`` (between neighbours) is."""
    changed = np.logical_or.reduce(changes)
    return np.concatenate([[True], changed])


def _tiles(pieces: IntArray, row: IntArray, rows: IntArray) -> tuple[Tile, ...]:
    """Tiles of pieces sorted by row interval and first key."""
    if len(pieces) == 0:
        return ()
    begin, end = rows[row, 0], rows[row, 0] + rows[row, 1]
    # Running maximum of the last key within a row interval: each interval gets a band of its own.
    stride = int(pieces[:, K1].max()) + 1
    reach = np.maximum.accumulate(pieces[:, K1] + row * stride) - row * stride
    new_row = row[1:] != row[:-1]
    overlap = ~new_row & (pieces[1:, K0] < reach[:-1])
    new_tile = _starts(new_row, pieces[1:, K0] > reach[:-1] + GAP_KEYS)
    # A piece alone in its columns that spans all rows only needs its edges hidden.
    crowded = np.concatenate([overlap, [False]]) | np.concatenate([[False], overlap])
    simple = ~crowded & (pieces[:, Q0] == begin) & (pieces[:, Q1] == end)
    new_run = _starts(new_tile[1:], simple[1:], simple[:-1])
    run_begin = np.flatnonzero(new_run)
    run_end = np.append(run_begin[1:], len(pieces))

    tile_of = np.cumsum(new_tile) - 1
    fixes: list[list[Fix]] = [[] for _ in range(tile_of[-1] + 1)]
    q0, q1, k0, k1, lo, hi = pieces.T
    upper, lower = np.maximum(k0, q0 + hi + 1), np.minimum(k1, q1 - 1 + lo)
    for kind, x0, x1, offset in ((ABOVE, upper, k1, hi), (BELOW, k0, lower, lo)):
        which = np.flatnonzero(simple & (x0 < x1))
        columns = (tile_of[which], x0[which], x1[which], offset[which])
        for t, *fix in zip(*(c.tolist() for c in columns), strict=True):
            fixes[t].append(Fix(kind, *fix))
    for a, b in zip(run_begin[~simple[run_begin]], run_end[~simple[run_begin]], strict=True):
        inside = tuple(map(tuple, pieces[a:b].tolist()))
        fixes[tile_of[a]].append(Fix(OUTSIDE, int(k0[a]), int(reach[b - 1]), 0, inside))
    same_tile = np.flatnonzero(new_run[1:] & ~new_tile[1:] & (k0[1:] > reach[:-1]))
    for a in same_tile.tolist():
        fixes[tile_of[a]].append(Fix(OUTSIDE, int(reach[a]), int(k0[a + 1]), 0))

    first = np.flatnonzero(new_tile)
    last = np.append(first[1:], len(pieces)) - 1
    keys = zip(k0[first].tolist(), reach[last].tolist(), fixes, strict=True)
    spans = [Span(a, b, tuple(fix)) for a, b, fix in keys]
    lead = np.flatnonzero(_starts(new_row)[first])
    ends = np.append(lead[1:], len(spans))
    table = np.column_stack([begin[first[lead]], end[first[lead]], lead, ends]).tolist()
    return tuple(Tile(q0, q1, tuple(spans[i:j])) for q0, q1, i, j in table)
