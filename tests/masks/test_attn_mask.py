"""Properties of ``AttnMask`` and of its tilings, compared with dense masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from any_mask import MANY, masks
from hypothesis import given
from hypothesis import strategies as st

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import areas, canonical, cut_axis
from cpbench.masks.tiling import tiles


@st.composite
def ranges(draw: st.DrawFn, end: int) -> np.ndarray:
    """Disjoint ``(start, length)`` in any order, some empty or past ``end``."""
    cuts = sorted(draw(st.lists(st.integers(0, end + 4), min_size=2, max_size=6)))
    pairs = [(a, b - a) for a, b in itertools.pairwise(cuts)]
    kept = draw(st.lists(st.sampled_from(pairs), min_size=1, unique=True))
    return np.array(draw(st.permutations(kept)), dtype=np.int64)


def _tokens(ranges: np.ndarray) -> np.ndarray:
    return np.concatenate([np.arange(start, start + length) for start, length in ranges])


@MANY
@given(masks())
def test_counts_agree_with_dense(mask: AttnMask) -> None:
    dense = mask.to_dense()
    assert mask.area == dense.sum()
    assert mask.density == dense.mean()
    assert (mask.row_counts() == dense.sum(axis=1)).all()
    assert (mask.empty_rows() == ~dense.any(axis=1)).all()
    assert mask.overlap_area() == 0


@MANY
@given(masks())
def test_slices_are_canonical(mask: AttnMask) -> None:
    assert (canonical(mask.slices) == mask.slices).all()
    again = AttnMask.from_slices(mask.seq_q, mask.seq_k, mask.slices[::-1])
    assert again.digest == mask.digest
    for q0, q1, k0, k1, lo, hi in mask.slices:
        i, j = np.ogrid[q0:q1, k0:k1]
        visible = (j - i >= lo) & (j - i <= hi)
        assert visible.any(axis=1).all()
        assert visible.any(axis=0).all()
        offsets = (j - i)[visible]
        assert (offsets.min(), offsets.max()) == (lo, hi)
    assert not mask.slices.flags.writeable


@MANY
@given(st.data())
def test_overlap_area_counts_pairs_of_slices(data: st.DataObject) -> None:
    number = st.integers(-3, 14)
    rows = data.draw(st.lists(st.tuples(*[number] * 6), max_size=5))
    mask = AttnMask.from_slices(11, 12, rows)
    layers = [AttnMask.from_slices(11, 12, row[None]).to_dense() for row in mask.slices]
    expected = sum(int((a & b).sum()) for n, a in enumerate(layers) for b in layers[:n])
    assert mask.overlap_area() == expected


@MANY
@given(masks())
def test_transpose(mask: AttnMask) -> None:
    transposed = mask.transpose()
    assert (transposed.to_dense() == mask.to_dense().T).all()
    assert transposed.transpose().digest == mask.digest


@MANY
@given(masks(), st.data())
def test_crop(mask: AttnMask, data: st.DataObject) -> None:
    q0, q1 = sorted(data.draw(st.tuples(*[st.integers(0, mask.seq_q)] * 2)))
    k0, k1 = sorted(data.draw(st.tuples(*[st.integers(0, mask.seq_k)] * 2)))
    cropped = mask.crop(q0, q1, k0, k1)
    assert (cropped.to_dense() == mask.to_dense()[q0:q1, k0:k1]).all()


def test_crop_outside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outside the mask, 4 x 5"):
        AttnMask.from_slices(4, 5, []).crop(0, 4, 2, 6)


@MANY
@given(masks(), st.data())
def test_restrict_to_ranges_with_padding(mask: AttnMask, data: st.DataObject) -> None:
    q_ranges, k_ranges = data.draw(ranges(mask.seq_q)), data.draw(ranges(mask.seq_k))
    padded = np.zeros((mask.seq_q + 5, mask.seq_k + 5), dtype=bool)
    padded[: mask.seq_q, : mask.seq_k] = mask.to_dense()
    restricted = mask.restrict(q_ranges, k_ranges)
    assert (restricted.to_dense() == padded[np.ix_(_tokens(q_ranges), _tokens(k_ranges))]).all()
    assert restricted.overlap_area() == 0


@MANY
@given(masks(), st.data())
def test_cut_axis_keeps_all_pairs_in_the_ranges(mask: AttnMask, data: st.DataObject) -> None:
    q_ranges = data.draw(ranges(mask.seq_q))
    cut, source, number = cut_axis(mask.slices, q_ranges, axis=0)
    inside = np.isin(np.arange(mask.seq_q), _tokens(q_ranges))
    assert areas(cut).sum() == mask.to_dense()[inside].sum()
    assert (cut[:, 0] >= q_ranges[number, 0]).all()
    assert (cut[:, 1] <= q_ranges[number].sum(axis=1)).all()
    assert (cut[:, 4] >= mask.slices[source, 4]).all()


@MANY
@given(masks(), st.data())
def test_stride(mask: AttnMask, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, 5))
    q_phase = data.draw(st.integers(0, step - 1))
    k_phases = data.draw(st.permutations(range(step)))[: data.draw(st.integers(1, step))]
    rows, cols = -(-mask.seq_q // step), -(-mask.seq_k // step)
    expected = np.zeros((rows, cols * len(k_phases)), dtype=bool)
    for slot, phase in enumerate(k_phases):
        strided = mask.to_dense()[q_phase::step, phase::step]
        expected[: strided.shape[0], slot * cols : slot * cols + strided.shape[1]] = strided
    assert (mask.stride(step, q_phase, k_phases).to_dense() == expected).all()


@MANY
@given(masks())
def test_simplify_keeps_the_mask(mask: AttnMask) -> None:
    simple = mask.simplify()
    assert (simple.to_dense() == mask.to_dense()).all()
    assert simple.overlap_area() == 0
    assert len(simple.slices) <= len(mask.slices)


def test_simplify_merges_a_cut_rectangle() -> None:
    slices = [(q, q + 5, k, k + 5, -99, 99) for q in (0, 5) for k in (0, 5, 10)]
    assert len(AttnMask.from_slices(10, 15, slices).simplify().slices) == 1


def test_kind() -> None:
    def kind(*row: int, seq_q: int = 8) -> str:
        return AttnMask.from_slices(seq_q, 8, [row]).kind

    assert kind(0, 8, 0, 8, 5, 4) == "empty"
    assert kind(0, 8, 0, 8, -99, 99) == "full"
    assert kind(0, 8, 0, 8, -99, 0) == "causal"
    assert kind(0, 8, 0, 8, -99, 1) == "bands"
    assert kind(0, 7, 0, 8, -99, 0, seq_q=7) == "bands"


def test_areas_do_not_overflow() -> None:
    seq = 1 << 24
    mask = AttnMask.from_slices(seq, seq, [(0, seq, 0, seq, -seq, 0)])
    assert mask.area == seq * (seq + 1) // 2


# --- tiling -----------------------------------------------------------------------------------


@MANY
@given(masks(), st.integers(1, 9), st.integers(1, 9))
def test_tiles_agree_with_dense(mask: AttnMask, block_q: int, block_k: int) -> None:
    grid = tiles(mask, block_q, block_k)
    dense = mask.to_dense()
    expected = [
        (r, c, int(tile.sum()), bool(tile.all()))
        for r in range(grid.num_rows)
        for c in range(grid.num_cols)
        if (tile := dense[r * block_q : (r + 1) * block_q, c * block_k : (c + 1) * block_k]).any()
    ]
    columns = (grid.rows, grid.cols, grid.areas, grid.full)
    actual = list(zip(*(column.tolist() for column in columns), strict=True))
    assert actual == expected
    assert len(grid) == len(expected)
    assert grid.executed_area == len(expected) * block_q * block_k
    assert grid.to_dense().sum() == mask.area
    starts = grid.row_starts
    assert len(starts) == grid.num_rows + 1
    assert starts[-1] == len(grid)
    for r in range(grid.num_rows):
        assert (grid.rows[starts[r] : starts[r + 1]] == r).all()


@pytest.mark.parametrize(("seq_q", "seq_k"), [(0, 0), (0, 5), (5, 0), (5, 5)])
def test_tiles_of_an_empty_mask(seq_q: int, seq_k: int) -> None:
    grid = tiles(AttnMask.from_slices(seq_q, seq_k, []), 2, 2)
    assert len(grid) == 0
    assert grid.executed_area == 0
    assert grid.row_starts.tolist() == [0] * (grid.num_rows + 1)


def test_tilings_are_stored_as_runs() -> None:
    seq = 1 << 20
    grid = tiles(AttnMask.from_slices(seq, seq, [(0, seq, 0, seq, -seq, 0)]), 128, 128)
    assert len(grid) == 8192 * 8193 // 2
    assert len(grid.run_rows) <= 3 * 8192


def test_empty_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^tile extents must be at least 1, not 0 x 4$"):
        tiles(AttnMask.from_slices(4, 4, []), 0, 4)
