"""What the Triton kernels visit: lists of tiles from masks, in vectorised numpy.

Tiles that are entirely visible are kept as runs of neighbours, so a million causal tokens are 16
thousand runs, not 33 million tiles; tiles that are not carry the few band slices that matter in
them.  Time and memory are linear in runs, partial tiles and their pieces.  The format is that of
``triton_tiles_device``; one set of lists serves all heads, or each head has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import (
    K0,
    K1,
    LO,
    Q0,
    Q1,
    AttnMask,
    IntArray,
    canonical_indexed,
    ragged_indices,
)
from cpbench.masks.tiling import TileGrid, strips, tiles

Int32Array = npt.NDArray[np.int32]

LEAST_TILES = 4  # of a part of a row: fewer do not pay for writing and merging it


class Lists(NamedTuple):
    """Tiles to visit, as arrays that travel to the device.

    Attributes:
        items: ``(plans, n, 6)`` int32 rows of tiles, or parts of split ones: row, begin and end in
            ``runs``, begin and end in ``tiles``, slot (-1 for a row that is not split).
        order: ``(plans, n)`` int32 items by work, most first.
        runs: ``(r, 2)`` int32 first and end column of entirely visible neighbours; where they are
            listed one by one ``(r,)`` their columns.
        tiles: ``(t,)`` int32 columns of partial tiles.
        tile_layers: ``(t, 2)`` int32 where the layers of each begin and end.
        layers: ``(l + 1,)`` int32 where the pieces of each layer begin: at most one for a row of
            scores, right of those of the layer before.
        pieces: ``(p, 6)`` int32 band slices.
    """

    items: Int32Array
    order: Int32Array
    runs: Int32Array
    tiles: Int32Array
    tile_layers: Int32Array
    layers: Int32Array
    pieces: Int32Array


@dataclass(frozen=True, eq=False)
class Visits:
    """The lists of one direction (queries by keys, or keys by queries), and what they come to.

    Attributes:
        lists: see :class:`Lists`.
        splits: ``(m, 3)`` int32 split rows: row, and its first and end slot.
        slots: parts of split rows in all.
        visited: tiles visited, of all plans.
    """

    lists: Lists
    splits: Int32Array
    slots: int
    visited: int


def visits(masks: Sequence[AttnMask], block_q: int, block_k: int, parts: int = 1) -> Visits:
    """The tiles of one mask for all heads, or of one mask for each.

    Args:
        masks: of equal extents.
        block_q, block_k: a tile's queries and keys.
        parts: into how many parts, about, to split each row of tiles; only one mask is split.
    """
    found = [_of_mask(mask, block_q, block_k) for mask in masks]
    shift_runs = shift_tiles = 0
    items, work = [], []
    for one in found:
        items.append(_items(one, shift_runs, shift_tiles))
        work.append(one.tiles_of_row)
        shift_runs += len(one.runs)
        shift_tiles += len(one.cols)
    runs = np.concatenate([one.runs for one in found])
    cols = np.concatenate([one.cols for one in found])
    of_tiles = np.concatenate([one.layer_counts for one in found])
    of_layers = np.concatenate([one.piece_counts for one in found])
    pieces = np.concatenate([one.pieces for one in found])
    splits: IntArray = np.zeros((0, 3), dtype=np.int64)
    slots = 0
    table, each = np.stack(items), np.stack(work)
    if parts > 1:
        assert len(masks) == 1, "only the rows of one mask are split"
        table, each, runs, splits = _split(table[0], each[0], runs, parts)
        slots = int(splits[-1, 2]) if len(splits) else 0
    ends = np.cumsum(of_tiles)
    lists = Lists(
        items=table.astype(np.int32),
        order=np.argsort(-each, axis=1, kind="stable").astype(np.int32),
        runs=runs.astype(np.int32),
        tiles=cols.astype(np.int32),
        tile_layers=np.column_stack([ends - of_tiles, ends]).astype(np.int32),
        layers=_starts(of_layers).astype(np.int32),
        pieces=pieces.astype(np.int32),
    )
    return Visits(lists, splits.astype(np.int32), slots, int(sum(map(np.sum, work))))


def listed(visits: Visits) -> Visits:
    """The same with the tiles of runs one by one."""
    lists = visits.lists
    begin, end = lists.runs.T.astype(np.int64)
    run, number = ragged_indices(end - begin)
    first = _starts(end - begin)
    items = lists.items.copy()
    items[..., 1:3] = first[lists.items[..., 1:3]]
    runs = (begin[run] + number).astype(np.int32)
    return replace(visits, lists=lists._replace(items=items, runs=runs))


def grouped_order(visits: Visits, group: int) -> Int32Array:
    """``(plans / group, n)`` rows by the work of ``group`` neighbouring plans together."""
    items = visits.lists.items
    _, rows, _ = items.shape
    runs = visits.lists.runs
    length = np.concatenate([[0], np.cumsum(runs[:, 1] - runs[:, 0])])
    work = length[items[..., 2]] - length[items[..., 1]] + items[..., 4] - items[..., 3]
    return np.argsort(-work.reshape(-1, group, rows).sum(1), axis=1, kind="stable").astype(np.int32)


class _Found(NamedTuple):
    """The tiles of one mask, row by row."""

    run_starts: IntArray  # (rows + 1,) into runs
    runs: IntArray  # (r, 2)
    tile_starts: IntArray  # (rows + 1,) into cols
    cols: IntArray  # (t,)
    layer_counts: IntArray  # (t,)
    piece_counts: IntArray  # (layers,)
    pieces: IntArray  # (p, 6)
    tiles_of_row: IntArray  # (rows,)


def _of_mask(mask: AttnMask, block_q: int, block_k: int) -> _Found:
    grid = tiles(mask, block_q, block_k)
    # A kernel loads whole tiles unmasked: a narrower last column is never a run.
    whole = (grid.run_cols + grid.run_lens) * block_k <= mask.seq_k
    full = grid.run_full & whole
    rows = grid.num_rows

    lens = grid.run_lens[~full]
    run, number = ragged_indices(lens)
    row, col = grid.run_rows[~full][run], grid.run_cols[~full][run] + number
    layers = _layers(*_pieces(mask, grid, row, col), len(row))
    runs = np.column_stack([grid.run_cols, grid.run_cols + grid.run_lens])[full]
    return _Found(
        _starts(np.bincount(grid.run_rows[full], minlength=rows)), runs,
        _starts(np.bincount(row, minlength=rows)), col, *layers, np.diff(grid.row_starts),
    )  # fmt: skip


def _starts(counts: IntArray) -> IntArray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _pieces(
    mask: AttnMask, grid: TileGrid, row: IntArray, col: IntArray
) -> tuple[IntArray, IntArray]:
    """The band slices in each partial tile, clipped to it and tight, and the tile of each.

    Args:
        row, col: of the tiles, sorted.
    """
    cut, strip_row = strips(mask.slices, grid.block_q)
    width = max(grid.num_cols, 1)
    place = row * width + col
    begin = np.searchsorted(place, strip_row * width + cut[:, K0] // grid.block_k)
    end = np.searchsorted(place, strip_row * width + -(-cut[:, K1] // grid.block_k))
    strip, number = ragged_indices(end - begin)
    tile = number + begin[strip]
    ranges = np.column_stack([col[tile] * grid.block_k, (col[tile] + 1) * grid.block_k])
    inside = cut[strip]
    inside[:, K0] = np.maximum(inside[:, K0], ranges[:, 0])
    inside[:, K1] = np.minimum(inside[:, K1], ranges[:, 1])
    inside, kept = canonical_indexed(inside)
    order = np.argsort(tile[kept], kind="stable")
    return inside[order], tile[kept][order]


def _layers(
    pieces: IntArray, tile: IntArray, num_tiles: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Pieces sorted into layers, left to right: in each, a row has one interval at most.

    Rows of a tile are cut wherever a piece begins or ends.  In such a strip of rows every piece
    spans all rows, and pieces keep their order from row to row, for intervals that move by one
    column a row at most cannot change places without meeting; so their order in the first row is
    their order of layers.

    Returns:
        layers of each tile, pieces of each layer, and the pieces, layer after layer.
    """
    if not len(pieces):
        return np.zeros(num_tiles, np.int64), np.zeros(0, np.int64), pieces
    far = int(pieces[:, Q1].max()) + 1
    crowded = np.zeros(num_tiles, dtype=np.bool_)  # rows with two pieces
    order = np.lexsort((pieces[:, Q0], tile))
    pieces, tile = pieces[order], tile[order]
    reach = np.maximum.accumulate(tile * far + pieces[:, Q1])
    crowded[tile[1:][tile[1:] * far + pieces[1:, Q0] < reach[:-1]]] = True

    some = crowded[tile]
    cuts = np.unique(
        np.concatenate([tile[some] * far + pieces[some, Q0], tile[some] * far + pieces[some, Q1]])
    )
    first = np.searchsorted(cuts, tile * far + pieces[:, Q0])
    last = np.searchsorted(cuts, tile * far + pieces[:, Q1])
    source, number = ragged_indices(np.where(some, last - first, 1))
    parts, home = pieces[source], tile[source]
    strip = np.where(some[source], first[source] + number, -1)
    mine = np.flatnonzero(strip >= 0)
    parts[mine, Q0] = cuts[strip[mine]] - home[mine] * far
    parts[mine, Q1] = cuts[strip[mine] + 1] - home[mine] * far

    left = np.maximum(parts[:, K0], parts[:, Q0] + parts[:, LO])
    order = np.lexsort((left, strip, home))
    parts, home, strip = parts[order], home[order], strip[order]
    new = np.concatenate([[True], (home[1:] != home[:-1]) | (strip[1:] != strip[:-1])])
    begin = np.flatnonzero(new)
    rank = np.arange(len(parts)) - np.repeat(begin, np.diff(np.append(begin, len(parts))))
    rank[strip < 0] = 0
    order = np.lexsort((rank, home))
    parts, home, rank = parts[order], home[order], rank[order]
    new = np.concatenate([[True], (home[1:] != home[:-1]) | (rank[1:] != rank[:-1])])
    begin = np.flatnonzero(new)
    per_layer = np.diff(np.append(begin, len(parts)))
    return np.bincount(home[begin], minlength=num_tiles), per_layer, parts


def _items(found: _Found, shift_runs: int, shift_tiles: int) -> IntArray:
    """One item a row, none of them split."""
    rows = len(found.tiles_of_row)
    runs, cols = found.run_starts + shift_runs, found.tile_starts + shift_tiles
    whole = np.full(rows, -1)
    return np.column_stack([np.arange(rows), runs[:-1], runs[1:], cols[:-1], cols[1:], whole])


def _split(
    items: IntArray, work: IntArray, runs: IntArray, parts: int
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Rows cut into up to ``parts`` items of about equal work, as long as each has a few tiles.

    Returns:
        items, work of each, runs (cut where items end) and splits.
    """
    row, run0, run1, tile0 = items.T[:4]
    chunk = np.maximum(-(-work // parts), LEAST_TILES)
    # Runs of a row come first, then its partial tiles: cut at multiples of the chunk.
    of_run = np.repeat(np.arange(len(items)), run1 - run0)
    lens = runs[:, 1] - runs[:, 0]
    total = np.cumsum(lens) - lens
    offset = total - total[run0[of_run]] if len(runs) else total
    first, last = offset // chunk[of_run], (offset + lens - 1) // chunk[of_run]
    pieces = last - first + 1
    source, number = ragged_indices(pieces)
    number += first[source]
    bound = number * chunk[of_run[source]]
    begin = np.maximum(bound, offset[source])
    end = np.minimum(bound + chunk[of_run[source]], offset[source] + lens[source])
    base = runs[source, 0] - offset[source]
    cut = np.column_stack([base + begin, base + end])

    count = np.maximum(-(-work // chunk), 1)
    item_row, part = ragged_indices(count)
    low, high = part * chunk[item_row], np.minimum((part + 1) * chunk[item_row], work[item_row])
    key = of_run[source] * (parts + 1) + number
    mine = item_row * (parts + 1) + part
    of_runs = np.bincount(of_run, weights=lens, minlength=len(items)).astype(np.int64)[item_row]
    tile_low = tile0[item_row] + np.maximum(low - of_runs, 0)
    tile_high = tile0[item_row] + np.maximum(high - of_runs, 0)
    several = count > 1
    slot = np.where(several[item_row], np.cumsum(several[item_row]) - 1, -1)
    table = np.column_stack(
        [
            row[item_row], np.searchsorted(key, mine, "left"), np.searchsorted(key, mine, "right"),
            tile_low, tile_high, slot,
        ]
    )  # fmt: skip
    ends = np.cumsum(count[several])
    splits = np.column_stack([row[several], ends - count[several], ends])
    return table[None], (high - low)[None], cut, splits
