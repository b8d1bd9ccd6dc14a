"""Selectors: each choice against its definition."""

from __future__ import annotations

import itertools

import choosing as at
import naive_selectors as want
import pytest
import torch
from choosing import BATCH, CASES, CAUSAL, DIM, DOCUMENTS, HEADS_KV, HEADS_Q, TOKENS

from cpbench import masks
from cpbench.core import registry
from cpbench.masks.attn_mask import AttnMask
from cpbench.selectors.common.pooling import Pool
from cpbench.selectors.common.selection import Blocks, Tokens


def test_every_selector_is_here() -> None:
    declared = {name for name, info in registry.operators().items() if info.selects}
    assert {spec.partition(":")[0] for spec, _ in CASES} == declared


# --- choices against definitions ----------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", DOCUMENTS, "full"])
def test_the_oracle_takes_the_blocks_with_the_most_mass(mask: str) -> None:
    q, k, _, _ = at.inputs()
    seen = torch.as_tensor(masks.build(mask, TOKENS).to_dense())
    probs = want.probabilities(q, k, seen)
    kept = at.kept(at.choose("oracle:block_size=16,keep=0.3", mask)[0])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        scores = want.oracle(want.Head(q, k, b, h), probs[b, h], 16)
        for x, row in enumerate(scores):
            span = want.ranges(TOKENS, 16)
            allowed = torch.tensor([bool(seen[span[x], y].any()) for y in span])
            count = at.share(int(allowed.sum()), 0.3)
            want.takes_the_best(kept[b, h, x], row, allowed, set(), count)


@pytest.mark.parametrize("block_q", [32, 1])
def test_quest_ranks_pages_by_their_bound(block_q: int) -> None:
    q, k, _, _ = at.inputs()
    kept = at.kept(at.choose(f"quest:block_size=16,block_q={block_q},keep=0.3", "causal")[0])
    pages = want.ranges(TOKENS, 16)
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(want.quest(want.Head(q, k, b, h), block_q, 16)):
            first, last = x * block_q, min((x + 1) * block_q, TOKENS) - 1
            allowed = torch.tensor([page.start <= last for page in pages])
            own = set(range(first // 16, last // 16 + 1))
            count = at.share(int(allowed.sum()), 0.3)
            want.takes_the_best(kept[b, h, x], row, allowed, own, count)


def test_the_bound_of_quest_is_one() -> None:
    q, k, _, _ = at.inputs()
    head = want.Head(q, k, 0, 0)
    for t, row in zip(range(0, TOKENS, 17), want.quest(head, 1, 16)[::17], strict=True):
        for bound, page in zip(row, want.ranges(TOKENS, 16), strict=True):
            assert bound >= float((head.k[page] @ head.q[t]).max()) - 1e-9


def test_moba_takes_past_blocks_by_mean_key_and_its_own() -> None:
    q, k, _, _ = at.inputs()
    kept = at.kept(at.choose("moba:block_size=16,top_k=4", "causal")[0])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for t, row in enumerate(want.moba(want.Head(q, k, b, h), 16)):
            allowed = torch.tensor([score > -torch.inf for score in row])
            want.takes_the_best(kept[b, h, t], row, allowed, {t // 16}, 4)


def test_xattention_covers_a_share_of_the_antidiagonal_mass() -> None:
    q, k, _, _ = at.inputs()
    kept = at.kept(at.choose("xattention:block_size=16,stride=4,threshold=0.6", "causal")[0])
    below = at.below(kept.shape[2])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(want.xattention(want.Head(q, k, b, h), 16, 4)):
            want.covers(kept[b, h, x], row, below[x], {0, x}, 0.6)
    assert 0.3 < kept.float().mean() / below.float().mean() < 0.9


def test_block_sparse_ranks_by_means() -> None:
    q, k, _, _ = at.inputs()
    kept = at.kept(at.choose("minference.block_sparse:block_size=16,top_k=4", "causal")[0])
    below = at.below(kept.shape[2])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(want.pooled(want.Head(q, k, b, h), 16)):
            want.takes_the_best(kept[b, h, x], row, below[x], set(), 4)


def test_a_shape_is_the_streaming_mask() -> None:
    (branch,) = at.choose("minference.a_shape:num_sinks=4,window=40", "causal")
    assert branch.seen == masks.build("streaming", TOKENS, num_sinks=4, window=40)


def _lines(b: int, h: int, last: int) -> tuple[list[float], list[float]]:
    """Attention of the last queries on each key, and at each distance."""
    q, k, _, _ = at.inputs()
    probs = want.probabilities(q, k, CAUSAL)[b, h, -last:]
    columns = probs.sum(0).tolist()
    diagonals = [0.0] * TOKENS
    for r in range(last):
        for j in range(TOKENS - last + r + 1):
            diagonals[TOKENS - last + r - j] += float(probs[r, j])
    return columns, diagonals


def test_vertical_slash_takes_columns_and_the_blocks_of_diagonals() -> None:
    (branch,) = at.choose("minference.vertical_slash:vertical=40,slash=110,block_size=16", "causal")
    assert isinstance(branch.seen, Blocks)
    assert branch.seen.columns is not None
    everything = torch.ones(TOKENS, dtype=torch.bool)
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        columns, diagonals = _lines(b, h, 64)
        chosen = branch.seen.columns[b, h]
        want.takes_the_best(chosen, columns, everything, set(range(30)), 40)
        # Of the diagonals only blocks are told: those that a choice of the best would give.
        order = sorted(range(100, TOKENS), key=lambda d: -diagonals[d])
        distances = {*range(100), *order[:10]}
        blocks = torch.zeros(13, 13, dtype=torch.bool)
        for distance in distances:
            for i in range(distance, TOKENS):
                blocks[i // 16, (i - distance) // 16] = True
        gap = diagonals[order[9]] - diagonals[order[10]]
        assert gap > want.TOLERANCE, "the inputs of this test tie"
        assert torch.equal(at.kept(branch)[b, h], blocks)


def test_whole_blocks_of_columns_hold_the_columns() -> None:
    spec = "minference.vertical_slash:vertical=40,slash=110,block_size=16"
    (lines,), (blocks,) = (
        at.choose(spec, "causal"),
        at.choose(f"{spec},whole_blocks=true", "causal"),
    )
    assert isinstance(lines.seen, Blocks)
    assert isinstance(blocks.seen, Blocks)
    assert blocks.seen.columns is None
    more = blocks.seen.rows(0, TOKENS)
    assert not (lines.seen.rows(0, TOKENS) & ~more).any()
    assert lines.seen.area < blocks.seen.area


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_flexprefill_takes_lines_and_in_aware_heads_pooled_blocks(tau: float) -> None:
    q, k, _, _ = at.inputs()
    block, gamma, least = 16, 0.5, 2
    spec = f"flexprefill:block_size=16,min_budget=32,gamma=0.5,tau={tau}"
    kept = at.kept(at.choose(spec, "causal")[0])
    count = kept.shape[2]
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        columns, diagonals = (torch.tensor(x) / block for x in _lines(b, h, block))
        sums, counts = [], []
        for mass in (columns, diagonals):
            covered = int((mass.sort(descending=True).values.cumsum(0) <= gamma).sum()) + 1
            counts.append(least if tau else min(max(covered // block + 1, least), count))
            sums.append([float(mass[y].sum()) for y in want.ranges(TOKENS, block)])
        lines = []
        for row, most in zip(sums, counts, strict=True):
            order = sorted(range(1, count), key=lambda y, row=row: -row[y])
            lines.append({0, *order[: most - 1]})
        expected = torch.zeros(count, count, dtype=torch.bool)
        for x in range(count):
            for y in range(x + 1):
                expected[x, y] = y in lines[0] or x - y in lines[1]
        if tau:
            pooled = torch.tensor(want.pooled(want.Head(q, k, b, h), block)) * DIM**-0.5
            probs = pooled.masked_fill(~at.below(count), -torch.inf).softmax(-1)
            ordered = probs.flatten().sort(descending=True)
            taken = int((ordered.values.cumsum(0) <= gamma * count).sum())
            expected.view(-1)[ordered.indices[:taken]] = True
        assert torch.equal(kept[b, h], expected & at.below(count)), (b, h)


def test_flexprefill_trusts_pooled_blocks_where_they_are_near_the_truth() -> None:
    """The square root of the Jensen-Shannon divergence between what pooled keys tell the last
    queries' mean and what those truly give each block, head by head."""
    q, k, _, _ = at.inputs()
    distance = {}
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        columns, _ = _lines(b, h, 16)
        true = torch.tensor([sum(columns[y]) / 16 for y in want.ranges(TOKENS, 16)])
        head = want.Head(q, k, b, h)
        means = torch.stack([want.mean(head.k, y) for y in want.ranges(TOKENS, 16)])
        pooled = (means @ head.q[-16:].mean(0) * DIM**-0.5).softmax(0)
        middle = (pooled + true) / 2
        parts = [float((p * (p / middle).log()).sum()) for p in (pooled, true)]
        distance[b, h] = (sum(parts) / 2) ** 0.5
    ordered = sorted(distance.values())
    tau = (ordered[3] + ordered[4]) / 2
    assert ordered[4] - ordered[3] > 1e-4, "the inputs of this test tie"
    spec = "flexprefill:block_size=16,min_budget=32,gamma=0.5"
    some = at.kept(at.choose(f"{spec},tau={tau:.9f}", "causal")[0])
    all_, none = (at.kept(at.choose(f"{spec},tau={t}", "causal")[0]) for t in (1.0, 0.0))
    for (b, h), far in distance.items():
        assert torch.equal(some[b, h], (all_ if far < tau else none)[b, h])
        assert not torch.equal(all_[b, h], none[b, h])


def test_nsa_takes_blocks_by_compressed_attention_of_the_group() -> None:
    q, k, _, _ = at.inputs()
    spec = "nsa:block_size=16,top_k=4,compress=8,stride=4,window=24"
    chosen, window, compressed = at.choose(spec, "causal")
    kept = at.kept(chosen)
    for b, g in itertools.product(range(BATCH), range(HEADS_KV)):
        for t, row in enumerate(want.nsa(q, k, b, g, 16, 8, 4)):
            allowed = torch.arange(kept.shape[3]) <= t // 16
            own = t // 16
            forced = {0, own, max(own - 1, 0)}
            for h in (2 * g, 2 * g + 1):
                want.takes_the_best(kept[b, h, t], row, allowed, forced, 4)
    assert window.seen == masks.build("sliding_window_causal", TOKENS, window=23)
    assert isinstance(compressed.seen, AttnMask)
    dense = torch.as_tensor(compressed.seen.to_dense())
    for t in range(TOKENS):
        assert int(dense[t].sum()) == max((t + 1 - 8) // 4 + 1, 0) or t < 7
        assert dense[t, : int(dense[t].sum())].all()


@pytest.mark.parametrize("mask", ["causal", DOCUMENTS])
def test_dsa_takes_the_highest_index(mask: str) -> None:
    q, k, _, _ = at.inputs()
    (branch,) = at.choose("dsa:top_k=20", mask)
    assert isinstance(branch.seen, Tokens)
    seen = torch.as_tensor(masks.build(mask, TOKENS).to_dense())
    rows = branch.seen.rows(0, TOKENS)
    for b, t in itertools.product(range(BATCH), range(TOKENS)):
        scores = want.dsa(q, k, b, t).tolist()
        want.takes_the_best(rows[b, 0, t], scores, seen[t], set(), 20)


def test_vsa_takes_blocks_by_means() -> None:
    q, k, _, _ = at.inputs()
    fine, coarse = at.choose("vsa:block_size=16,keep=0.2", "full")
    kept = at.kept(fine)
    everything = torch.ones(kept.shape[3], dtype=torch.bool)
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(want.pooled(want.Head(q, k, b, h), 16)):
            want.takes_the_best(kept[b, h, x], row, everything, set(), at.share(13, 0.2))
    assert coarse.seen == masks.build("full", 13)
    assert coarse.pool_q == coarse.pool_k == Pool(16, 16, partial=True)
