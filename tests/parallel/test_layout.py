"""Layouts: the assignment of tokens to ranks, and the exact areas between ranks."""

from __future__ import annotations

import cProfile
import itertools
import pstats

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench import masks
from cpbench.masks.attn_mask import AttnMask
from cpbench.parallel import layout as layouts
from cpbench.parallel.local_masks import PairMasks, local_mask

NAMES = layouts.names()


def _documents(lengths: list[int]) -> AttnMask:
    return masks.build("causal_document", sum(lengths), doc_lens=lengths)


@pytest.mark.parametrize("name", NAMES)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), size=st.integers(1, 6))
def test_every_pair_of_ranks_equals_the_dense_mask(
    name: str, lengths: list[int], size: int
) -> None:
    mask = _documents(lengths)
    layout = layouts.build(name, mask.seq_q, size, mask)
    dense = np.zeros((layout.padded_len, layout.padded_len), dtype=bool)
    dense[: mask.seq_q, : mask.seq_k] = mask.to_dense()
    positions = [layout.positions(rank) for rank in range(size)]
    assert sorted(np.concatenate(positions)) == list(range(layout.padded_len))
    area = layouts.area_matrix(mask, layout, layout)
    pairs, columns = (PairMasks(mask, layout, layout) for _ in range(2))
    for r in range(size):
        for s in range(size):
            expected = dense[np.ix_(positions[r], positions[s])]
            assert area[r, s] == expected.sum()
            local = local_mask(mask, layout, [r], layout, [s])
            assert np.array_equal(local.to_dense(), expected)
            assert pairs.between(r, s) == local
            assert columns.between(s, r) == local_mask(mask, layout, [s], layout, [r])
        all_positions = np.concatenate(positions)
        local = local_mask(mask, layout, [r], layout, range(size))
        assert np.array_equal(local.to_dense(), dense[np.ix_(positions[r], all_positions)])
    reversed_ranks = list(range(size))[::-1]
    merged = layout.merged([reversed_ranks])
    assert np.array_equal(merged.positions(0), np.concatenate(positions[::-1]))
    merged_mask = local_mask(mask, merged, [0], merged, [0])
    expected = dense[np.ix_(merged.positions(0), merged.positions(0))]
    assert np.array_equal(merged_mask.to_dense(), expected)
    assert merged_mask.overlap_area() == 0
    if size % 2 == 0:
        groups = [list(range(first, size, size // 2)) for first in range(size // 2)]
        merged = layout.merged(groups)
        area = layouts.area_matrix(mask, merged, merged)
        for (r, q), (s, k) in itertools.product(enumerate(groups), repeat=2):
            of_groups = np.ix_(*(np.concatenate([positions[i] for i in x]) for x in (q, k)))
            assert area[r, s] == dense[of_groups].sum()


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("mask", ["causal", "full", "streaming:num_sinks=3,window=9", "documents"])
def test_areas_of_stripes_by_pairs_and_by_rows(mask: str, size: int) -> None:
    lengths = [50, 1, 29, 20]
    one = _documents(lengths) if mask == "documents" else masks.build(mask, sum(lengths))
    by_rows = layouts._area_matrix_of_rows(one, size)
    assert np.array_equal(layouts._area_matrix_of_pairs(one, size), by_rows)
    assert by_rows.sum() == one.area


def test_remembered_areas_cannot_be_changed() -> None:
    mask, layout = _documents([5, 7]), layouts.build("zigzag", 12, 3)
    area = layouts.area_matrix(mask, layout, layout)
    assert layouts.area_matrix(_documents([5, 7]), layout, layout) is area
    assert layouts.area_matrix(_documents([7, 5]), layout, layout) is not area
    with pytest.raises(ValueError, match="read-only"):
        area[0, 0] = 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_shard_and_unshard_are_inverse_and_pad_with_zeros(name: str, dtype: torch.dtype) -> None:
    # More tokens than bfloat16 has integers: an index must never pass through the data's dtype.
    x = torch.arange(2 * 1003 * 3).reshape(2, 1003, 3).to(dtype)
    layout = layouts.build(name, 1003, 4, masks.build("causal_document", 1003, doc_lens=[1000, 3]))
    shards = [layout.shard(x, rank) for rank in range(4)]
    assert {shard.shape[1] for shard in shards} == {layout.local_len}
    assert torch.equal(layout.unshard(shards), x)
    for rank, shard in enumerate(shards):
        padding = torch.as_tensor(layout.positions(rank) >= 1003)
        assert not shard[:, padding].any()


def test_zigzag_balances_causal_and_contiguous_does_not() -> None:
    mask = masks.build("causal", 4096)
    zigzag, contiguous = (_areas(name, mask, 8) for name in ("zigzag", "contiguous"))
    assert zigzag.max() == zigzag.min()
    assert contiguous.max() / contiguous.mean() == pytest.approx(15 / 8, rel=0.01)


def _areas(name: str, mask: AttnMask, size: int) -> np.ndarray:
    """The visible pairs of the queries of each rank."""
    layout = layouts.build(name, mask.seq_k, size, mask)
    return layouts.area_matrix(mask, layout, layout).sum(1)


def test_zigzag_in_every_document_balances_documents_that_do_not_divide() -> None:
    lengths = [1001, 67, 9, 2, 1500, 517, 1000]
    mask = masks.build("causal_document", sum(lengths), doc_lens=lengths)
    zigzag, per_document = (_areas(name, mask, 4) for name in ("zigzag", "zigzag_document"))
    assert per_document.max() / per_document.mean() < 1.01
    assert zigzag.max() / zigzag.mean() > 1.15
    layout = layouts.build("zigzag_document", sum(lengths), 4, mask)
    assert layout.padded_len - sum(lengths) < 2 * 4  # no document is padded individually
    assert mask.diagonal_blocks().tolist() == np.cumsum([0, *lengths[:-1]]).tolist()


def test_zigzag_document_without_documents_is_zigzag() -> None:
    mask = masks.build("sliding_window_causal", 64, window=7)
    zigzag, per_document = (
        layouts.build(name, 64, 4, mask) for name in ("zigzag", "zigzag_document")
    )
    for rank in range(4):
        assert np.array_equal(zigzag.positions(rank), per_document.positions(rank))


def test_zigzag_document_needs_a_mask_and_refuses_too_many_segments() -> None:
    with pytest.raises(ValueError, match="depends on the documents of a mask: pass the mask"):
        layouts.build("zigzag_document", 64, 2)
    mask = masks.build("causal_document", 1 << 23, doc_lens=[1 << 12] * (1 << 11))
    with pytest.raises(
        ValueError, match=r"2048 documents into \d+ pairs of segments on 1024 ranks"
    ):
        layouts.build("zigzag_document", 1 << 23, 1024, mask)


@pytest.mark.parametrize("name", NAMES)
def test_a_million_tokens_on_96_ranks_are_planned_without_loops_over_pairs(name: str) -> None:
    mask = masks.build("causal_document", 1 << 20, corpus="prolong64k", seed=0)
    layout = layouts.build(name, 1 << 20, 96, mask)
    with cProfile.Profile() as profile:
        area = layouts.area_matrix(mask, layout, layout)
    assert area.sum() == mask.area
    assert pstats.Stats(profile).total_calls < 400  # 9,216 pairs would need as many calls


def test_unknown_layouts_and_parameters_list_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="no layout 'spiral'; there are: contiguous, dispatch, striped, zigzag"
    ):
        layouts.build("spiral", 8, 2)
    with pytest.raises(ValueError, match="no parameter 'chunk'; it takes no parameters"):
        layouts.build("zigzag:chunk=2", 8, 2)
