"""Tile counts of band slices against counts of dense masks."""

from __future__ import annotations

import numpy as np
import pytest

from cpbench import masks
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import BoolArray
from cpbench.simulator.tiles import TileCounts, Tiling, count_documents

MASKS = (
    "full", "causal", "causal_document:doc_lens=[7,40,1,52]", "sliding_window:window=9",
    "share_question:doc_lens=[30,50,20]", "streaming:num_sinks=3,window=10", "empty",
)  # fmt: skip


def dense_counts(visible: BoolArray, tile: int, block: int) -> list[int]:
    """Visited blocks of every run of ``tile`` rows."""
    rows, columns = (
        range(0, n, step) for n, step in zip(visible.shape, (tile, block), strict=True)
    )
    return [
        sum(visible[row : row + tile, column : column + block].any() for column in columns)
        for row in rows
    ]


def summary(visits: list[int]) -> TileCounts:
    busy = sum(n > 0 for n in visits)
    return TileCounts(sum(visits), busy, len(visits) - busy, max(visits, default=0))


def build(text: str, tokens: int = 100) -> AttnMask:
    if text == "empty":
        return AttnMask.from_slices(tokens, tokens, [])
    return masks.build(text, tokens)


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("tiles", [(1, 1), (16, 8), (8, 16), (128, 128)])
def test_tiles_of_a_mask(text: str, tiles: tuple[int, int]) -> None:
    mask = build(text)
    tiling = Tiling(fwd=tiles, bwd=tiles, grid="mask")
    visible = mask.to_dense()
    assert tiling.count(mask, "fwd") == summary(dense_counts(visible, *tiles))
    assert tiling.count(mask, "bwd") == summary(dense_counts(visible.T, tiles[1], tiles[0]))


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("tiles", [(16, 8), (8, 16)])
def test_tiles_of_slices(text: str, tiles: tuple[int, int]) -> None:
    """Every slice is a mask of its own, whose grid is that of the longest."""
    mask = build(text)
    tiling = Tiling(fwd=tiles, bwd=tiles, grid="slices")
    for phase in ("fwd", "bwd"):
        visits, longest = [], 0
        for q0, q1, k0, k1, lo, hi in mask.slices.tolist():
            offset = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
            visible = (offset >= lo) & (offset <= hi)
            of_slice = dense_counts(visible, *tiles)
            if phase == "bwd":
                of_slice = dense_counts(visible.T, tiles[1], tiles[0])
            visits += of_slice
            longest = max(longest, len(of_slice))
        expected = summary(visits)
        launched = longest * len(mask.slices)
        busy = sum(n > 0 for n in visits)
        assert tiling.count(mask, phase) == TileCounts(
            expected.blocks, busy, launched - busy, expected.largest
        )


def test_documents_are_slices() -> None:
    """Documents without queries or keys launch nothing; a causal one ends where its keys end."""
    counts = count_documents([10, 0, 33, 5], [10, 8, 40, 0], causal=True, tile=8, block=16)
    visits = []
    for q, k in ((10, 10), (33, 40)):
        visible = np.tril(np.ones((q, k), dtype=np.bool_), k - q)
        visits += dense_counts(visible, 8, 16)
    assert counts == TileCounts(sum(visits), 7, 3, max(visits))


def test_rows_of_a_causal_tile_reach_back_over_the_slices() -> None:
    """What a long document costs its largest tile does not depend on the short ones."""
    tiling = Tiling(fwd=(16, 16), bwd=(16, 16), grid="slices")
    packed = masks.build("causal_document:doc_lens=[64,16,16,4]", 100)
    assert tiling.count(packed, "fwd") == TileCounts(blocks=13, tiles=7, empty=9, largest=4)
