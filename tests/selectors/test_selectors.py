"""Selections of every selector, compared with their definitions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import choosing
import naive_selectors
import pytest
import torch
from choosing import (
    BATCH,
    CASES,
    CAUSAL,
    DIM,
    DOCUMENTS,
    HEADS_KV,
    HEADS_Q,
    TOKENS,
    kept_blocks,
    select,
)
from naive_selectors import Head, assert_top_k, assert_top_p, ranges

import cpbench
from cpbench import masks
from cpbench.core import registry
from cpbench.core.problem import Problem
from cpbench.masks.attn_mask import AttnMask
from cpbench.selectors.common.pooling import Pool
from cpbench.selectors.dsa import Dsa
from cpbench.selectors.selections import Blocks, Lines, Tokens


def test_every_selector_has_a_case() -> None:
    declared = {name for name, info in registry.operators().items() if info.selects}
    assert {spec.partition(":")[0] for spec, _ in CASES} == declared


@pytest.mark.parametrize("mask", ["causal", DOCUMENTS, "full"])
def test_the_oracle_selects_the_blocks_with_the_most_mass(mask: str) -> None:
    q, k, _, _ = choosing.inputs()
    visible = torch.as_tensor(masks.build(mask, TOKENS).to_dense())
    probs = naive_selectors.probabilities(q, k, visible)
    kept = kept_blocks(select("oracle:block_size=16,keep=0.3", mask)[0])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        scores = naive_selectors.oracle(Head(q, k, b, h), probs[b, h], 16)
        for x, row in enumerate(scores):
            span = ranges(TOKENS, 16)
            allowed = torch.tensor([bool(visible[span[x], y].any()) for y in span])
            count = choosing.budget(int(allowed.sum()), 0.3)
            assert_top_k(kept[b, h, x], row, allowed, set(), count)


@pytest.mark.parametrize("block_q", [32, 1])
def test_quest_ranks_pages_by_their_bound(block_q: int) -> None:
    q, k, _, _ = choosing.inputs()
    kept = kept_blocks(select(f"quest:block_size=16,block_q={block_q},keep=0.3", "causal")[0])
    pages = ranges(TOKENS, 16)
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(naive_selectors.quest(Head(q, k, b, h), block_q, 16)):
            first, last = x * block_q, min((x + 1) * block_q, TOKENS) - 1
            allowed = torch.tensor([page.start <= last for page in pages])
            own = set(range(first // 16, last // 16 + 1))
            count = choosing.budget(int(allowed.sum()), 0.3)
            assert_top_k(kept[b, h, x], row, allowed, own, count)


def test_quest_bounds_the_scores_of_a_page() -> None:
    q, k, _, _ = choosing.inputs()
    head = Head(q, k, 0, 0)
    for t, row in zip(range(0, TOKENS, 17), naive_selectors.quest(head, 1, 16)[::17], strict=True):
        for bound, page in zip(row, ranges(TOKENS, 16), strict=True):
            assert bound >= float((head.k[page] @ head.q[t]).max()) - 1e-9


def test_moba_selects_past_blocks_by_mean_key_and_its_own() -> None:
    q, k, _, _ = choosing.inputs()
    kept = kept_blocks(select("moba:block_size=16,top_k=4", "causal")[0])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for t, row in enumerate(naive_selectors.moba(Head(q, k, b, h), 16)):
            allowed = torch.tensor([score > -torch.inf for score in row])
            assert_top_k(kept[b, h, t], row, allowed, {t // 16}, 4)


def test_xattention_covers_a_share_of_the_antidiagonal_mass() -> None:
    q, k, _, _ = choosing.inputs()
    kept = kept_blocks(select("xattention:block_size=16,stride=4,threshold=0.6", "causal")[0])
    below = choosing.causal_blocks(kept.shape[2])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(naive_selectors.xattention(Head(q, k, b, h), 16, 4)):
            assert_top_p(kept[b, h, x], row, below[x], {0, x}, 0.6)
    assert 0.3 < kept.float().mean() / below.float().mean() < 0.9


def test_block_sparse_ranks_by_means() -> None:
    q, k, _, _ = choosing.inputs()
    kept = kept_blocks(select("minference.block_sparse:block_size=16,top_k=4", "causal")[0])
    below = choosing.causal_blocks(kept.shape[2])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(naive_selectors.pooled(Head(q, k, b, h), 16)):
            assert_top_k(kept[b, h, x], row, below[x], set(), 4)


def test_a_shape_is_the_streaming_mask() -> None:
    (branch,) = select("minference.a_shape:num_sinks=4,window=40", "causal")
    assert branch.mask == masks.build("streaming", TOKENS, num_sinks=4, window=40)


def _line_mass(b: int, h: int, last: int) -> tuple[list[float], list[float]]:
    """Attention mass of the last queries by key, and by distance."""
    q, k, _, _ = choosing.inputs()
    probs = naive_selectors.probabilities(q, k, CAUSAL)[b, h, -last:]
    columns = probs.sum(0).tolist()
    diagonals = [0.0] * TOKENS
    for r in range(last):
        for j in range(TOKENS - last + r + 1):
            diagonals[TOKENS - last + r - j] += float(probs[r, j])
    return columns, diagonals


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_vertical_slash_selects_columns_and_diagonals_of_blocks(whole_blocks: bool) -> None:
    spec = "minference.vertical_slash:vertical=40,slash=110,block_size=16"
    (branch,) = select(f"{spec},whole_blocks={whole_blocks}".lower(), "causal")
    dense = branch.mask.dense_rows(0, TOKENS)  # type: ignore[union-attr]
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        columns, diagonals = _line_mass(b, h, 64)
        order = sorted(range(30, TOKENS), key=lambda j: -columns[j])
        assert columns[order[9]] - columns[order[10]] > naive_selectors.TOLERANCE, "a tie"
        of_columns = {*range(30), *order[:10]}
        order = sorted(range(100, TOKENS), key=lambda d: -diagonals[d])
        assert diagonals[order[9]] - diagonals[order[10]] > naive_selectors.TOLERANCE, "a tie"
        distances = {*range(100), *order[:10]}
        expected = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
        for start in range(0, TOKENS, 16):
            queries = range(start, start + 16)  # the last block too, though it is shorter
            keys = of_columns | {i - d for i in queries for d in distances if i >= d}
            if whole_blocks:
                keys = {16 * (key // 16) + n for key in keys for n in range(16)}
            expected[start : start + 16, [key for key in keys if key < TOKENS]] = True
        assert torch.equal(dense[b, h], expected & CAUSAL)


def test_whole_blocks_of_columns_contain_the_columns() -> None:
    spec = "minference.vertical_slash:vertical=40,slash=110,block_size=16"
    (lines,), (blocks,) = (
        select(spec, "causal"),
        select(f"{spec},whole_blocks=true", "causal"),
    )
    assert isinstance(lines.mask, Lines)
    assert isinstance(blocks.mask, Blocks)
    more = blocks.mask.dense_rows(0, TOKENS)
    assert not (lines.mask.dense_rows(0, TOKENS) & ~more).any()
    assert lines.mask.area < blocks.mask.area


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_flexprefill_selects_lines_and_pooled_blocks_in_query_aware_heads(tau: float) -> None:
    q, k, _, _ = choosing.inputs()
    block, gamma, min_count = 16, 0.5, 2
    spec = f"flexprefill:block_size=16,min_budget=32,gamma=0.5,tau={tau}"
    kept = kept_blocks(select(spec, "causal")[0])
    count = kept.shape[2]
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        columns, diagonals = (torch.tensor(x) / block for x in _line_mass(b, h, block))
        sums, counts = [], []
        for mass in (columns, diagonals):
            tokens = int((mass.sort(descending=True).values.cumsum(0) <= gamma).sum()) + 1
            counts.append(min_count if tau else min(max(tokens // block + 1, min_count), count))
            sums.append([float(mass[y].sum()) for y in ranges(TOKENS, block)])
        lines = []
        for row, top in zip(sums, counts, strict=True):
            order = sorted(range(1, count), key=lambda y, row=row: -row[y])
            lines.append({0, *order[: top - 1]})
        expected = torch.zeros(count, count, dtype=torch.bool)
        for x in range(count):
            for y in range(x + 1):
                expected[x, y] = y in lines[0] or x - y in lines[1]
        if tau:
            pooled = torch.tensor(naive_selectors.pooled(Head(q, k, b, h), block)) * DIM**-0.5
            probs = pooled.masked_fill(~choosing.causal_blocks(count), -torch.inf).softmax(-1)
            ordered = probs.flatten().sort(descending=True)
            top = int((ordered.values.cumsum(0) <= gamma * count).sum())
            expected.view(-1)[ordered.indices[:top]] = True
        assert torch.equal(kept[b, h], expected & choosing.causal_blocks(count)), (b, h)


def test_flexprefill_uses_pooled_blocks_where_they_are_close_to_true_attention() -> None:
    """By the square root of the Jensen-Shannon divergence between pooled attention of the last
    queries' mean and their true attention summed over blocks, head by head."""
    q, k, _, _ = choosing.inputs()
    distance = {}
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        columns, _ = _line_mass(b, h, 16)
        true = torch.tensor([sum(columns[y]) / 16 for y in ranges(TOKENS, 16)])
        head = Head(q, k, b, h)
        means = torch.stack([naive_selectors.mean(head.k, y) for y in ranges(TOKENS, 16)])
        pooled = (means @ head.q[-16:].mean(0) * DIM**-0.5).softmax(0)
        middle = (pooled + true) / 2
        divergences = [float((p * (p / middle).log()).sum()) for p in (pooled, true)]
        distance[b, h] = (sum(divergences) / 2) ** 0.5
    ordered = sorted(distance.values())
    tau = (ordered[3] + ordered[4]) / 2
    assert ordered[4] - ordered[3] > 1e-4, "the inputs of this test tie"
    spec = "flexprefill:block_size=16,min_budget=32,gamma=0.5"
    kept, kept_if_aware, kept_if_not = (
        kept_blocks(select(f"{spec},tau={t:.9f}", "causal")[0]) for t in (tau, 1.0, 0.0)
    )
    for (b, h), far in distance.items():
        assert torch.equal(kept[b, h], (kept_if_aware if far < tau else kept_if_not)[b, h])
        assert not torch.equal(kept_if_aware[b, h], kept_if_not[b, h])


@pytest.mark.parametrize(("top_k", "size", "stride"), [(4, 8, 4), (3, 64, 16)])
def test_nsa_selects_blocks_by_compressed_attention_of_the_group(
    top_k: int, size: int, stride: int
) -> None:
    q, k, _, _ = choosing.inputs()
    spec = f"nsa:block_size=16,top_k={top_k},compress={size},stride={stride},window=24"
    blocks, window, compressed = select(spec, "causal")
    kept = kept_blocks(blocks)
    for b, g in itertools.product(range(BATCH), range(HEADS_KV)):
        for t, row in enumerate(naive_selectors.nsa(q, k, b, g, 16, size, stride)):
            allowed = torch.arange(kept.shape[3]) <= t // 16
            own = t // 16
            forced = {0, own, max(own - 1, 0)}
            for h in (2 * g, 2 * g + 1):
                assert_top_k(kept[b, h, t], row, allowed, forced, top_k)
    assert window.mask == masks.build("sliding_window_causal", TOKENS, window=23)
    assert isinstance(compressed.mask, AttnMask)
    dense = torch.as_tensor(compressed.mask.to_dense())
    for t in range(TOKENS):
        assert int(dense[t].sum()) == max((t + 1 - size) // stride + 1, 0) or t < size - 1
        assert dense[t, : int(dense[t].sum())].all()


def test_dsa_selects_the_first_of_many_keys_without_an_index_score() -> None:
    tokens, top_k = 400, 20
    q = torch.rand(1, tokens, 1, DIM)
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=1, heads_kv=1, head_dim=DIM, dtype="float32"
    )
    selector = Dsa(top_k=top_k)
    plan = selector.prepare(masks.build("causal", tokens), problem, "cpu")
    (branch,) = selector.select(q, -q, plan)
    assert isinstance(branch.mask, Tokens)
    for t in range(tokens):
        chosen = branch.mask.visible_keys(0, 0, t).tolist()
        assert chosen == list(range(min(t + 1, top_k)))


@pytest.mark.parametrize("mask", ["causal", DOCUMENTS])
def test_dsa_selects_the_keys_with_the_highest_index_scores(mask: str) -> None:
    q, k, _, _ = choosing.inputs()
    (branch,) = select("dsa:top_k=20", mask)
    assert isinstance(branch.mask, Tokens)
    visible = torch.as_tensor(masks.build(mask, TOKENS).to_dense())
    rows = branch.mask.dense_rows(0, TOKENS)
    for b, t in itertools.product(range(BATCH), range(TOKENS)):
        scores = naive_selectors.dsa(q, k, b, t).tolist()
        assert_top_k(rows[b, 0, t], scores, visible[t], set(), 20)


def test_vsa_selects_blocks_by_means() -> None:
    q, k, _, _ = choosing.inputs()
    fine, coarse = select("vsa:block_size=16,keep=0.2", "full")
    kept = kept_blocks(fine)
    everything = torch.ones(kept.shape[3], dtype=torch.bool)
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(naive_selectors.pooled(Head(q, k, b, h), 16)):
            assert_top_k(kept[b, h, x], row, everything, set(), choosing.budget(13, 0.2))
    assert coarse.mask == masks.build("full", 13)
    assert coarse.pool_q == coarse.pool_k == Pool(16, 16, partial=True)


@pytest.mark.parametrize(
    ("sinks", "window", "step", "top_k"), [(4, 24, 8, 16), (40, 1, 1, 16), (0, 20, 16, 300)]
)
def test_retrieval_selects_the_keys_with_the_highest_products(
    sinks: int, window: int, step: int, top_k: int
) -> None:
    q, k, _, _ = choosing.inputs()
    spec = f"retrieval:top_k={top_k},num_sinks={sinks},window={window},step={step}"
    near, retrieved = select(spec, "causal")
    assert isinstance(near.mask, AttnMask)
    assert isinstance(retrieved.mask, Tokens)
    near_rows, rows = torch.as_tensor(near.mask.to_dense()), retrieved.mask.dense_rows(0, TOKENS)
    for b, h, t in itertools.product(range(BATCH), range(HEADS_Q), range(TOKENS)):
        products = naive_selectors.retrieval(Head(q, k, b, h), t, sinks, window, step)
        outside = torch.zeros(TOKENS, dtype=torch.bool)
        outside[list(products)] = True
        assert torch.equal(near_rows[t], CAUSAL[t] & ~outside)
        scores = [products.get(j, 0.0) for j in range(TOKENS)]
        assert_top_k(rows[b, h, t], scores, outside, set(), top_k)


@pytest.mark.parametrize(
    ("stride", "queries", "mask"),
    [
        (8, TOKENS, "causal"), (150, 21, "causal"), (8, 21, "causal"), (8, 1, "causal"),
        (8, TOKENS, "sliding_window_causal:window=30"), (7, TOKENS, DOCUMENTS),
        (50, TOKENS, "full"),
    ],
)  # fmt: skip
def test_recycled_selects_the_top_keys_of_the_last_full_step(
    stride: int, queries: int, mask: str
) -> None:
    q, k, _, _ = choosing.inputs()
    first = TOKENS - queries
    selector, whole = choosing.load_selector(f"recycled:stride={stride},top_k=16", "causal")
    built = masks.build(mask, TOKENS).crop(first, TOKENS, 0, TOKENS)
    plan = selector.prepare(built, replace(whole.problem, seq_q=queries), "cpu")
    near, recycled = selector.select(q[:, first:], k, plan)
    assert isinstance(near.mask, AttnMask)
    assert isinstance(recycled.mask, Tokens)
    near_rows, rows = torch.as_tensor(near.mask.to_dense()), recycled.mask.dense_rows(0, queries)
    visible = torch.as_tensor(built.to_dense())
    for b, h, i in itertools.product(range(BATCH), range(HEADS_Q), range(queries)):
        full = i - i % stride
        head = Head(q[:, first:], k, b, h)
        seen, products = naive_selectors.recycled(head, visible, i, full, first)
        assert set(near_rows[i].nonzero()[:, 0].tolist()) == seen
        ranked, kept = torch.zeros(TOKENS, dtype=torch.bool), rows[b, h, i]
        ranked[list(products)] = True
        scores = [products.get(j, 0.0) for j in range(TOKENS)]
        if visible[i][ranked].all():
            assert_top_k(kept, scores, ranked, set(), 16)
        else:  # those that this query does not see are not replaced
            best = sorted(products, key=products.get, reverse=True)[:16]  # type: ignore[arg-type]
            assert set(kept.nonzero()[:, 0].tolist()) == {j for j in best if visible[i, j]}


def test_recycling_all_keys_is_full_attention() -> None:
    q, k, v, _ = choosing.inputs()
    q, mask = q[:, -21:], masks.build("causal", TOKENS, seq_q=21)
    whole, whole_lse = cpbench.attention(q, k, v, mask)
    out, lse = cpbench.attention(q, k, v, mask, operator=f"recycled:stride=5,top_k={TOKENS}")
    assert float((out - whole).abs().max()) < 2e-6
    assert float((lse - whole_lse).abs().max()) < 2e-6


def test_a_graph_of_keys_finds_most_of_what_an_exact_search_finds() -> None:
    pytest.importorskip("hnswlib")
    q, k, _, _ = choosing.inputs()
    spec = "retrieval:top_k=16,num_sinks=4,window=24,step=8"
    exact = select(spec, "causal")[1].mask
    for effort, least in ((200, 0.98), (16, 0.5)):
        selector, plan = choosing.load_selector(f"{spec},index=hnsw,effort={effort}", "causal")
        found = selector.select(q, k, plan)[1].mask
        assert isinstance(exact, Tokens)
        assert isinstance(found, Tokens)
        rows, exact_rows = (x.dense_rows(0, TOKENS) for x in (found, exact))
        assert torch.equal((found.index >= 0).sum(-1), rows.sum(-1)), "each key once"
        recall = float((rows & exact_rows).sum() / exact_rows.sum())
        assert least < recall <= 1.0
        figures = selector.index_figures(q, k, [(0, TOKENS)])
        assert figures["index_recall"] == pytest.approx(recall)
        assert figures["index_build_us"] > 0
        # At least the keys themselves, for each batch and key/value head.
        assert figures["index_bytes"] >= BATCH * HEADS_KV * (TOKENS - 4 - 24 - 8) * DIM * 4
    assert choosing.load_selector(spec, "causal")[0].index_figures(q, k, [(0, TOKENS)]) == {}


def test_graphs_are_searched_in_as_many_threads_as_torch_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hnswlib = pytest.importorskip("hnswlib")
    threads = []

    class Index(hnswlib.Index):  # type: ignore[misc, name-defined]
        def knn_query(self, queries: Any, k: int, num_threads: int = -1) -> Any:
            threads.append(num_threads)
            return super().knn_query(queries, k=k, num_threads=num_threads)

    monkeypatch.setattr(hnswlib, "Index", Index)
    select("retrieval:top_k=16,num_sinks=4,window=24,step=8,index=hnsw", "causal")
    assert set(threads) == {torch.get_num_threads()}


@pytest.mark.parametrize(
    ("params", "definition"),
    [
        ("buckets=4,latest=12,top_k=8", (4, 12, 8, "argmax", False)),
        ("buckets=8,latest=12,top_k=8,hash=sign,center=true", (8, 12, 8, "sign", True)),
        ("buckets=4,latest=300,top_k=0", (4, 300, 0, "argmax", False)),
        ("buckets=2,latest=1,top_k=300", (2, 1, 300, "argmax", False)),
    ],
)
def test_hax_selects_by_bucket_and_by_norm(params: str, definition: tuple) -> None:
    q, k, _, _ = choosing.inputs()
    (branch,) = select(f"hax:{params}", "causal")
    assert isinstance(branch.mask, Tokens)
    rows = branch.mask.dense_rows(0, TOKENS)
    assert torch.equal((branch.mask.index >= 0).sum(-1), rows.sum(-1)), "each key once"
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for t, keys in enumerate(naive_selectors.hax(Head(q, k, b, h), *definition)):
            assert {*torch.nonzero(rows[b, h, t])[:, 0].tolist()} == keys, (b, h, t)
