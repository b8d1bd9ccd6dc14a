"""Selectors on several ranks: they select and compute what one rank does; and what they send."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import choosing
import naive
import pytest
import torch
from ranks import run_ranks

import cpbench
from cpbench import masks
from cpbench.api import Attention
from cpbench.core import registry
from cpbench.core.operator import QKV, Unsupported
from cpbench.core.problem import Problem
from cpbench.masks.attn_mask import AttnMask
from cpbench.parallel.comm import Control
from cpbench.parallel.comm_torch import TorchComm
from cpbench.parallel.layout import build
from cpbench.parallel.world import World
from cpbench.selectors.common.base import Branch
from cpbench.selectors.moba import Moba
from cpbench.selectors.selections import Blocks
from cpbench.verify import quality
from cpbench.verify.check import RankContext, WrongResult
from cpbench.verify.gathered import run_pass_as_one_rank

TOKENS = 191  # runs of whole blocks of 16 on 2, 3 and 4 ranks, of which the last is shorter
DOCUMENTS = "causal_document:doc_lens=[1,60,100,30]"
STRATEGIES = ("ulysses", "ring_allgather", "sparse_fetch")
HEADS = {1: (4, 2), 2: (4, 2), 3: (6, 3), 4: (8, 4)}
LIMIT = {"float32": 2e-6, "bfloat16": 1.5e-2}
BATCH, DIM = 2, 16


def _problem(heads: tuple[int, int], dtype: str = "float32") -> Problem:
    return Problem(batch=BATCH, seq_q=TOKENS, seq_k=TOKENS, heads_q=heads[0], heads_kv=heads[1],
                   head_dim=DIM, dtype=dtype)  # fmt: skip


def _attention(
    spec: str, strategy: str, layout: str, mask: str, problem: Problem, rank: int, size: int
) -> Attention:
    built = masks.build(mask.replace(choosing.DOCUMENTS, DOCUMENTS), TOKENS)
    world = World.of(problem, built, build(layout, TOKENS, size, built))
    return Attention(spec, strategy, world, rank, "cpu")


@functools.cache
def _inputs(heads: tuple[int, int], dtype: str) -> list[torch.Tensor]:
    return naive.random_inputs(BATCH, TOKENS, *heads, DIM, getattr(torch, dtype))


@functools.cache
def _one_rank(
    spec: str, mask: str, problem: Problem
) -> tuple[tuple[Branch, ...], dict[str, torch.Tensor]]:
    """The selection and results of one rank, which are compared with float64 elsewhere."""
    q, k, v, dout = _inputs((problem.heads_q, problem.heads_kv), problem.dtype)
    work = _attention(spec, "single", "contiguous", mask, problem, 0, 1)
    work.op.selected = []
    out, lse, saved = work.forward(QKV(q, k, v), None)
    grads = work.backward(dout, saved, None)
    ((_, _, branches),) = work.op.selected
    results = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    return branches, {name: x.double() for name, x in results.items() if x is not None}


Case = tuple[str, str, str, str, str]  # strategy, layout, selector, mask, dtype


def _cases(size: int) -> Iterator[Case]:
    """Every selector on 2 ranks, on several layouts; some of the cases on others."""
    every, first = {1: (6, 0), 2: (1, 0), 3: (3, 1), 4: (4, 0)}[size]
    for number, (spec, mask) in enumerate(choosing.CASES):
        if number % every != first:
            continue
        for strategy in STRATEGIES:
            yield strategy, "contiguous", spec, mask, "float32"
            if size == 2:
                yield strategy, "zigzag", spec, mask, ("float32", "bfloat16")[number % 2]
                if number % 2:
                    yield strategy, ("striped", "dispatch")[number // 2 % 2], spec, mask, "float32"


def _run(rank: int, size: int, cases: list[Case]) -> list[str | dict[str, float]]:
    """For each case why it was refused, or its errors on this rank and the share of what it
    selected that one rank does not select."""
    comm = TorchComm()
    outcomes: list[str | dict[str, float]] = []
    for strategy, layout, spec, mask, dtype in cases:
        problem = _problem(HEADS[size], dtype)
        try:
            work = _attention(spec, strategy, layout, mask, problem, rank, size)
        except Unsupported as refusal:
            outcomes.append(str(refusal))
            continue
        inputs = _inputs(HEADS[size], dtype)
        q, k, v, dout = (work.layout.shard(x, rank) for x in inputs)
        work.op.selected = []
        out, lse, saved = work.forward(QKV(q, k, v), comm)
        grads = work.backward(dout, saved, comm)
        branches, expected = _one_rank(spec, mask, problem)
        errors = {"selected": _different(work.op.selected, branches, strategy, rank)}
        real = torch.as_tensor(work.layout.positions(rank) < TOKENS).nonzero().flatten()
        results = {"out": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
        for name, x in results.items():
            own = work.layout.shard(expected[name], rank).index_select(1, real)
            errors[name] = naive.error(x.index_select(1, real), own)
        if lse is not None:
            own = work.layout.shard(expected["lse"], rank, dim=2).index_select(2, real)
            errors["lse"] = naive.error(lse.index_select(2, real), own)
        outcomes.append(errors)
    return outcomes


def _different(
    selected: list[tuple[torch.Tensor, int, tuple[Branch, ...]]],
    expected: tuple[Branch, ...],
    strategy: str,
    rank: int,
) -> float:
    """The share of the selected pairs that one rank does not select, or selects besides."""
    pairs = others = 0
    for rows, heads, branches in selected:
        first = rank * heads if strategy == "ulysses" else 0
        assert len(branches) == len(expected)
        for branch, whole in zip(branches, expected, strict=True):
            if branch.pool_q.size > 1:
                continue  # of blocks of queries; it is a static mask
            if isinstance(branch.mask, AttnMask):
                assert isinstance(whole.mask, AttnMask)
                own = torch.as_tensor(branch.mask.to_dense())
                all_rows = torch.as_tensor(whole.mask.to_dense())[rows]
            else:
                own = branch.mask.dense_rows(0, len(rows))
                assert not isinstance(whole.mask, AttnMask)
                all_rows = whole.mask.dense_rows(0, TOKENS)[:, first : first + heads, rows]
            pairs += int(all_rows.sum())
            others += int((own != all_rows).sum())
    return others / max(pairs, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_one_rank(size: int) -> None:
    cases = list(_cases(size))
    computed, faults = set(), []
    for case, outcomes in zip(cases, zip(*run_ranks(size, _run, cases), strict=True), strict=True):
        refused = {outcome for outcome in outcomes if isinstance(outcome, str)}
        if refused:
            assert len(refused) == 1, case  # by all ranks, or by none
            assert not any(isinstance(outcome, dict) for outcome in outcomes), case
            assert "\n" not in next(iter(refused))
            continue
        computed.add((case[0], case[2].partition(":")[0]))
        for rank, errors in enumerate(outcomes):
            limits = dict.fromkeys(errors, LIMIT[case[4]]) | {"selected": 1e-3, "lse": 2e-6}
            faults += [(case, rank, e) for e in errors.items() if not e[1] <= limits[e[0]]]
    assert not faults, faults[:5]
    assert {strategy for strategy, _ in computed} == {*STRATEGIES}
    if size != 2:
        return
    selectors = {spec.partition(":")[0] for spec, _ in choosing.CASES}
    infos = registry.operators()
    left_out = {
        "ulysses": {name for name in selectors if infos[name].selects_for == "all"},
        "ring_allgather": {name for name in selectors if infos[name].selects_from == "sequence"},
        "sparse_fetch": {name for name in selectors if infos[name].selects_from != "pooled_keys"},
    }
    for strategy, names in left_out.items():
        assert {name for of, name in computed if of == strategy} == selectors - names


def _traffic(rank: int, size: int, spec: str, mask: str) -> tuple[list[int], list[int]]:
    """Bytes that this rank sends to each, forward and backward."""
    comm = TorchComm()
    work = _attention(spec, "sparse_fetch", "contiguous", mask, _problem(HEADS[size]), rank, size)
    q, k, v, dout = (work.layout.shard(x, rank) for x in _inputs(HEADS[size], "float32"))
    comm.traffic.clear()
    _, _, saved = work.forward(QKV(q, k, v), comm, need_lse=False)
    forward = comm.traffic.bytes_to[:]
    comm.traffic.clear()
    work.backward(dout, saved, comm)
    return forward, comm.traffic.bytes_to[:]


@pytest.mark.parametrize(
    ("spec", "vectors"),
    [
        ("minference.block_sparse:block_size=16,top_k=2", 1),
        ("quest:block_size=16,block_q=16,keep=0.2", 2),
    ],
)
def test_a_block_is_sent_once_to_each_rank_that_selected_it(spec: str, vectors: int) -> None:
    size, (heads_q, heads_kv) = 4, HEADS[4]
    (branch,), _ = _one_rank(spec, "causal", _problem(HEADS[size]))
    assert isinstance(branch.mask, Blocks)
    kept = branch.mask.kept & branch.mask.grid.allowed
    ranks = run_ranks(size, _traffic, spec, "causal")
    per_rank = 3  # blocks, of queries and of keys
    pooled = vectors * BATCH * per_rank * heads_kv * DIM * 4
    asked = BATCH * heads_kv * per_rank
    for owner, receiver in ((s, r) for s in range(size) for r in range(size) if s != r):
        units = 0
        for b in range(BATCH):
            for g in range(heads_kv):
                for block in range(owner * per_rank, (owner + 1) * per_rank):
                    group = range(g * heads_q // heads_kv, (g + 1) * heads_q // heads_kv)
                    own_rows = range(receiver * per_rank, (receiver + 1) * per_rank)
                    units += any(kept[b, h, x, block] for h in group for x in own_rows)
        nbytes = units * 16 * 2 * DIM * 4
        assert ranks[owner][0][receiver] == pooled + asked + nbytes
        assert ranks[receiver][1][owner] == nbytes
    everything = BATCH * 48 * heads_kv * 2 * DIM * 4
    assert 0 < sum(sum(backward) for _, backward in ranks) < size * (size - 1) * everything / 2


def test_bfloat16_gradients_are_half_the_bytes() -> None:
    first, last = run_ranks(2, _bytes_of_gradients)
    assert first[:2] == (0, 0)  # nobody sees later keys
    assert last[0] == 2 * last[1] > 0
    assert first[2] == last[2] == 0  # the kernel has rounded them, and no sum is sent


def _bytes_of_gradients(rank: int, size: int) -> tuple[int, int, float]:
    comm, sent, results = TorchComm(), [], []
    for strategy in ("sparse_fetch", "sparse_fetch:grad_dtype=bfloat16"):
        problem = _problem(HEADS[size], "bfloat16")
        spec = "moba:block_size=16,top_k=4"
        work = _attention(spec, strategy, "contiguous", "causal", problem, rank, size)
        q, k, v, dout = (work.layout.shard(x, rank) for x in _inputs(HEADS[size], "bfloat16"))
        _, _, saved = work.forward(QKV(q, k, v), comm)
        comm.traffic.clear()
        results.append(work.backward(dout, saved, comm)[1])
        sent.append(comm.traffic.bytes_sent)
    return sent[0], sent[1], naive.error(results[1], results[0].double())


@pytest.mark.parametrize(
    ("spec", "strategy", "layout", "mask", "heads", "words"),
    [
        ("moba:block_size=16", "ring", "contiguous", "causal", (4, 2),
         "moba selects from all keys of a sequence, which ring does not give it at once; "
         "use ring_allgather, single, sparse_fetch, ulysses"),
        ("moba:block_size=16", "ring_allgather:stages=2", "contiguous", "causal", (4, 2),
         "moba needs them as it returned them: use stages = 1"),
        ("dsa:top_k=20", "ulysses", "contiguous", "causal", (4, 2),
         "dsa selects for all 4 heads together, and is given 2 of them"),
        ("nsa:block_size=16", "ulysses", "contiguous", "causal", (4, 1),
         "nsa selects for the 4 query heads of a key/value head together, and is given 2 of them"),
        ("flexprefill", "ring_allgather", "contiguous", "causal", (4, 2),
         "flexprefill selects by other queries of the sequence too"),
        ("oracle:block_size=16", "ring_allgather", "striped", "causal", (4, 2),
         "oracle selects blocks of 16 queries, which the layout striped cuts"),
        ("moba:block_size=64", "sparse_fetch", "contiguous", "causal", (4, 2),
         "moba selects blocks of 64 keys, which the layout contiguous cuts"),
        ("vsa:block_size=16", "sparse_fetch", "contiguous", "full", (4, 2),
         "vsa needs all keys: its coarse branch (gate = 1) attends to the means of all values"),
        ("xattention", "sparse_fetch", "contiguous", "causal", (4, 2),
         "moba, quest, seer, vsa, not xattention"),
        ("bands", "sparse_fetch", "contiguous", "causal", (4, 2), "not bands"),
        ("moba:block_size=16", "sparse_fetch:grad_dtype=bfloat16", "contiguous", "causal", (4, 2),
         "grad_dtype = bfloat16 is too coarse for gradients in float32"),
        ("nsa:block_size=16", "ring_allgather", "zigzag", "full", (4, 2), "takes causal masks"),
        ("moba", "ulysses:offload=host,chunk=16", "contiguous", "causal", (4, 2),
         "moba is a selector, which takes no offload"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_and_say_what_is_possible(
    spec: str, strategy: str, layout: str, mask: str, heads: tuple[int, int], words: str
) -> None:
    with pytest.raises(Unsupported) as caught:
        _attention(spec, strategy, layout, mask, _problem(heads), 0, 2)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def _autograd(rank: int, size: int) -> dict[str, float]:
    """Errors of the public function under sparse_fetch, with gradients from autograd."""
    spec = "moba:block_size=16,top_k=4"
    mask, layout = masks.build("causal", TOKENS), build("zigzag", TOKENS, size)
    inputs = _inputs(HEADS[size], "float32")
    q, k, v, dout = (layout.shard(x, rank) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    out, _ = cpbench.distributed_attention(q, k, v, mask, "sparse_fetch", "zigzag", operator=spec)
    out.backward(dout)
    _, expected = _one_rank(spec, "causal", _problem(HEADS[size]))
    real = torch.as_tensor(layout.positions(rank) < TOKENS).nonzero().flatten()
    results = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {
        name: naive.error(
            x.index_select(1, real),
            layout.shard(expected[name], rank).index_select(1, real),
        )
        for name, x in results.items()
    }


def test_the_public_function_is_differentiable() -> None:
    for errors in run_ranks(2, _autograd):
        assert all(error < LIMIT["float32"] for error in errors.values()), errors


def _gathered(rank: int, size: int, strategy: str, faulty: bool) -> str | dict[str, float]:
    """The quality of a selection gathered from ranks; or how it is wrong."""
    context = RankContext("cpu", TorchComm(), Control())
    problem = _problem(HEADS[size])
    spec = "moba:block_size=16,top_k=4"
    layout = "zigzag" if size > 1 else "contiguous"
    work = _attention(spec, strategy, layout, "causal", problem, rank, size)
    if faulty:
        select_by = Moba.select_by

        def without_budget(self: Moba, q, pooled, plan):  # type: ignore[no-untyped-def]
            self.top_k = 4 if plan.mask.seq_q == TOKENS else 3
            return select_by(self, q, pooled, plan)

        Moba.select_by = without_budget  # type: ignore[method-assign]
    shards = [work.layout.shard(x, rank) for x in _inputs(HEADS[size], "float32")]
    try:
        inputs = dict(zip(("q", "k", "v", "dout"), shards, strict=True))
        _, one, pairs = run_pass_as_one_rank(work, inputs, context)
    except WrongResult as error:
        return str(error)
    assert (one is None) == (rank > 0)
    figures = quality.measure_quality(*one[:4]) if one else {}
    return {**figures, "pairs": pairs, "different": one.different if one else 0.0}


@pytest.mark.parametrize("strategy", ["ulysses", "sparse_fetch"])
def test_the_quality_of_a_selection_is_that_of_one_rank(strategy: str) -> None:
    first, second = run_ranks(2, _gathered, strategy, False)
    (alone,) = run_ranks(1, _gathered, "single", False)
    for name in ("density", "mass", "best_mass", "out_error", "rows"):
        assert first[name] == pytest.approx(alone[name], rel=1e-5)
    assert first["different"] == 0
    assert first["pairs"] + second["pairs"] == pytest.approx(alone["pairs"], abs=2)


def test_another_selection_than_on_one_rank_is_wrong() -> None:
    for text in run_ranks(2, _gathered, "ring_allgather", True):
        assert text.endswith("of what it selected is not what one rank selects"), text
