"""Every registered strategy on every layout it takes: results, gradients and bytes.

A new strategy is found through the registry: this file need not be edited for it.
"""

from __future__ import annotations

import functools
from typing import Any

import naive
import pytest
import torch
from ranks import run_ranks

import cpbench
from cpbench import masks, registry
from cpbench.api import Attention
from cpbench.comm import TorchComm
from cpbench.layout import build as build_layout
from cpbench.operator import Unsupported
from cpbench.problem import Problem
from cpbench.world import World

TOKENS = 41  # divides by nothing, so every layout pads
DOCS = "doc_lens=[1,9,13,2,16]"
MASKS = (
    "full",
    "causal",
    f"causal_document:{DOCS}",
    "sliding_window_causal:window=7",
    f"share_question:{DOCS}",
    f"prefix_lm_document:prefix_len=4,{DOCS}",
    "streaming:num_sinks=2,window=5",
    "global_sliding_window:num_global=3,window=4",
    f"block_causal_document:block_size=4,{DOCS}",
)
SHAPES = ((12, 12, "float32"), (12, 4, "float32"), (12, 4, "bfloat16"))
LIMIT = {"float32": 2e-6, "bfloat16": 1.2e-2}
SIZES = (1, 2, 3, 4)
STRATEGIES = [
    (name, layout)
    for name, info in registry.strategies().items()
    if name != "single"
    for layout in info.layouts
]


def _matrix(rank: int, size: int) -> dict[tuple[str, ...], Any]:
    """Largest error per tensor of every combination, or the reason of its refusal."""
    found: dict[tuple[str, ...], Any] = {}
    for strategy, layout in STRATEGIES:
        for mask_text in MASKS:
            mask = masks.build(mask_text, TOKENS)
            dealt = build_layout(layout, TOKENS, size, mask)
            for heads_q, heads_kv, dtype in SHAPES:
                key = (strategy, layout, mask_text, f"{heads_q}:{heads_kv}", dtype)
                try:
                    found[key] = _errors(rank, dealt, mask, strategy, heads_q, heads_kv, dtype)
                except Unsupported as refusal:
                    found[key] = str(refusal)
    return found


def _errors(
    rank: int, dealt: Any, mask: Any, strategy: str, heads_q: int, heads_kv: int, dtype: str
) -> dict[str, float]:
    whole = naive.random_inputs(2, TOKENS, heads_q, heads_kv, 16, getattr(torch, dtype))
    q, k, v, dout = (dealt.shard(x, rank) for x in whole)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = cpbench.distributed_attention(
        q, k, v, mask, strategy=strategy, layout=dealt.name, operator="bands"
    )
    out.backward(dout)
    assert lse is not None
    found = {"out": out.detach(), "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    want = naive.attention(*whole, mask)
    real = torch.as_tensor(dealt.positions(rank) < TOKENS)
    errors = {}
    for name in naive.TENSORS:
        axis = 2 if name == "lse" else 1
        mine = dealt.shard(want[name], rank, dim=axis)
        index = torch.nonzero(real).flatten()
        errors[name] = naive.error(
            found[name].index_select(axis, index), mine.index_select(axis, index)
        )
    return errors


@functools.cache
def _everything(size: int) -> list[dict[tuple[str, ...], Any]]:
    return run_ranks(size, _matrix)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("strategy", "layout"), STRATEGIES)
def test_equals_float64(strategy: str, layout: str, size: int) -> None:
    checked = 0
    for rank, answers in enumerate(_everything(size)):
        for key, answer in answers.items():
            if key[:2] != (strategy, layout):
                continue
            if isinstance(answer, str):
                assert "divisible" in answer, f"{key}: refused: {answer}"
                continue
            checked += 1
            for tensor, error in answer.items():
                assert error < LIMIT[key[-1]], f"rank {rank} {key}: {tensor} is off by {error:.2g}"
    assert checked, f"{strategy} refused everything on {size} ranks"


def _bytes(rank: int, size: int, strategy: str, layout: str, mask_text: str) -> tuple[int, int]:
    """Bytes this rank sent in the forward and in the backward pass."""
    problem = _problem()
    mask = masks.build(mask_text, problem.seq_q)
    dealt = build_layout(layout, problem.seq_q, size, mask)
    comm = TorchComm()
    work = Attention("bands", strategy, World.of(problem, mask, dealt), rank, "cpu")
    whole = naive.random_inputs(
        problem.batch,
        problem.seq_q,
        problem.heads_q,
        problem.heads_kv,
        problem.head_dim,
        torch.bfloat16,
    )
    q, k, v, dout = (dealt.shard(x, rank) for x in whole)
    _, _, saved = work.forward(q, k, v, comm, need_lse=False)
    forward = comm.traffic.bytes_sent
    work.backward(dout, saved, comm)
    return forward, comm.traffic.bytes_sent - forward


def _problem() -> Problem:
    return Problem(
        batch=2, seq_q=48, seq_k=48, heads_q=12, heads_kv=2, head_dim=16, dtype="bfloat16"
    )


def _q_and_kv(size: int) -> tuple[int, int]:
    problem = _problem()
    return problem.q_bytes(48 // size), problem.kv_bytes(48 // size)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_ring_moves_exactly_its_formula(size: int, layout: str) -> None:
    _, kv = _q_and_kv(size)
    n = size - 1
    for forward, backward in run_ranks(size, _bytes, "ring", layout, "full"):
        assert forward == n * kv
        assert backward == n * kv + n * kv * 4 // 2  # keys again, and float32 gradients


@pytest.mark.parametrize("size", [2, 3, 4])
def test_allgather_moves_exactly_its_formula(size: int) -> None:
    _, kv = _q_and_kv(size)
    n = size - 1
    for forward, backward in run_ranks(size, _bytes, "ring_allgather", "contiguous", "causal"):
        assert forward == n * kv
        assert backward == n * kv + n * kv * 4 // 2


@pytest.mark.parametrize("size", [2, 4])
def test_ulysses_moves_exactly_its_formula(size: int) -> None:
    q, kv = _q_and_kv(size)
    replicated = kv * max(2, size) // 2  # two key/value heads on four ranks: each sent twice
    for forward, backward in run_ranks(size, _bytes, "ulysses", "contiguous", "causal"):
        assert forward == (2 * q + replicated) * (size - 1) // size
        assert backward == forward


def test_ring_skips_steps_that_the_mask_leaves_empty() -> None:
    size = 4
    _, kv = _q_and_kv(size)
    sent = run_ranks(size, _bytes, "ring", "contiguous", "causal")
    # Keys of rank s go on to ranks s+1 … 3 only: rank r sends its own and those before it.
    assert [forward for forward, _ in sent] == [kv, 2 * kv, 3 * kv, 0]
    # Two documents on two ranks each: keys never leave the pair.
    sent = run_ranks(size, _bytes, "ring", "contiguous", "causal_document:doc_lens=[24,24]")
    assert [forward for forward, _ in sent] == [kv, 0, kv, 0]
    # The gradient of a pair's keys goes home in one hop, in float32.
    assert [backward for _, backward in sent] == [kv, 2 * kv, kv, 2 * kv]


def _merging_without_lse(rank: int, size: int) -> str:
    q, k, v, _ = naive.random_inputs(1, 8, 2, 2, 16, torch.float32)
    mask = masks.build("full", 16)
    try:
        cpbench.distributed_attention(q, k, v, mask, strategy="ring", operator="sdpa.math")
    except Unsupported as refusal:
        return str(refusal)
    return ""


def test_a_strategy_that_merges_refuses_an_operator_without_lse() -> None:
    for reason in run_ranks(2, _merging_without_lse):
        assert reason == "ring merges partial results and sdpa.math returns no log-sum-exp"


def _disagreeing(rank: int, size: int) -> str:
    q, k, v, _ = naive.random_inputs(1, 8, 2, 2, 16, torch.float32)
    mask = masks.build("sliding_window", 16, window=3 + rank)
    try:
        cpbench.distributed_attention(q, k, v, mask, strategy="ring")
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_raise_instead_of_hanging() -> None:
    for message in run_ranks(2, _disagreeing):
        assert message.startswith("ranks disagree on the problem")


def _twice(rank: int, size: int) -> bool:
    import torch.distributed as dist

    mask = masks.build("causal", 16)
    dealt = build_layout("zigzag", 16, size)
    whole = naive.random_inputs(1, 16, 2, 2, 16, torch.float32)
    q, k, v, _ = (dealt.shard(x, rank) for x in whole)
    first, _ = cpbench.distributed_attention(q, k, v, mask)
    alone = dist.new_group([0, 1])
    second, _ = cpbench.distributed_attention(q, k, v, mask, group=alone)
    return torch.equal(first, second)


def test_a_second_group_works_beside_the_first() -> None:
    assert run_ranks(2, _twice) == [True, True]


def _peak_bytes(rank: int, size: int, strategy: str) -> int:
    """Peak of forward and backward on 256 local tokens of a full mask."""
    from cpbench.comm import Control
    from cpbench.device import Cpu
    from cpbench.measure import Workload, measure_memory

    tokens = 256 * size
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=4, heads_kv=4, head_dim=64, dtype="float32"
    )
    dealt = build_layout("contiguous", tokens, size)
    mask = masks.build("full", tokens)
    work = Attention("bands", strategy, World.of(problem, mask, dealt), rank, "cpu")
    whole = naive.random_inputs(1, tokens, 4, 4, 64, torch.float32)
    local = [dealt.shard(x, rank) for x in whole]
    inputs = dict(zip(("q", "k", "v", "dout"), local, strict=True))
    comm = TorchComm()
    return measure_memory(Workload(work, inputs, comm), Cpu(1), comm, Control())["peak"]


def test_ring_memory_does_not_grow_with_the_ranks_and_allgather_memory_does() -> None:
    kv = 2 * 256 * 4 * 64 * 4
    ring = {size: max(run_ranks(size, _peak_bytes, "ring")) for size in (3, 5)}
    gathered = {size: max(run_ranks(size, _peak_bytes, "ring_allgather")) for size in (3, 5)}
    assert ring[5] - ring[3] < 0.1 * kv
    assert gathered[5] - gathered[3] > 3.5 * kv  # two more shards of keys and of gradients
