"""Plan of the Triton kernels: lists of the tiles that they visit, in vectorised numpy.

Entirely visible tiles are stored as runs of adjacent ones, so a million causal tokens are 16
thousand runs, not 33 million tiles; each partial tile has the few band slices that cut it.  Time
and memory are linear in the number of runs, partial tiles and their slices.  The format is that of
``tiles_device``; all heads share one plan, or each head has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import K0, K1, LO, Q0, Q1, IntArray, canonical_indexed, ragged_indices
from cpbench.masks.tiling import TileGrid, strips, tiles

Int32Array = npt.NDArray[np.int32]

MIN_SPLIT_TILES = 4  # tiles per part of a split row; fewer do not pay for storing and merging it


class TileLists(NamedTuple):
    """Tiles to visit, as arrays for the device.

    Attributes:
        items: ``(plans, n, 6)`` int32, rows of tiles or parts of split rows: row, begin and end in
            ``runs``, begin and end in ``tiles``, slot (-1 for a row that is not split).
        order: ``(plans, n)`` int32, items by decreasing work.
        runs: ``(r, 2)`` int32, first and end column of each run of entirely visible tiles; ``(r,)``
            their columns if they are listed one by one.
        tiles: ``(t,)`` int32, columns of partial tiles.
        tile_layers: ``(t, 2)`` int32, first and end layer of each partial tile.
        layers: ``(l + 1,)`` int32, the first slice of each layer; a layer has at most one visible
            interval per row, to the right of those of the layer before.
        slices: ``(p, 6)`` int32, band slices.
    """

    items: Int32Array
    order: Int32Array
    runs: Int32Array
    tiles: Int32Array
    tile_layers: Int32Array
    layers: Int32Array
    slices: Int32Array


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The lists of one direction (queries by keys, or keys by queries), and their totals.

    Attributes:
        lists: see :class:`TileLists`.
        splits: ``(m, 3)`` int32, for each split row its number, first slot and end slot.
        slots: number of parts of split rows.
        visited: number of tiles visited, over all plans.
    """

    lists: TileLists
    splits: Int32Array
    slots: int
    visited: int


def plan_tiles(masks: Sequence[AttnMask], block_q: int, block_k: int, parts: int = 1) -> TilePlan:
    """List the tiles of one mask for all heads, or of one mask per head.

    Args:
        masks: of equal extents.
        block_q, block_k: queries and keys per tile.
        parts: approximate number of parts to split each row of tiles into; needs a single mask.
    """
    mask_tiles = [_mask_tiles(mask, block_q, block_k) for mask in masks]
    run_offset = tile_offset = 0
    mask_items, mask_work = [], []
    for tiles_of_mask in mask_tiles:
        mask_items.append(_unsplit_items(tiles_of_mask, run_offset, tile_offset))
        mask_work.append(tiles_of_mask.row_work)
        run_offset += len(tiles_of_mask.runs)
        tile_offset += len(tiles_of_mask.cols)
    runs = np.concatenate([tiles_of_mask.runs for tiles_of_mask in mask_tiles])
    cols = np.concatenate([tiles_of_mask.cols for tiles_of_mask in mask_tiles])
    layer_counts = np.concatenate([tiles_of_mask.layer_counts for tiles_of_mask in mask_tiles])
    slice_counts = np.concatenate([tiles_of_mask.slice_counts for tiles_of_mask in mask_tiles])
    slices = np.concatenate([tiles_of_mask.slices for tiles_of_mask in mask_tiles])
    splits: IntArray = np.zeros((0, 3), dtype=np.int64)
    slots = 0
    items, work = np.stack(mask_items), np.stack(mask_work)
    if parts > 1:
        assert len(masks) == 1, "only the rows of a single mask are split"
        items, work, runs, splits = _split_rows(items[0], work[0], runs, parts)
        slots = int(splits[-1, 2]) if len(splits) else 0
    layer_ends = np.cumsum(layer_counts)
    lists = TileLists(
        items=items.astype(np.int32),
        order=np.argsort(-work, axis=1, kind="stable").astype(np.int32),
        runs=runs.astype(np.int32),
        tiles=cols.astype(np.int32),
        tile_layers=np.column_stack([layer_ends - layer_counts, layer_ends]).astype(np.int32),
        layers=_offsets(slice_counts).astype(np.int32),
        slices=slices.astype(np.int32),
    )
    return TilePlan(lists, splits.astype(np.int32), slots, int(sum(map(np.sum, mask_work))))


def list_runs(plan: TilePlan) -> TilePlan:
    """The same plan with the tiles of runs listed one by one."""
    lists = plan.lists
    begin, end = lists.runs.T.astype(np.int64)
    run, number = ragged_indices(end - begin)
    first = _offsets(end - begin)
    items = lists.items.copy()
    items[..., 1:3] = first[lists.items[..., 1:3]]
    runs = (begin[run] + number).astype(np.int32)
    return replace(plan, lists=lists._replace(items=items, runs=runs))


def grouped_order(plan: TilePlan, group: int) -> Int32Array:
    """``(plans / group, n)`` rows by decreasing total work of ``group`` consecutive plans."""
    items = plan.lists.items
    _, rows, _ = items.shape
    runs = plan.lists.runs
    length = np.concatenate([[0], np.cumsum(runs[:, 1] - runs[:, 0])])
    work = length[items[..., 2]] - length[items[..., 1]] + items[..., 4] - items[..., 3]
    return np.argsort(-work.reshape(-1, group, rows).sum(1), axis=1, kind="stable").astype(np.int32)


class _MaskTiles(NamedTuple):
    """The tiles of one mask, row by row."""

    run_starts: IntArray  # (rows + 1,) into runs
    runs: IntArray  # (r, 2)
    tile_starts: IntArray  # (rows + 1,) into cols
    cols: IntArray  # (t,) of partial tiles
    layer_counts: IntArray  # (t,)
    slice_counts: IntArray  # (layers,)
    slices: IntArray  # (p, 6)
    row_work: IntArray  # (rows,) number of tiles


def _mask_tiles(mask: AttnMask, block_q: int, block_k: int) -> _MaskTiles:
    grid = tiles(mask, block_q, block_k)
    # Kernels load the tiles of runs without bounds checks: a narrower last column is partial.
    in_bounds = (grid.run_cols + grid.run_lens) * block_k <= mask.seq_k
    full = grid.run_full & in_bounds
    rows = grid.num_rows

    run, number = ragged_indices(grid.run_lens[~full])
    row, col = grid.run_rows[~full][run], grid.run_cols[~full][run] + number
    layers = _sort_into_layers(*_partial_slices(mask, grid, row, col), len(row))
    runs = np.column_stack([grid.run_cols, grid.run_cols + grid.run_lens])[full]
    return _MaskTiles(
        _offsets(np.bincount(grid.run_rows[full], minlength=rows)), runs,
        _offsets(np.bincount(row, minlength=rows)), col, *layers, np.diff(grid.row_starts),
    )  # fmt: skip


def _offsets(counts: IntArray) -> IntArray:
    """The exclusive cumulative sum of counts, followed by their total."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _partial_slices(
    mask: AttnMask, grid: TileGrid, row: IntArray, col: IntArray
) -> tuple[IntArray, IntArray]:
    """The band slices of partial tiles, clipped to their tile and canonical, and the tile of each.

    Args:
        row, col: rows and columns of the partial tiles, sorted.
    """
    row_slices, slice_row = strips(mask.slices, grid.block_q)
    width = max(grid.num_cols, 1)
    tile_number = row * width + col
    begin = np.searchsorted(tile_number, slice_row * width + row_slices[:, K0] // grid.block_k)
    end = np.searchsorted(tile_number, slice_row * width + -(-row_slices[:, K1] // grid.block_k))
    source, number = ragged_indices(end - begin)
    tile = number + begin[source]
    slices = row_slices[source]
    slices[:, K0] = np.maximum(slices[:, K0], col[tile] * grid.block_k)
    slices[:, K1] = np.minimum(slices[:, K1], (col[tile] + 1) * grid.block_k)
    slices, kept = canonical_indexed(slices)
    order = np.argsort(tile[kept], kind="stable")
    return slices[order], tile[kept][order]


def _sort_into_layers(
    slices: IntArray, tile: IntArray, num_tiles: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Sort slices into layers from left to right, with at most one interval per row in a layer.

    In tiles in which a row has several slices, rows are cut wherever a slice begins or ends.  In
    such a strip every slice spans all rows, and slices keep their order from row to row, since
    intervals that move by at most one column per row cannot change places without overlapping; so
    their order in the first row of the strip is the order of layers.

    Returns:
        number of layers of each tile, number of slices of each layer, and the slices by layer.
    """
    if not len(slices):
        return np.zeros(num_tiles, np.int64), np.zeros(0, np.int64), slices
    stride = int(slices[:, Q1].max()) + 1  # tile * stride + row orders rows by tile
    crowded_tiles = np.zeros(num_tiles, dtype=np.bool_)  # those in which a row has several slices
    order = np.lexsort((slices[:, Q0], tile))
    slices, tile = slices[order], tile[order]
    reach = np.maximum.accumulate(tile * stride + slices[:, Q1])
    crowded_tiles[tile[1:][tile[1:] * stride + slices[1:, Q0] < reach[:-1]]] = True

    crowded = crowded_tiles[tile]
    begins, ends = tile * stride + slices[:, Q0], tile * stride + slices[:, Q1]
    cuts = np.unique(np.concatenate([begins[crowded], ends[crowded]]))
    first, last = np.searchsorted(cuts, begins), np.searchsorted(cuts, ends)
    source, number = ragged_indices(np.where(crowded, last - first, 1))
    slices, tile = slices[source], tile[source]
    strip = np.where(crowded[source], first[source] + number, -1)
    cut = np.flatnonzero(strip >= 0)
    slices[cut, Q0] = cuts[strip[cut]] - tile[cut] * stride
    slices[cut, Q1] = cuts[strip[cut] + 1] - tile[cut] * stride

    left = np.maximum(slices[:, K0], slices[:, Q0] + slices[:, LO])
    order = np.lexsort((left, strip, tile))
    slices, tile, strip = slices[order], tile[order], strip[order]
    new_strip = np.concatenate([[True], (tile[1:] != tile[:-1]) | (strip[1:] != strip[:-1])])
    begin = np.flatnonzero(new_strip)
    layer = np.arange(len(slices)) - np.repeat(begin, np.diff(np.append(begin, len(slices))))
    layer[strip < 0] = 0
    order = np.lexsort((layer, tile))
    slices, tile, layer = slices[order], tile[order], layer[order]
    new_layer = np.concatenate([[True], (tile[1:] != tile[:-1]) | (layer[1:] != layer[:-1])])
    begin = np.flatnonzero(new_layer)
    slice_counts = np.diff(np.append(begin, len(slices)))
    return np.bincount(tile[begin], minlength=num_tiles), slice_counts, slices


def _unsplit_items(mask_tiles: _MaskTiles, run_offset: int, tile_offset: int) -> IntArray:
    """One item per row; none of them is split."""
    rows = len(mask_tiles.row_work)
    runs, cols = mask_tiles.run_starts + run_offset, mask_tiles.tile_starts + tile_offset
    no_slot = np.full(rows, -1)
    return np.column_stack([np.arange(rows), runs[:-1], runs[1:], cols[:-1], cols[1:], no_slot])


def _split_rows(
    items: IntArray, work: IntArray, runs: IntArray, parts: int
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Split rows into up to ``parts`` items of about equal work and ``MIN_SPLIT_TILES`` tiles.

    Returns:
        items, work of each, runs (cut where items end) and splits.
    """
    row, run0, run1, tile0 = items.T[:4]
    chunk = np.maximum(-(-work // parts), MIN_SPLIT_TILES)
    # The tiles of a row, its runs and then its partial tiles, are cut at multiples of the chunk.
    run_row = np.repeat(np.arange(len(items)), run1 - run0)
    lens = runs[:, 1] - runs[:, 0]
    total = np.cumsum(lens) - lens
    offset = total - total[run0[run_row]] if len(runs) else total
    first, last = offset // chunk[run_row], (offset + lens - 1) // chunk[run_row]
    source, run_part = ragged_indices(last - first + 1)
    run_part += first[source]
    bound = run_part * chunk[run_row[source]]
    begin = np.maximum(bound, offset[source])
    end = np.minimum(bound + chunk[run_row[source]], offset[source] + lens[source])
    base = runs[source, 0] - offset[source]
    cut_runs = np.column_stack([base + begin, base + end])

    count = np.maximum(-(-work // chunk), 1)
    item_row, part = ragged_indices(count)
    low, high = part * chunk[item_row], np.minimum((part + 1) * chunk[item_row], work[item_row])
    run_item = run_row[source] * (parts + 1) + run_part
    item = item_row * (parts + 1) + part
    run_tiles = np.bincount(run_row, weights=lens, minlength=len(items)).astype(np.int64)[item_row]
    tile_begin = tile0[item_row] + np.maximum(low - run_tiles, 0)
    tile_end = tile0[item_row] + np.maximum(high - run_tiles, 0)
    split = count > 1
    slot = np.where(split[item_row], np.cumsum(split[item_row]) - 1, -1)
    split_items = np.column_stack(
        [
            row[item_row],
            np.searchsorted(run_item, item, "left"), np.searchsorted(run_item, item, "right"),
            tile_begin, tile_end, slot,
        ]
    )  # fmt: skip
    ends = np.cumsum(count[split])
    splits = np.column_stack([row[split], ends - count[split], ends])
    return split_items[None], (high - low)[None], cut_runs, splits
