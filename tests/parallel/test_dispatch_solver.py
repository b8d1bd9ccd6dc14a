"""The solver of the layout `dispatch`, who needs which keys, and how few there could be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench import masks
from cpbench.core.spec import Spec
from cpbench.masks.attn_mask import AttnMask
from cpbench.parallel.kv_requirements import Parcels, best_stages, in_stages, least_keys, needed
from cpbench.parallel.layout import Layout, area_matrix, build
from tests.microbench.dealing import greedy

MASKS = (
    "full", "causal", "sliding_window_causal:window=9", "streaming:window=7",
    "causal_document:doc_lens=[3,40,1,16,29,11]", "full_document:doc_lens=[50,20,30]",
    "prefix_lm_causal:prefix_len=17", "causal_blockwise:doc_lens=[20,30,50]",
)  # fmt: skip
CORPORA = ("pile", "prolong64k", "prolong512k")


def mask_of(text: str, seq_len: int = 100) -> AttnMask:
    found = masks.build(Spec.parse(text), seq_len)
    assert isinstance(found, AttnMask)
    return found


def moved(mask: AttnMask, layout: Layout) -> np.ndarray:
    """Keys that each rank must be sent."""
    parcels = needed(mask, layout, layout)
    return np.bincount(parcels.receiver, weights=parcels.length, minlength=layout.world_size)


def tokens_of(parcels: Parcels) -> list[int]:
    runs = zip(parcels.start.tolist(), parcels.length.tolist(), strict=True)
    return [start + i for start, n in runs for i in range(n)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("text", MASKS)
def test_every_token_is_dealt_once_and_all_ranks_get_as_many(text: str, ranks: int) -> None:
    layout = build("dispatch", 100, ranks, mask_of(text))
    positions = [layout.positions(rank) for rank in range(ranks)]
    assert {len(some) for some in positions} == {-(-100 // ranks)}
    assert sorted(np.concatenate(positions).tolist()) == list(range(layout.padded_len))
    assert (np.diff(layout.segments[:, 0]) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 24),
    st.sampled_from(["causal_document", "full_document"]),
)  # fmt: skip
def test_documents_of_any_lengths_are_balanced(lengths: list[int], ranks: int, kind: str) -> None:
    seq_len = sum(lengths)
    mask = masks.build(Spec.parse(f"{kind}:doc_lens={lengths}"), seq_len)
    layout = build("dispatch", seq_len, ranks, mask)
    areas = area_matrix(mask, layout, layout).sum(1)
    assert areas.sum() == mask.area
    token = mask.row_counts().max()  # a rank's share is found down to a few tokens
    assert areas.max() <= 1.02 * areas.mean() + 4 * token


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize(("seq_len", "ranks"), [(1 << 17, 8), (1 << 19, 64), (1 << 20, 96)])
def test_corpora_are_balanced_and_move_little(corpus: str, seq_len: int, ranks: int) -> None:
    for seed in range(2):
        mask = mask_of(f"causal_document:corpus={corpus},seed={seed}", seq_len)
        layout = build("dispatch", seq_len, ranks, mask)
        areas = area_matrix(mask, layout, layout).sum(1)
        assert areas.max() <= 1.02 * areas.mean()
        ours, least = moved(mask, layout).sum(), least_keys(mask, ranks, 1.02)
        assert least <= ours <= 1.4 * least + 0.5 * seq_len
        assert ours < moved(mask, greedy(mask, ranks)).sum()


def test_a_mask_of_nothing_moves_nothing() -> None:
    empty = AttnMask.from_slices(100, 100, [])
    layout = build("dispatch", 100, 8, empty)
    assert not moved(empty, layout).any()
    assert in_stages(needed(empty, layout, layout), 3, 8).length.size == 0
    assert least_keys(empty, 8) == 0


def test_tokens_that_are_not_those_of_the_mask_are_dealt_in_runs() -> None:
    """Few queries on many keys: neither are all tokens of one square mask."""
    mask = mask_of("causal").crop(90, 100, 0, 100)
    for tokens in (10, 100, 64):
        layout = build("dispatch", tokens, 4, mask)
        assert layout.local_len == -(-tokens // 4)


def test_whole_documents_that_balance_are_not_cut() -> None:
    mask = mask_of(f"causal_document:doc_lens={[50] * 8}", 400)
    for ranks in (2, 4, 8):
        assert not moved(mask, build("dispatch", 400, ranks, mask)).any()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_document", "dispatch"])
@pytest.mark.parametrize("text", MASKS)
def test_what_is_needed_is_what_is_seen_and_not_held(text: str, layout: str) -> None:
    mask, ranks = mask_of(text), 4
    dealt = build(layout, 100, ranks, mask)
    parcels, dense = needed(mask, dealt, dealt), mask.to_dense()
    for rank in range(ranks):
        rows = dealt.positions(rank)
        seen = set(np.flatnonzero(dense[rows[rows < 100]].any(0)).tolist()) - set(rows.tolist())
        mine = parcels.of(np.flatnonzero(parcels.receiver == rank))
        got = [
            start + i for start, n in zip(mine.start, mine.length, strict=True) for i in range(n)
        ]
        assert len(got) == len(set(got))
        assert set(got) == seen
        for owner, start, n, local in zip(*mine[2:], strict=True):
            assert dealt.positions(owner)[local : local + n].tolist() == list(
                range(start, start + n)
            )


@pytest.mark.parametrize("stages", [1, 2, 3, 7, 1000])
def test_stages_share_the_keys_of_every_receiver(stages: int) -> None:
    mask, ranks = mask_of("causal"), 8
    layout = build("dispatch", 100, ranks, mask)
    whole = needed(mask, layout, layout)
    cut = in_stages(whole, stages, ranks)
    for rank in range(ranks):
        total = int(whole.length[whole.receiver == rank].sum())
        mine = cut.of(np.flatnonzero(cut.receiver == rank))
        each = np.bincount(mine.stage, weights=mine.length)
        assert each.sum() == total
        assert each.max(initial=0) <= -(-total // stages)
        got = np.concatenate(
            [np.arange(s, s + n) for s, n in zip(mine.start, mine.length, strict=True)] or [[]]
        )
        assert len(np.unique(got)) == total
    assert (cut.length > 0).all()


def test_as_many_stages_as_hide_the_transfer() -> None:
    """None where nothing is sent; one where the own keys hide it; more where they do not."""
    area = np.full(4, 1_000_000)
    assert best_stages(area, area, np.zeros(4, int), 100) == 1
    assert best_stages(area * 9 // 10, area, np.array([1, 1, 1, 1]), 10_000) == 1
    few = best_stages(area // 100, area, np.array([500, 500, 500, 500]), 1000)
    many = best_stages(area // 100, area, np.array([500, 500, 500, 500]), 10)
    assert 1 < few < many


@pytest.mark.parametrize(
    "text", ["causal", "full", "causal_document:doc_lens=[2,4,2]", "sliding_window_causal:window=3"]
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_way_to_deal_moves_less_than_the_bound(text: str, ranks: int) -> None:
    mask, tokens = mask_of(text, 8), 8
    dense, each = mask.to_dense(), tokens // ranks
    seen = dense.sum(1)
    for balance in (1.0, 1.3, 8.0):
        best = None
        for order in itertools.permutations(range(tokens)):
            groups = [list(order[i * each : (i + 1) * each]) for i in range(ranks)]
            if any(group != sorted(group) for group in groups):
                continue
            if max(seen[group].sum() for group in groups) <= balance * seen.sum() / ranks + 1e-9:
                keys = sum(
                    len(set(np.flatnonzero(dense[group].any(0))) - set(group)) for group in groups
                )
                best = keys if best is None else min(best, keys)
        if best is not None:
            assert least_keys(mask, ranks, balance) <= best
