"""Dispatch by node: every key crosses once per node, and so do its gradients."""

from __future__ import annotations

import itertools

import matrix
import numpy as np
import pytest
import traced
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from cpbench import masks
from cpbench.core.problem import Problem
from cpbench.core.registry import implementation, strategy_info
from cpbench.core.spec import Spec
from cpbench.parallel.kv_requirements import KeyTransfers, required_transfers
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.tracing.trace import RankTrace
from cpbench.parallel.world import World
from cpbench.strategies.dispatch.relays import GroupCast, plan_transfers

LIMIT = {"float32": 2e-6, "bfloat16": 1.2e-2}
LAYOUTS = strategy_info("dispatch").layouts


def combinations(ranks_per_node: tuple[int, ...]) -> list[matrix.Combination]:
    """Every other mask, with layouts, shapes and numbers of stages in turn."""
    texts = ("by=node", "by=node,stages=1", "by=node,stages=3", "by=node,grad_dtype=bfloat16")
    text, layout, shape = (itertools.cycle(x) for x in (texts, LAYOUTS, matrix.SHAPES))
    return [
        matrix.Combination(f"dispatch:{next(text)}", next(layout), mask, *next(shape), nodes=nodes)
        for nodes in ranks_per_node
        for mask in matrix.MASKS[nodes % 2 :: 2]
    ]


@pytest.mark.parametrize(("size", "ranks_per_node"), [(3, (2,)), (5, (2, 3, 4))])
def test_equals_float64_where_the_last_node_has_fewer_ranks(
    size: int, ranks_per_node: tuple[int, ...]
) -> None:
    cases = combinations(ranks_per_node)
    outcomes = zip(*run_ranks(size, matrix.run, cases), strict=True)
    faults = [
        fault
        for case, ranks in zip(cases, outcomes, strict=True)
        for fault in matrix.faults(case, list(ranks), LIMIT)
    ]
    assert not faults, "\n".join(faults)
    if size > 3:
        casts = [plan_transfers(matrix.world_of(case, size), 2, True) for case in cases]
        assert any(len(cast.passing.length) for cast in casts)
        assert any(len(cast.relayed.length) for cast in casts)


def keys_of(transfers: KeyTransfers) -> list[tuple[int, int]]:
    """All (receiver, key)."""
    runs = zip(*(x.tolist() for x in (transfers.receiver, *transfers[3:5])), strict=True)
    return [(receiver, key) for receiver, start, n in runs for key in range(start, start + n)]


def check(world: World, cast: GroupCast) -> None:
    """Every rank gets the keys that it needs, once, from who has them; every node gets a key once,
    and no rank more than the mean rank of the node that receives most."""
    nodes, required = (
        world.ranks_per_node,
        required_transfers(world.shared_mask, world.queries, world.keys),
    )
    needed = [*keys_of(cast.direct), *keys_of(cast.across), *keys_of(cast.relayed)]
    assert sorted(needed) == sorted(keys_of(required))
    outside = required.select(np.flatnonzero(required.receiver // nodes != required.owner // nodes))
    crossing = [*keys_of(cast.across), *keys_of(cast.passing)]
    assert sorted((rank // nodes, key) for rank, key in crossing) == sorted(
        {(rank // nodes, key) for rank, key in keys_of(outside)}
    )
    received = np.bincount([rank for rank, _ in crossing], minlength=world.size)
    in_node = [received[i : i + nodes] for i in range(0, world.size, nodes)]
    assert received.max() <= np.ceil(max(x.mean() for x in in_node))
    for transfers in (cast.direct, cast.across, cast.passing):  # local tokens of the owner
        for owner, start, n, local in zip(*(x.tolist() for x in transfers[2:]), strict=True):
            assert world.keys.positions(owner)[local : local + n].tolist() == [
                *range(start, start + n)
            ]
    for stage, relay in {
        *zip(cast.relayed.stage.tolist(), cast.relayed.owner.tolist(), strict=True)
    }:
        held = [
            key
            for x in (cast.passing, cast.across)
            for _, key in keys_of(
                x.select(np.flatnonzero((x.stage == stage) & (x.receiver == relay)))
            )
        ]
        sent = (cast.relayed.stage == stage) & (cast.relayed.owner == relay)
        relayed = cast.relayed.select(np.flatnonzero(sent))
        assert (relayed.receiver // nodes == relay // nodes).all()
        for start, n, local in zip(*(x.tolist() for x in relayed[3:]), strict=True):
            assert held[local : local + n] == [*range(start, start + n)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(2, 12), st.integers(2, 5),
    st.sampled_from(LAYOUTS), st.sampled_from(["causal_document", "full_document"]),
    st.integers(0, 4),
)  # fmt: skip
def test_every_rank_gets_its_keys_and_every_node_gets_them_once(
    lengths: list[int], size: int, ranks_per_node: int, layout: str, kind: str, stages: int
) -> None:
    world = world_of(f"{kind}:doc_lens={lengths}", sum(lengths), size, ranks_per_node, layout)
    check(world, plan_transfers(world, stages, True))


def world_of(
    mask_text: str, tokens: int, size: int, ranks_per_node: int, layout: str = "contiguous"
) -> World:
    problem = Problem(batch=1, seq_q=tokens, seq_k=tokens, heads_q=2, heads_kv=1, head_dim=8,
                      dtype="bfloat16")  # fmt: skip
    mask = masks.build(Spec.parse(mask_text), tokens)
    return World.of(problem, mask, build_layout(layout, tokens, size, mask), ranks_per_node)


def traces(strategy: str, world: World) -> list[RankTrace]:
    return traced.traces(strategy, world, log=True)


def bytes_across(ranks: list[RankTrace], world: World) -> dict[str, int]:
    """Bytes between nodes of keys and of gradients, from the logs of all ranks."""
    total: dict[str, int] = {}
    for sender, receiver, _, nbytes, what, side in (
        entry[1:] for trace in ranks for entry in trace.log if entry[0] == "message"
    ):
        if side == "sent" and sender // world.ranks_per_node != receiver // world.ranks_per_node:
            total[what.split()[0]] = total.get(what.split()[0], 0) + nbytes
    counted = sum(
        trace.phases[phase].bytes_to[receiver]
        for rank, trace in enumerate(ranks)
        for phase in ("fwd", "bwd")
        for receiver in range(world.size)
        if rank // world.ranks_per_node != receiver // world.ranks_per_node
    )
    assert sum(total.values()) == counted
    return total


KV = 2 * 8 * 2  # bytes of a key and a value


@pytest.mark.parametrize(("size", "ranks_per_node"), [(8, 4), (8, 2), (6, 4), (5, 3)])
@pytest.mark.parametrize("stages", [0, 1, 3])
def test_a_full_mask_sends_every_key_once_to_every_other_node(
    size: int, ranks_per_node: int, stages: int
) -> None:
    tokens = 24 * size
    world = world_of("full", tokens, size, ranks_per_node)
    nodes = -(-size // ranks_per_node)
    by_node = bytes_across(traces(f"dispatch:stages={stages},by=node", world), world)
    sent = (nodes - 1) * tokens * KV
    assert by_node == {"keys": 2 * sent, "results": 2 * sent}  # two passes; gradients in float32
    by_rank = bytes_across(traces(f"dispatch:stages={stages}", world), world)
    in_node = [min(size - i, ranks_per_node) for i in range(0, size, ranks_per_node)]
    copies = sum(ranks * (size - ranks) for ranks in in_node)  # of one rank's keys
    assert by_rank == {"keys": 2 * copies * 24 * KV, "results": 2 * copies * 24 * KV}


@pytest.mark.parametrize("size", [4, 6, 7])
def test_no_mask_sends_more_across_nodes_than_by_rank(size: int) -> None:
    for text, layout, nodes in itertools.product(matrix.MASKS[::2], LAYOUTS[1::2], (2, 3)):
        world = world_of(text, matrix.TOKENS, size, nodes, layout)
        by_rank, by_node = (
            bytes_across(traces(strategy, world), world)
            for strategy in ("dispatch", "dispatch:by=node")
        )
        required = required_transfers(world.shared_mask, world.queries, world.keys)
        crossing = {
            (rank // nodes, key)
            for rank, key in keys_of(
                required.select(
                    np.flatnonzero(required.receiver // nodes != required.owner // nodes)
                )
            )
        }
        assert by_node.get("keys", 0) == 2 * len(crossing) * KV <= by_rank.get("keys", 0)
        assert by_node.get("results", 0) == 2 * len(crossing) * KV <= by_rank.get("results", 0)


@pytest.mark.parametrize("ranks_per_node", [0, 1, 4])
def test_one_node_and_one_rank_per_node_are_as_by_rank(ranks_per_node: int) -> None:
    world = world_of("causal", 96, 4, ranks_per_node, "zigzag")
    assert traces("dispatch:by=node", world) == traces("dispatch", world)


def test_ranks_of_equal_position_exchange_keys() -> None:
    """A full mask: one message from every rank to each other node, to the rank in its position."""
    world = world_of("full", 160, 16, 4)
    cast = plan_transfers(world, 1, True)
    assert (cast.across.owner % 4 == cast.across.receiver % 4).all()
    assert len(cast.across.length) == 16 * 3
    assert not len(cast.passing.length)


def test_other_values_of_by_are_refused() -> None:
    with pytest.raises(ValueError, match="dispatch: by = 'host' is not rank or node"):
        implementation(strategy_info("dispatch"), {"by": "host"})
