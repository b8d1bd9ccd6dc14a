"""Layouts: who owns which tokens, and the exact areas between ranks."""

from __future__ import annotations

import cProfile
import pstats

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench import layout as layouts
from cpbench import masks
from cpbench.mask import AttnMask

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
    dealt = layouts.build(name, mask.seq_q, size)
    dense = np.zeros((dealt.padded_len, dealt.padded_len), dtype=bool)
    dense[: mask.seq_q, : mask.seq_k] = mask.to_dense()
    positions = [dealt.positions(rank) for rank in range(size)]
    assert sorted(np.concatenate(positions)) == list(range(dealt.padded_len))
    area = dealt.area_matrix(mask)
    for r in range(size):
        for s in range(size):
            want = dense[np.ix_(positions[r], positions[s])]
            assert area[r, s] == want.sum()
            assert np.array_equal(dealt.local_mask(mask, r, [s]).to_dense(), want)
        everyone = np.concatenate(positions)
        local = dealt.local_mask(mask, r, range(size))
        assert np.array_equal(local.to_dense(), dense[np.ix_(positions[r], everyone)])
    gathered = dealt.gathered_mask(mask)
    assert np.array_equal(gathered.to_dense(), dense[np.ix_(everyone, everyone)])
    assert gathered.overlap_area() == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_shard_and_unshard_are_inverse_and_pad_with_zeros(name: str, dtype: torch.dtype) -> None:
    # More tokens than bfloat16 has integers: an index must never pass through the data's dtype.
    x = torch.arange(2 * 1003 * 3).reshape(2, 1003, 3).to(dtype)
    dealt = layouts.build(name, 1003, 4)
    shards = [dealt.shard(x, rank) for rank in range(4)]
    assert {shard.shape[1] for shard in shards} == {dealt.local_len}
    assert torch.equal(dealt.unshard(shards), x)
    for rank, shard in enumerate(shards):
        padding = torch.as_tensor(dealt.positions(rank) >= 1003)
        assert not shard[:, padding].any()


def test_zigzag_balances_causal_and_contiguous_does_not() -> None:
    mask = masks.build("causal", 4096)
    zigzag = layouts.build("zigzag", 4096, 8).area_matrix(mask).sum(1)
    contiguous = layouts.build("contiguous", 4096, 8).area_matrix(mask).sum(1)
    assert zigzag.max() == zigzag.min()
    assert contiguous.max() / contiguous.mean() == pytest.approx(15 / 8, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_million_tokens_on_96_ranks_are_planned_without_loops_over_pairs(name: str) -> None:
    mask = masks.build("causal_document", 1 << 20, corpus="prolong64k", seed=0)
    dealt = layouts.build(name, 1 << 20, 96)
    with cProfile.Profile() as profile:
        area = dealt.area_matrix(mask)
    assert area.sum() == mask.area
    assert pstats.Stats(profile).total_calls < 400  # 9,216 pairs would need as many calls


def test_unknown_layouts_and_parameters_name_what_there_is() -> None:
    with pytest.raises(ValueError, match="no layout 'spiral'; there are: contiguous, striped"):
        layouts.build("spiral", 8, 2)
    with pytest.raises(ValueError, match="no parameter 'chunk'; it takes no parameters"):
        layouts.build("zigzag:chunk=2", 8, 2)
