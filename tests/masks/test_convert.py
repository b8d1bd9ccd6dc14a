"""Conversions of masks to formats of libraries, compared with the dense mask."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import CASES, single_slices

from cpbench import masks
from cpbench.masks import convert
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.picture import draw

MANY = settings(max_examples=150, deadline=None)


def test_cases_cover_every_pattern() -> None:
    shared_patterns = {
        name
        for name, info in masks.describe().items()
        if info.build.__module__.startswith("cpbench.") and not info.per_head
    }
    assert {case.partition(":")[0] for case, _ in CASES} >= shared_patterns


def _check_typed(mask: AttnMask) -> convert.TypedSlices:
    typed = convert.to_typed_slices(mask)
    assert (typed.to_dense(mask.seq_q, mask.seq_k) == mask.to_dense()).all()
    singles = [
        convert.TypedSlices(typed.ranges[[n]], typed.types[[n]], typed.source[[n]])
        for n in range(len(typed.types))
    ]
    total = sum(int(single.to_dense(mask.seq_q, mask.seq_k).sum()) for single in singles)
    assert total == mask.area, "rectangles are disjoint"
    assert np.bincount(typed.source, minlength=1).max() <= 3
    return typed


@MANY
@given(single_slices())
def test_typed_slices_of_any_band(mask: AttnMask) -> None:
    _check_typed(mask)


@pytest.mark.parametrize(("case", "seq_len"), CASES)
def test_typed_slices_of_patterns(case: str, seq_len: int) -> None:
    _check_typed(masks.build(case, seq_len))


@pytest.mark.parametrize(
    ("case", "seq_len", "types"),
    [
        ("full", 9, [convert.FULL]),
        ("causal", 9, [convert.CAUSAL]),
        ("causal:seq_q=4", 9, [convert.CAUSAL]),
        ("sliding_window_causal:window=2", 9, [convert.CAUSAL, convert.BICAUSAL]),
        ("sliding_window:window=2", 9, [convert.CAUSAL, convert.BICAUSAL, convert.INVERSE]),
        ("sliding_window:window=7", 9, [convert.CAUSAL, convert.FULL, convert.INVERSE]),
    ],
)
def test_number_of_typed_slices(case: str, seq_len: int, types: list[int]) -> None:
    assert convert.to_typed_slices(masks.build(case, seq_len)).types.tolist() == types


def test_a_lower_offset_alone_is_one_typed_slice() -> None:
    mask = AttnMask.from_slices(6, 9, [(0, 6, 0, 9, 0, 99)])
    assert convert.to_typed_slices(mask).types.tolist() == [convert.INVERSE]
    mask = AttnMask.from_slices(6, 9, [(0, 6, 0, 9, 0, 3)])
    assert convert.to_typed_slices(mask).types.tolist() == [convert.BICAUSAL]


@MANY
@given(st.data())
def test_row_intervals_of_any_mask(data: st.DataObject) -> None:
    # Disjoint rectangles side by side, so that intervals may touch.
    seq_q, seq_k = 7, 12
    cuts = sorted(data.draw(st.sets(st.integers(0, seq_k), max_size=5)) | {0, seq_k})
    number = st.integers(-8, 12)
    slices = [
        (0, seq_q, k0, k1, data.draw(number), data.draw(number))
        for k0, k1 in itertools.pairwise(cuts)
    ]
    _check_intervals(AttnMask.from_slices(seq_q, seq_k, slices))


def _check_intervals(mask: AttnMask) -> None:
    table = convert.row_intervals(mask)
    assert table.dtype == np.int32
    assert table.shape[::2] == (mask.seq_q, 2)
    keys = np.arange(mask.seq_k)
    inside = (table[..., :1] <= keys) & (keys < table[..., 1:])
    assert (inside.sum(axis=1) == mask.to_dense()).all()  # the sum shows that they are disjoint
    edges = np.diff(np.pad(mask.to_dense(), ((0, 0), (1, 1))).astype(int), axis=1)
    assert table.shape[1] == max(1, (edges == 1).sum(axis=1).max(initial=0))
    for row in table:
        starts = row[row[:, 1] > row[:, 0], 0]
        assert (np.diff(starts) > 0).all()


@pytest.mark.parametrize(("case", "seq_len"), CASES)
def test_row_intervals_of_patterns(case: str, seq_len: int) -> None:
    _check_intervals(masks.build(case, seq_len))


def test_row_intervals_of_an_empty_mask() -> None:
    assert convert.row_intervals(AttnMask.from_slices(3, 4, [])).tolist() == [[[0, 0]]] * 3
    assert convert.row_intervals(AttnMask.from_slices(0, 4, [])).shape == (0, 1, 2)


@pytest.mark.parametrize("block", [16, 24])
@pytest.mark.parametrize(("case", "seq_len"), CASES)
def test_flex_block_mask(case: str, seq_len: int, block: int) -> None:
    torch = pytest.importorskip("torch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    mask = masks.build(case, seq_len)
    dense = mask.to_dense()
    tables = convert.to_block_mask_tables(mask, block)
    intervals = torch.from_numpy(convert.row_intervals(mask))

    def mask_mod(b, h, q, k):  # type: ignore[no-untyped-def]
        visible = (intervals[q, 0, 0] <= k) & (k < intervals[q, 0, 1])
        for slot in range(1, intervals.shape[1]):
            visible = visible | ((intervals[q, slot, 0] <= k) & (k < intervals[q, slot, 1]))
        return visible

    created = flex.create_mask(mask_mod, None, None, mask.seq_q, mask.seq_k, device="cpu")
    assert (created[0, 0].numpy() == dense).all()

    def tensor(name: str) -> torch.Tensor:
        array = getattr(tables, name)
        assert array.dtype == np.int32
        return torch.from_numpy(array)

    built = flex.BlockMask.from_kv_blocks(
        tensor("kv_num_blocks"),
        tensor("kv_indices"),
        tensor("full_kv_num_blocks"),
        tensor("full_kv_indices"),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(mask.seq_q, mask.seq_k),
    )
    # torch derives the same lists by column from those by row.
    for name in ("q_num_blocks", "full_q_num_blocks"):
        assert (getattr(built, name) == tensor(name)).all()
    for kind in ("q", "full_q"):
        counts = getattr(tables, f"{kind}_num_blocks")[0, 0]
        expected, actual = getattr(built, f"{kind}_indices")[0, 0], tensor(f"{kind}_indices")[0, 0]
        assert expected.shape == actual.shape
        for column, count in enumerate(counts):
            assert (expected[column, :count] == actual[column, :count]).all()

    # torch's create_block_mask gives the same blocks.
    reference = flex.create_block_mask(
        mask_mod, None, None, mask.seq_q, mask.seq_k, device="cpu", BLOCK_SIZE=block
    )
    assert (reference.to_dense() == built.to_dense()).all()
    assert (reference.kv_num_blocks == built.kv_num_blocks).all()
    assert (reference.full_kv_num_blocks == built.full_kv_num_blocks).all()

    rows, cols = -(-mask.seq_q // block), -(-mask.seq_k // block)
    codes = np.zeros((rows, cols), dtype=int)  # 0 empty, 1 partial, 2 full
    for kind, code in (("kv", 1), ("full_kv", 2)):
        for row in range(rows):
            count = getattr(tables, f"{kind}_num_blocks")[0, 0, row]
            codes[row, getattr(tables, f"{kind}_indices")[0, 0, row, :count]] += code
    for (row, col), code in np.ndenumerate(codes):
        tile = dense[row * block : (row + 1) * block, col * block : (col + 1) * block]
        full = tile.shape == (block, block) and tile.all()
        assert code == (2 if full else 1 if tile.any() else 0)


def test_block_tables_are_built_in_several_chunks() -> None:
    # More full blocks than in one chunk.
    mask = masks.build("causal", 8 * 900)
    tables = convert.to_block_mask_tables(mask, 8)
    assert tables.full_kv_num_blocks[0, 0].tolist() == list(range(900))
    for row in (1, 2, 450, 899):
        assert tables.full_kv_indices[0, 0, row].tolist() == [*range(row), *[0] * (900 - row)]
        assert tables.full_q_indices[0, 0, 899 - row, :row].tolist() == [*range(900 - row, 900)]
    assert (tables.kv_indices[0, 0, :, 0] == np.arange(900)).all()


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, seq_len, extra in [("causal_document", 1 << 20, {}), ("causal", 5, {"seq_q": 1})]:
        path = tmp_path / f"{name}.png"
        draw(masks.build(name, seq_len, **extra), path, title=name)
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="0 x 4 tokens has nothing to draw"):
        draw(AttnMask.from_slices(0, 4, []), tmp_path / "x.png")


def test_a_few_sinks_among_many_tokens_are_seen(tmp_path: Path) -> None:
    """Their column is darker than white, several pixels wide, and not below the axis."""
    from matplotlib.image import imread

    draw(masks.build("streaming", 65536, num_sinks=4, window=1024), tmp_path / "m.png")
    pixels = imread(tmp_path / "m.png")[..., :3]
    row = pixels[int(pixels.shape[0] * 0.7)]  # far below the diagonal's first half
    blue = (row[:, 2] - row[:, 0] > 0.25) & (row[:, 2] > 0.4)
    left = blue[: len(blue) // 3]
    assert 2 <= left.sum() <= 8
    axis = np.flatnonzero(row[: len(row) // 3].sum(-1) < 0.5)
    assert np.flatnonzero(left)[0] > axis[-1] + 1


def test_masks_have_a_short_repr() -> None:
    mask = masks.build("causal_document", 4096, corpus="pile", seed=1)
    assert repr(mask) == f"<AttnMask 4096 x 4096, bands, {len(mask.slices)} slices, 6.063%>"
    heads = masks.build_heads("block_sparse_uniform", 4096, 8)
    assert repr(heads) == "<HeadMasks 4096 x 4096, 8 heads, 8 distinct, 9.375%>"
    assert len(repr(masks.build_heads("dilated", 4096, 8))) < 200
