"""Heads that do not divide among the ranks that share them: results, traffic, work and refusals."""

from __future__ import annotations

import itertools
from typing import Any

import matrix
import pytest
from ranks import run_ranks
from traced import implemented, sent, sent_across, traces

from cpbench import masks
from cpbench.core.problem import Problem
from cpbench.core.registry import operator_info
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.tracing.memory_trace import peak_bytes
from cpbench.parallel.world import World
from cpbench.strategies.common.head_shares import HeadShares, chunks_of_heads

LIMIT = {"float32": 2e-6, "bfloat16": 1.2e-2}
# query and key/value heads: odd, prime, GQA whose groups are cut, and fewer than ranks
HEADS = ((10, 5), (7, 7), (12, 6), (14, 2), (9, 3), (3, 3), (2, 1))
STRATEGIES = {
    3: ("ulysses:pad=true", "ulysses:chunks=2,pad=true", "ulysses:chunks=5,pad=true",
        "usp:pad=true", "hierarchical:local=3,pad=true"),
    4: ("ulysses:pad=true", "ulysses:offload=host,chunk=3,pad=true", "ulysses:chunks=3,pad=true",
        "usp:ulysses=2,pad=true", "usp:inner=allgather,ulysses=2,pad=true,stages=3",
        "loongtrain:ulysses=2,window=2,pad=true",
        "hierarchical:local=4,pad=true", "hierarchical:pad=true"),
    8: ("usp:ulysses=4,pad=true", "usp:inner=allgather,ulysses=4,pad=true,keep=true",
        "hierarchical:local=4,pad=true"),
}  # fmt: skip


@pytest.mark.parametrize("size", STRATEGIES)
def test_equals_float64_and_sends_what_was_traced(size: int) -> None:
    cases = []
    for strategy in STRATEGIES[size]:
        for heads_q, heads_kv in HEADS:
            turn = len(cases)
            layout = ("contiguous", "zigzag", "dispatch")[turn % 3]
            dtype = ("float32", "bfloat16")[turn % 2]
            mask, value_dim = matrix.MASKS[turn % len(matrix.MASKS)], (0, 5)[turn % 5 == 1]
            queries = 4 if turn % 7 == 3 else matrix.TOKENS
            if queries < matrix.TOKENS:
                mask, layout = "causal", "contiguous"
            cases.append(
                matrix.Combination(
                    strategy, layout, mask, heads_q, heads_kv, dtype, value_dim,
                    nodes=max(size // 2, 1), queries=queries,
                )
            )  # fmt: skip
    ranks = run_ranks(size, matrix.run, cases)
    for case, outcomes in zip(cases, zip(*ranks, strict=True), strict=True):
        assert not outcomes[0].refused, outcomes[0].refused
        assert not matrix.faults(case, list(outcomes), LIMIT)


def world_of(size: int, heads_q: int, heads_kv: int, nodes: int = 0, **changes: Any) -> World:
    tokens = 48
    problem = Problem(
        batch=2, seq_q=tokens, seq_k=tokens, heads_q=heads_q, heads_kv=heads_kv, head_dim=16,
        dtype="bfloat16", **changes,
    )  # fmt: skip
    return World.of(
        problem, masks.build("full", tokens), build_layout("contiguous", tokens, size), nodes
    )


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("heads_q", "heads_kv"), HEADS)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_padding_is_neither_sent_nor_computed(
    heads_q: int, heads_kv: int, size: int, chunks: int
) -> None:
    """The formulas of docs/strategies.md: a rank sends its tokens of the heads of others, and
    the results of its heads to the tokens of others."""
    ranks = traces(f"ulysses:chunks={chunks},pad=true", world_of(size, heads_q, heads_kv))
    head = 2 * (48 // size) * 16 * 2  # bytes of one head of the local tokens
    group = heads_q // heads_kv
    bounds = [rank * heads_q // size for rank in range(size + 1)]
    own_q = [last - first for first, last in itertools.pairwise(bounds)]
    own_kv = [
        len({q // group for q in range(first, last)}) for first, last in itertools.pairwise(bounds)
    ]
    for rank, trace in enumerate(ranks):
        assert trace.phases["fwd"].pairs == own_q[rank] * 48 * 48
        to_others = heads_q - own_q[rank] + 2 * (sum(own_kv) - own_kv[rank])
        assert sent(ranks, "fwd")[rank] == head * (to_others + (size - 1) * own_q[rank])
        back = own_q[rank] + 2 * own_kv[rank]
        assert sent(ranks, "bwd")[rank] == head * (heads_q - own_q[rank] + (size - 1) * back)
    assert max(own_q) == -(-heads_q // size)


@pytest.mark.parametrize("strategy", ["ulysses", "usp:ulysses=4", "hierarchical:local=4"])
def test_where_heads_divide_padding_changes_nothing(strategy: str) -> None:
    world = world_of(8, 24, 2, nodes=4)
    padded = strategy + ("," if ":" in strategy else ":") + "pad=true"
    for plain, padded_trace in zip(traces(strategy, world), traces(padded, world), strict=True):
        assert plain.phases == padded_trace.phases


@pytest.mark.parametrize("heads", HEADS)
def test_hierarchical_still_sends_one_copy_across(heads: tuple[int, int]) -> None:
    world = world_of(8, *heads, nodes=4)
    kv = world.problem.kv_bytes(48 // 8)
    ranks = traces("hierarchical:pad=true", world)
    for phase, times in (("fwd", 1), ("bwd", 3)):
        assert sum(sent_across(ranks, phase, 4)) == 8 * kv * times


def test_repeated_heads_are_in_the_memory_trace() -> None:
    """21 query heads on 2 ranks cut groups of seven: seven of the ten of rank 0 attend to one
    key/value head, three to another, which are repeated as often for the operator."""
    world = world_of(2, 21, 3, head_dim_v=4, direction="fwd")
    assert HeadShares.of(world.problem, 2).attention(world, 0).kv_heads == (0,) * 7 + (1,) * 3
    of_token = (10 + 2 + 10) * 16 + (2 + 10 + 10) * 4  # q, k, repeated; v, repeated, out
    lse = 4 * 2 * 48 * 10
    peak = peak_bytes(implemented("ulysses:pad=true"), operator_info("bands"), world, 0).device
    assert peak == 2 * 48 * of_token * 2 + lse


def test_refusals_name_the_option() -> None:
    reason = implemented("ulysses").unsupported(world_of(4, 10, 5))
    assert reason == (
        "ulysses needs num_heads_q divisible by the ranks that share them: 10 on 4 (with pad=true, "
        "ulysses computes 3 query heads a rank at most)"
    )
    for strategy in ("usp:ulysses=4", "loongtrain:ulysses=4", "hierarchical:local=4"):
        assert "with pad=true" in implemented(strategy).unsupported(world_of(4, 12, 6))
    assert "unless pad = true" in implemented("ulysses:chunks=4").unsupported(world_of(2, 12, 6))
    with pytest.raises(ValueError, match="pad = 2 is not true or false"):
        implemented("ulysses:pad=2")


def test_as_many_ranks_of_a_node_share_heads_as_there_are_heads() -> None:
    for heads, expected in ((10, 8), (7, 4), (3, 2), (1, 1)):
        assert implemented("usp:pad=true").group_size(world_of(16, heads, heads, 8)) == expected


@pytest.mark.parametrize(("heads_q", "heads_kv"), HEADS)
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_chunks_receive_and_return_every_head_once(
    heads_q: int, heads_kv: int, chunks: int
) -> None:
    problem = world_of(4, heads_q, heads_kv).problem
    divided = chunks_of_heads(problem, 4, chunks)
    whole = HeadShares.of(problem, 4)
    for rank in range(4):
        for which in ("received", "returned"):
            heads = [h for chunk in divided for h in range(*getattr(chunk, which)[rank])]
            assert heads == list(range(*whole.kv[rank]))
        assert [h for chunk in divided for h in range(*chunk.q[rank])] == list(
            range(*whole.q[rank])
        )
