"""Selectors: each choice against its definition, what is computed for it, and causality."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import naive
import naive_selectors as want
import pytest
import torch

import cpbench
from cpbench import masks, registry, sweep
from cpbench.mask import AttnMask
from cpbench.operator import Unsupported
from cpbench.pooling import NO_POOL, Pool
from cpbench.problem import Case, Problem
from cpbench.selecting import Branch, Selecting
from cpbench.selection import Blocks, Tokens, grid
from cpbench.spec import Spec

BATCH, TOKENS, HEADS_Q, HEADS_KV, DIM = 2, 203, 4, 2, 16
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
DOCUMENTS = "causal_document:doc_lens=[1,60,100,42]"

# Of every selector: a spec at this size, and a mask.
CASES = [
    ("oracle:block_size=16,keep=0.3", "causal"),
    ("oracle:block_size=16,keep=0.3", DOCUMENTS),
    ("oracle:block_size=16,keep=0.3", "full"),
    ("quest:block_size=16,block_q=32,keep=0.3", "causal"),
    ("quest:block_size=16,block_q=1,keep=0.3", DOCUMENTS),
    ("moba:block_size=16,top_k=4", "causal"),
    ("moba:block_size=16,top_k=4", DOCUMENTS),
    ("xattention:block_size=16,stride=4,threshold=0.6", "causal"),
    ("xattention:block_size=16,stride=4,threshold=0.6", "full"),
    ("minference.a_shape:num_sinks=4,window=40", "causal"),
    ("minference.vertical_slash:vertical=40,slash=101,block_size=16", "causal"),
    ("minference.vertical_slash:vertical=40,slash=101,block_size=16,whole_blocks=true", "causal"),
    ("minference.block_sparse:block_size=16,top_k=4", "causal"),
    ("flexprefill:block_size=16,min_budget=32", "causal"),
    ("flexprefill:block_size=16,min_budget=32,tau=1.0,gamma=0.4", "causal"),
    ("nsa:block_size=16,top_k=4,compress=8,stride=4,window=24", "causal"),
    ("dsa:top_k=20", "causal"),
    ("dsa:top_k=20,index_dim=8", DOCUMENTS),
    ("vsa:block_size=16,keep=0.2", "full"),
    ("vsa:block_size=16,keep=0.2,gate=0.0", "full"),
    # Whole blocks of queries that see nothing.
    ("oracle:block_size=16,keep=0.3", "causal:offset=-40"),
    ("moba:block_size=16,top_k=4", "causal:offset=-40"),
    ("dsa:top_k=20", "causal:offset=-40"),
]
IDS = [f"{spec.partition(':')[0]}-{number}" for number, (spec, _) in enumerate(CASES)]


def _inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    return naive.random_inputs(BATCH, TOKENS, HEADS_Q, HEADS_KV, DIM, dtype, seed)


def _made(spec: str, mask: str, **more: Any) -> tuple[Selecting, Any]:
    """A selector and its plan."""
    parsed = Spec.parse(spec)
    made = registry.implementation(registry.operator_info(parsed.name), {**parsed.kwargs, **more})
    problem = Problem(
        batch=BATCH, seq_q=TOKENS, seq_k=TOKENS, heads_q=HEADS_Q, heads_kv=HEADS_KV, head_dim=DIM,
        dtype="float32",
    )  # fmt: skip
    return made, made.prepare(masks.build(mask, TOKENS), problem, "cpu")


def _choose(spec: str, mask: str) -> tuple[Branch, ...]:
    q, k, _, _ = _inputs()
    made, plan = _made(spec, mask)
    return made.select(q, k, plan)


def _kept(branch: Branch) -> torch.Tensor:
    """Blocks, as a check of what ``Blocks`` says of itself too."""
    assert isinstance(branch.seen, Blocks)
    return branch.seen.kept & branch.seen.grid.allowed


def _rows(block_q: int, block: int) -> list[tuple[int, int, int]]:
    return list(itertools.product(range(BATCH), range(HEADS_Q), range(-(-TOKENS // block_q))))


def _below(blocks: int) -> torch.Tensor:
    return torch.ones(blocks, blocks, dtype=torch.bool).tril()


def _share(visible: int, keep: float) -> int:
    return max(1, int(visible * keep + 0.5))


def test_every_selector_is_here() -> None:
    declared = {name for name, info in registry.operators().items() if info.selects}
    assert {spec.partition(":")[0] for spec, _ in CASES} == declared


# --- choices against definitions ----------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", DOCUMENTS, "full"])
def test_the_oracle_takes_the_blocks_with_the_most_mass(mask: str) -> None:
    q, k, _, _ = _inputs()
    seen = torch.as_tensor(masks.build(mask, TOKENS).to_dense())
    probs = want.probabilities(q, k, seen)
    kept = _kept(_choose("oracle:block_size=16,keep=0.3", mask)[0])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        scores = want.oracle(want.Head(q, k, b, h), probs[b, h], 16)
        for x, row in enumerate(scores):
            span = want.ranges(TOKENS, 16)
            allowed = torch.tensor([bool(seen[span[x], y].any()) for y in span])
            count = _share(int(allowed.sum()), 0.3)
            want.takes_the_best(kept[b, h, x], row, allowed, set(), count)


@pytest.mark.parametrize("block_q", [32, 1])
def test_quest_ranks_pages_by_their_bound(block_q: int) -> None:
    q, k, _, _ = _inputs()
    kept = _kept(_choose(f"quest:block_size=16,block_q={block_q},keep=0.3", "causal")[0])
    pages = want.ranges(TOKENS, 16)
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(want.quest(want.Head(q, k, b, h), block_q, 16)):
            first, last = x * block_q, min((x + 1) * block_q, TOKENS) - 1
            allowed = torch.tensor([page.start <= last for page in pages])
            own = set(range(first // 16, last // 16 + 1))
            count = _share(int(allowed.sum()), 0.3)
            want.takes_the_best(kept[b, h, x], row, allowed, own, count)


def test_the_bound_of_quest_is_one() -> None:
    q, k, _, _ = _inputs()
    head = want.Head(q, k, 0, 0)
    for t, row in zip(range(0, TOKENS, 17), want.quest(head, 1, 16)[::17], strict=True):
        for bound, page in zip(row, want.ranges(TOKENS, 16), strict=True):
            assert bound >= float((head.k[page] @ head.q[t]).max()) - 1e-9


def test_moba_takes_past_blocks_by_mean_key_and_its_own() -> None:
    q, k, _, _ = _inputs()
    kept = _kept(_choose("moba:block_size=16,top_k=4", "causal")[0])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for t, row in enumerate(want.moba(want.Head(q, k, b, h), 16)):
            allowed = torch.tensor([score > -torch.inf for score in row])
            want.takes_the_best(kept[b, h, t], row, allowed, {t // 16}, 4)


def test_xattention_covers_a_share_of_the_antidiagonal_mass() -> None:
    q, k, _, _ = _inputs()
    kept = _kept(_choose("xattention:block_size=16,stride=4,threshold=0.6", "causal")[0])
    below = _below(kept.shape[2])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(want.xattention(want.Head(q, k, b, h), 16, 4)):
            want.covers(kept[b, h, x], row, below[x], {0, x}, 0.6)
    assert 0.3 < kept.float().mean() / below.float().mean() < 0.9


def test_block_sparse_ranks_by_means() -> None:
    q, k, _, _ = _inputs()
    kept = _kept(_choose("minference.block_sparse:block_size=16,top_k=4", "causal")[0])
    below = _below(kept.shape[2])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(want.pooled(want.Head(q, k, b, h), 16)):
            want.takes_the_best(kept[b, h, x], row, below[x], set(), 4)


def test_a_shape_is_the_streaming_mask() -> None:
    (branch,) = _choose("minference.a_shape:num_sinks=4,window=40", "causal")
    assert branch.seen == masks.build("streaming", TOKENS, num_sinks=4, window=40)


def _lines(b: int, h: int, last: int) -> tuple[list[float], list[float]]:
    """Attention of the last queries on each key, and at each distance."""
    q, k, _, _ = _inputs()
    probs = want.probabilities(q, k, CAUSAL)[b, h, -last:]
    columns = probs.sum(0).tolist()
    diagonals = [0.0] * TOKENS
    for r in range(last):
        for j in range(TOKENS - last + r + 1):
            diagonals[TOKENS - last + r - j] += float(probs[r, j])
    return columns, diagonals


def test_vertical_slash_takes_columns_and_the_blocks_of_diagonals() -> None:
    (branch,) = _choose("minference.vertical_slash:vertical=40,slash=110,block_size=16", "causal")
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
        assert torch.equal(_kept(branch)[b, h], blocks)


def test_whole_blocks_of_columns_hold_the_columns() -> None:
    spec = "minference.vertical_slash:vertical=40,slash=110,block_size=16"
    (lines,), (blocks,) = _choose(spec, "causal"), _choose(f"{spec},whole_blocks=true", "causal")
    assert isinstance(lines.seen, Blocks)
    assert isinstance(blocks.seen, Blocks)
    assert blocks.seen.columns is None
    more = blocks.seen.rows(0, TOKENS)
    assert not (lines.seen.rows(0, TOKENS) & ~more).any()
    assert lines.seen.area < blocks.seen.area


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_flexprefill_takes_lines_and_in_aware_heads_pooled_blocks(tau: float) -> None:
    q, k, _, _ = _inputs()
    block, gamma, least = 16, 0.5, 2
    spec = f"flexprefill:block_size=16,min_budget=32,gamma=0.5,tau={tau}"
    kept = _kept(_choose(spec, "causal")[0])
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
            probs = pooled.masked_fill(~_below(count), -torch.inf).softmax(-1)
            ordered = probs.flatten().sort(descending=True)
            taken = int((ordered.values.cumsum(0) <= gamma * count).sum())
            expected.view(-1)[ordered.indices[:taken]] = True
        assert torch.equal(kept[b, h], expected & _below(count)), (b, h)


def test_flexprefill_trusts_pooled_blocks_where_they_are_near_the_truth() -> None:
    """The square root of the Jensen-Shannon divergence between what pooled keys tell the last
    queries' mean and what those truly give each block, head by head."""
    q, k, _, _ = _inputs()
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
    some = _kept(_choose(f"{spec},tau={tau:.9f}", "causal")[0])
    all_, none = (_kept(_choose(f"{spec},tau={t}", "causal")[0]) for t in (1.0, 0.0))
    for (b, h), far in distance.items():
        assert torch.equal(some[b, h], (all_ if far < tau else none)[b, h])
        assert not torch.equal(all_[b, h], none[b, h])


def test_nsa_takes_blocks_by_compressed_attention_of_the_group() -> None:
    q, k, _, _ = _inputs()
    spec = "nsa:block_size=16,top_k=4,compress=8,stride=4,window=24"
    chosen, window, compressed = _choose(spec, "causal")
    kept = _kept(chosen)
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
    q, k, _, _ = _inputs()
    (branch,) = _choose("dsa:top_k=20", mask)
    assert isinstance(branch.seen, Tokens)
    seen = torch.as_tensor(masks.build(mask, TOKENS).to_dense())
    rows = branch.seen.rows(0, TOKENS)
    for b, t in itertools.product(range(BATCH), range(TOKENS)):
        scores = want.dsa(q, k, b, t).tolist()
        want.takes_the_best(rows[b, 0, t], scores, seen[t], set(), 20)


def test_vsa_takes_blocks_by_means() -> None:
    q, k, _, _ = _inputs()
    fine, coarse = _choose("vsa:block_size=16,keep=0.2", "full")
    kept = _kept(fine)
    everything = torch.ones(kept.shape[3], dtype=torch.bool)
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        for x, row in enumerate(want.pooled(want.Head(q, k, b, h), 16)):
            want.takes_the_best(kept[b, h, x], row, everything, set(), _share(13, 0.2))
    assert coarse.seen == masks.build("full", 13)
    assert coarse.pool_q == coarse.pool_k == Pool(16, 16, partial=True)


# --- what is computed for a choice --------------------------------------------------------------


def _mean(tokens: int, pool: Pool) -> torch.Tensor:
    """``[n, T]``: means of windows as a matrix."""
    found = torch.zeros(pool.count(tokens), tokens, dtype=torch.float64)
    for i in range(len(found)):
        window = slice(i * pool.stride, min(i * pool.stride + pool.size, tokens))
        found[i, window] = 1 / (window.stop - window.start)
    return found


def _expected(branches: tuple[Branch, ...], inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """float64 autograd of the definition: a sum over branches of softmaxes over what they see."""
    q, k, v, dout = inputs
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    total = torch.zeros(q.shape, dtype=torch.float64)
    for branch in branches:
        of_q, of_k = _mean(TOKENS, branch.pool_q), _mean(TOKENS, branch.pool_k)
        q_, k_, v_ = (
            torch.einsum("nt,bthd->bnhd", of, x)
            for of, x in zip((of_q, of_k, of_k), leaves, strict=True)
        )
        k_, v_ = (x.repeat_interleave(HEADS_Q // HEADS_KV, 2) for x in (k_, v_))
        scores = torch.einsum("bshd,bthd->bhst", q_, k_) * DIM**-0.5
        if isinstance(branch.seen, AttnMask):
            seen = torch.as_tensor(branch.seen.to_dense())
        else:
            seen = branch.seen.rows(0, TOKENS)
        lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1, True)
        probs = torch.where(seen, (scores - lse.nan_to_num(neginf=0.0)).exp(), 0.0)
        out = torch.einsum("bhst,bthd->bshd", probs, v_)
        if branch.pool_q != NO_POOL:
            out = out.repeat_interleave(branch.pool_q.size, 1)[:, :TOKENS]
        total = total + branch.gate * out
    grads = torch.autograd.grad(total, leaves, dout.double())
    found = {"out": total.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    if len(branches) == 1:
        found["lse"] = lse[..., 0].detach()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spec", "mask"), CASES, ids=IDS)
def test_what_is_computed_is_what_was_chosen(spec: str, mask: str, dtype: torch.dtype) -> None:
    inputs = _inputs(dtype)
    made, plan = _made(spec, mask)
    out, lse = made.forward(*inputs[:3], plan)
    grads = made.backward(inputs[3], *inputs[:3], out, lse, plan)
    found = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    expected = _expected(made.choice(out).branches, inputs)
    limit = 2e-6 if dtype == torch.float32 else 1.5e-2
    assert (lse is not None) == ("lse" in expected)
    blind = ~torch.as_tensor(masks.build(mask, TOKENS).to_dense()).any(1)
    assert not out[:, blind].any()
    assert not grads[0][:, blind].any()
    for name, value in expected.items():
        got = found[name]
        assert got is not None
        if name != "lse":
            assert got.dtype == dtype
        assert naive.error(got, value) < limit, name


@pytest.mark.parametrize(
    "kernel", ["reference", "sdpa.cpu_flash", "bands", "gathered", "triton_block_sparse"]
)
def test_any_kernel_that_takes_blocks_computes_them(kernel: str) -> None:
    inputs = _inputs()
    spec = f"oracle:block_size=16,keep=0.3,kernel={kernel}"
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    mask = masks.build(DOCUMENTS, TOKENS)
    out, _ = cpbench.attention(q, k, v, mask, operator=spec)
    out.backward(inputs[3])
    branches = _choose(spec, DOCUMENTS)
    expected = _expected(branches, inputs)
    for name, value in (("out", out), ("dq", q.grad), ("dk", k.grad), ("dv", v.grad)):
        assert naive.error(value.detach(), expected[name]) < 2e-6, name


def test_the_backward_pass_reuses_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs()
    made, plan = _made("moba:block_size=16,top_k=4", "causal")
    out, lse = made.forward(*inputs[:3], plan)
    monkeypatch.setattr(made, "select", None)
    made.backward(inputs[3], *inputs[:3], out, lse, plan)
    with pytest.raises(ValueError, match="the output that its own forward returned"):
        made.backward(inputs[3], *inputs[:3], out.clone(), lse, plan)


@pytest.mark.parametrize("spec", [spec for spec, mask in CASES if mask == "causal"])
def test_nothing_outlives_its_output(spec: str) -> None:
    """A choice goes with the output that it was made for: nothing piles up from call to call."""
    inputs = _inputs()
    made, plan = _made(spec, "causal")
    for _ in range(3):
        out, lse = made.forward(*inputs[:3], plan)
        made.backward(inputs[3], *inputs[:3], out, lse, plan)
    assert len(made._choices) == 1
    del out, lse
    gc.collect()
    assert len(made._choices) == 0


# --- causality ----------------------------------------------------------------------------------


def _reach(spec: str, at: int) -> int:
    """The first query whose output changes when the tokens from ``at`` on do, in some way."""
    made, plan = _made(spec, "causal")
    before, _ = made.forward(*_inputs()[:3], plan)
    changed = torch.zeros(TOKENS, dtype=torch.bool)
    for seed in range(1, 6):
        after = _inputs()
        for x, y in zip(after[:3], _inputs(seed=seed)[:3], strict=True):
            x[:, at:] = 3 * y[:, at:]
        out, _ = made.forward(*after[:3], plan)
        changed |= ((out - before).abs() > 1e-4).any(3).any(2).any(0)  # not by rounding
    return int(torch.nonzero(changed)[0, 0])


LOOKING = [(spec, id_) for (spec, mask), id_ in zip(CASES, IDS, strict=True) if mask == "causal"]


@pytest.mark.parametrize("spec", [s for s, _ in LOOKING], ids=[i for _, i in LOOKING])
def test_later_tokens_change_what_a_selector_declares_and_no_more(spec: str) -> None:
    info = registry.operator_info(Spec.parse(spec).name)
    block = Spec.parse(spec).kwargs.get("block_q", 16)
    if block == 1:
        return
    at = 5 * 32 + 9  # inside a block, of whichever size
    first = _reach(spec, at)
    if info.looks_ahead == "":
        assert first >= at
    elif info.looks_ahead == "block":
        assert at // block * block <= first < at, "it declares to look ahead in its block"
    else:
        assert first < at, "it declares to look ahead in the sequence"


def test_vsa_looks_ahead_everywhere() -> None:
    assert registry.operator_info("vsa").looks_ahead == "sequence"
    q, k, v, _ = _inputs()
    with pytest.raises(Unsupported, match="takes full masks"):
        cpbench.attention(q, k, v, masks.build("causal", TOKENS), operator="vsa")


# --- what a selection says of itself ------------------------------------------------------------


@pytest.mark.parametrize(("spec", "mask"), CASES, ids=IDS)
def test_a_selection_agrees_with_its_rows(spec: str, mask: str) -> None:
    for branch in _choose(spec, mask):
        seen = branch.seen
        if isinstance(seen, AttnMask):
            continue
        dense = seen.rows(0, TOKENS)
        assert torch.equal(dense[:, :, 50:61], seen.rows(50, 61))
        assert seen.area == pytest.approx(int(dense.sum()) / BATCH / HEADS_Q)
        for b, h, line in ((0, 0, 0), (1, 2, 77), (1, 3, TOKENS - 1)):
            assert seen.seen(b, h, line).tolist() == torch.nonzero(dense[b, h, line])[:, 0].tolist()
            column = dense[b, h, :, line]
            assert seen.seers(b, h, line).tolist() == torch.nonzero(column)[:, 0].tolist()
        if isinstance(seen, Blocks):
            heads = torch.as_tensor(seen.to_heads().to_dense()).view(dense.shape)
            assert torch.equal(heads, dense)


def test_own_blocks_of_few_queries_are_at_the_end() -> None:
    mask = masks.build("causal", 100, seq_q=10)
    own = grid(mask, 4, 16, "cpu").own
    assert [torch.nonzero(row)[:, 0].tolist() for row in own] == [[5], [5, 6], [6]]


def test_a_few_queries_of_many_tokens() -> None:
    q, k, v, dout = _inputs()
    q, dout = q[:, -3:], dout[:, -3:]
    mask = masks.build("causal", TOKENS, seq_q=3)
    whole, _ = cpbench.attention(q, k, v, mask)
    for spec in ("quest:block_q=1,keep=1.0", "oracle:keep=1.0", "dsa:top_k=500", "moba:keep=1.0"):
        out, _ = cpbench.attention(q, k, v, mask, operator=spec)
        assert naive.error(out, whole) < 2e-6, spec


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("oracle:block_size=0", "block_size = 0 must be at least 1"),
        ("oracle:keep=1.5", "keep = 1.5 is a share"),
        ("xattention:stride=7", "stride = 7 must divide block_size = 128"),
        ("nsa:top_k=2", "top_k = 2 must be at least 3"),
        ("nsa:stride=24", "stride = 24 must divide"),
        ("flexprefill:gamma=2.0", "gamma = 2.0 must be from 0 to 1"),
        ("moba:kernel=bands", "moba chooses rows"),
        ("moba:kernel=oracle", "is itself a selector"),
        ("oracle:kernel=nothing", "no operator 'nothing'"),
        ("minference.vertical_slash:vertical=0", "vertical = 0 must be at least 1"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(spec: str, words: str) -> None:
    q, k, v, _ = _inputs()
    with pytest.raises(ValueError, match=words) as caught:
        cpbench.attention(q, k, v, masks.build("causal", TOKENS), operator=spec)
    assert "\n" not in str(caught.value)


def test_strategies_of_several_ranks_refuse_selectors() -> None:
    from cpbench.api import Attention
    from cpbench.layout import build
    from cpbench.world import World

    problem = Problem(batch=1, seq_q=64, seq_k=64, heads_q=4, heads_kv=4, head_dim=16,
                      dtype="float32")  # fmt: skip
    world = World.of(problem, masks.build("causal", 64), build("contiguous", 64, 2))
    with pytest.raises(Unsupported, match="chooses from whole sequences"):
        Attention("moba", "ulysses", world, 0, "cpu")


def test_a_kernel_in_a_file_enters_the_id_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "kernel.py"

    def case() -> Case:
        spec = {"name": "oracle", "kernel": f"{file}:OP"}
        return sweep.expand({"sweep": {"operator": spec}}, "s").cases[0]

    text = (
        "from cpbench.registry import OperatorInfo\n"
        "OP = OperatorInfo(name='mine', summary='', source='', load='a:b')\n"
    )
    file.write_text(text)
    before = case()
    file.write_text(f"{text}# changed\n")
    assert case().id != before.id
    assert before.data_content == ()
    spec = {"name": "oracle", "kernel": f"{tmp_path}/nowhere.py:OP"}
    with pytest.raises(ValueError, match="there is no file"):
        sweep.expand({"sweep": {"operator": spec}}, "s")


def test_a_kernel_without_lse_has_its_rows_sampled() -> None:
    from cpbench import check, check_choice
    from cpbench.api import Attention
    from cpbench.inputs import Recipe
    from cpbench.layout import build
    from cpbench.world import World

    problem = Problem(batch=1, seq_q=300, seq_k=300, heads_q=4, heads_kv=2, head_dim=16,
                      dtype="float32")  # fmt: skip
    world = World.of(problem, masks.build("causal", 300), build("contiguous", 300, 1))
    work = Attention("oracle:block_size=16,kernel=sdpa.math", "single", world, 0, "cpu")
    x = check.inputs_of(work, Recipe(), "cpu")
    found, choice = check_choice.run_and_tell(work, x)
    errors = check_choice.sampled(work, x, found, choice, 0, check.Rank("cpu"))
    assert set(errors) == {"out", "dq"}
    assert check.verdict(errors, "float32") is None
