"""Traffic: closed formulas, skipped steps, bytes across nodes, and traces of many ranks."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import traced
from traced import sent, sent_across

from cpbench import masks
from cpbench.core.problem import Problem
from cpbench.parallel.comm import Traffic
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.tracing.trace import RankTrace
from cpbench.parallel.world import World
from cpbench.strategies.common import head_shares
from cpbench.strategies.hierarchical import Hierarchical
from cpbench.worker.evaluate import _ranks_per_node

SIZES = (2, 3, 4, 8)


def traces(
    strategy: str,
    mask_text: str = "full",
    layout: str = "contiguous",
    size: int = 4,
    nodes: int = 0,
    placement: str = "",
    tokens: int = 48,
    **changes: Any,
) -> list[RankTrace]:
    """The traces of all ranks, whose checksums match."""
    values = {"batch": 2, "heads_q": 24, "heads_kv": 2, "head_dim": 16, "dtype": "bfloat16"}
    problem = Problem(seq_q=tokens, seq_k=tokens, **{**values, **changes})
    mask = masks.build(mask_text, tokens)
    world = World.of(problem, mask, build_layout(layout, tokens, size, mask), nodes, placement)
    return traced.traces(strategy, world)


def volumes(size: int, heads_kv: int = 2, tokens: int = 48) -> tuple[int, int, int]:
    """The bytes of the local queries, of the local keys and values, and of a float32 per local
    query and head."""
    problem = Problem(
        batch=2, seq_q=tokens, seq_k=tokens, heads_q=24, heads_kv=heads_kv, head_dim=16,
        dtype="bfloat16",
    )  # fmt: skip
    local = tokens // size
    return problem.q_bytes(local), problem.kv_bytes(local), 4 * 2 * local * 24


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_document", "striped"])
@pytest.mark.parametrize("strategy", ["ring", "distflash", "ring_allgather"])
def test_strategies_that_send_keys(strategy: str, size: int, layout: str) -> None:
    _, kv, _ = volumes(size)
    n = size - 1
    ranks = traces(strategy, layout=layout, size=size)
    assert sent(ranks, "fwd") == [n * kv] * size
    assert sent(ranks, "bwd") == [n * kv + n * kv * 4 // 2] * size  # keys again, float32 gradients


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "dispatch"])
@pytest.mark.parametrize("stages", [0, 1, 3])
def test_dispatch_sends_visible_keys(stages: int, layout: str, size: int) -> None:
    """A full mask requires all keys, a causal one with contiguous layout half of them."""
    _, kv, _ = volumes(size)
    n = size - 1
    ranks = traces(f"dispatch:stages={stages}", layout=layout, size=size)
    assert sent(ranks, "fwd") == [n * kv] * size
    assert sent(ranks, "bwd") == [n * kv + n * kv * 4 // 2] * size
    causal = traces(f"dispatch:stages={stages}", "causal", layout="contiguous", size=size)
    assert sent(causal, "fwd") == [(n - rank) * kv for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_a_reversed_ring_sends_one_block_less(size: int) -> None:
    _, kv, _ = volumes(size)
    n = size - 1
    ranks = traces("ring_reverse", layout="zigzag", size=size)
    assert sent(ranks, "fwd") == [n * kv] * size
    assert sent(ranks, "bwd") == [(n - 1) * kv + n * kv * 4 // 2] * size
    plain = traces("ring", "causal", size=size)  # contiguous: not every rank needs every block
    assert sent(traces("ring_reverse", "causal", size=size), "bwd") == sent(plain, "bwd")


@pytest.mark.parametrize("size", SIZES)
def test_gradients_in_bfloat16_halve_their_traffic(size: int) -> None:
    _, kv, _ = volumes(size)
    ranks = traces("ring:grad_dtype=bfloat16", size=size)
    assert sent(ranks, "bwd") == [2 * (size - 1) * kv] * size


MLA = {"head_dim": 24, "head_dim_v": 16}


@pytest.mark.parametrize("size", [2, 4])
def test_values_of_another_head_dim(size: int) -> None:
    """q, dq and keys have 24 elements a head, out, dout and values 16."""
    tokens = 48 // size
    q, out, k, v = (2 * 2 * tokens * h for h in (24 * 24, 24 * 16, 2 * 24, 2 * 16))
    per_query, n = 4 * 2 * tokens * 24, size - 1
    for strategy in ("ring", "distflash", "ring_allgather"):
        ranks = traces(strategy, size=size, **MLA)
        assert sent(ranks, "fwd") == [n * (k + v)] * size
        assert sent(ranks, "bwd") == [n * 3 * (k + v)] * size  # float32 gradients of 16 bits
    ranks = traces("burst", size=size, **MLA)
    assert sent(ranks, "bwd") == [n * (q + out + 2 * per_query) + n * 2 * q] * size
    replicas = max(2, size) // 2
    ranks = traces("ulysses", "causal", size=size, **MLA)
    exchanged = (q + out + replicas * (k + v)) * n // size
    assert sent(ranks, "fwd") == sent(ranks, "bwd") == [exchanged] * size
    assert ranks[0].phases["fwd"].messages == 2 * n  # q, k and v together, then out
    ranks = traces(f"tile:rows={size}", size=size, **MLA)
    assert sent(ranks, "fwd") == [n * (q + out + per_query)] * size


@pytest.mark.parametrize("stages", [1, 2])
def test_stages_of_all_gather_send_the_same(stages: int) -> None:
    _, kv, _ = volumes(4)
    ranks = traces(f"ring_allgather:stages={stages}")
    assert sent(ranks, "fwd") == [3 * kv] * 4
    assert ranks[0].phases["fwd"].messages == stages * 2 * 3
    assert ranks[0].phases["fwd"].largest_message == kv // 2 // stages


@pytest.mark.parametrize("size", [2, 4, 8])  # two heads on three ranks are refused
@pytest.mark.parametrize("chunks", [1, 3])
def test_ulysses(size: int, chunks: int) -> None:
    q, kv, _ = volumes(size)
    replicated = kv * max(2, size) // 2  # two key/value heads on P ranks
    ranks = traces(f"ulysses:chunks={chunks}", "causal", size=size)
    assert sent(ranks, "fwd") == [(2 * q + replicated) * (size - 1) // size] * size
    assert sent(ranks, "bwd") == sent(ranks, "fwd")


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("strategy", ["usp:ulysses={}", "loongtrain:ulysses={},window=2"])
def test_usp_and_loongtrain(strategy: str, ulysses: int, ring: int) -> None:
    size = ulysses * ring
    q, kv, _ = volumes(size)
    kv = kv * max(2, ulysses) // 2
    ranks = traces(strategy.format(ulysses), size=size)
    exchange = (2 * q + kv) * (ulysses - 1) // ulysses
    assert sent(ranks, "fwd") == [exchange + (ring - 1) * kv] * size
    assert sent(ranks, "bwd") == [exchange + 3 * (ring - 1) * kv] * size


@pytest.mark.parametrize("window", [1, 2, 4, 8])
def test_a_double_ring_sends_as_much_as_a_ring_and_less_across_nodes(window: int) -> None:
    _, kv, _ = volumes(8)
    ranks = traces(f"ring:window={window}", size=8, nodes=window)
    assert sent(ranks, "fwd") == [7 * kv] * 8
    assert sent(ranks, "bwd") == [3 * 7 * kv] * 8
    across = sent_across(ranks, "fwd", window)
    assert (
        across == [(8 // window - 1) * kv] * 8
    )  # the keys of a window are sent once to each other window


@pytest.mark.parametrize("size", SIZES)
def test_burst_sends_queries_in_the_backward_pass(size: int) -> None:
    q, kv, row = volumes(size)
    n = size - 1
    ranks = traces("burst", size=size)
    assert sent(ranks, "fwd") == [n * kv] * size
    assert sent(ranks, "bwd") == [n * (2 * q + 2 * row + 2 * q)] * size  # dq in float32


def test_burst_sends_less_for_mha_and_more_under_gqa() -> None:
    ratio = {}
    for heads_kv in (64, 8):
        shape = {"heads_q": 64, "heads_kv": heads_kv, "head_dim": 128, "batch": 1}
        back = {
            s: sent(traces(s, size=64, tokens=4096, **shape), "bwd")[0] for s in ("burst", "ring")
        }
        ratio[heads_kv] = back["burst"] / back["ring"]
    assert ratio[64] < 0.7
    assert ratio[8] > 5


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (2, 2), (4, 1), (2, 4)])
def test_tile(rows: int, columns: int) -> None:
    size = rows * columns
    q, kv, row = volumes(size)
    ranks = traces(f"tile:rows={rows}", size=size)
    assert sent(ranks, "fwd") == [(rows - 1) * (2 * q + row) + (columns - 1) * kv] * size
    back = (rows - 1) * (2 * q + 2 * row + 2 * q) + (columns - 1) * (kv + 2 * kv)
    assert sent(ranks, "bwd") == [back] * size


def test_tile_traffic_grows_with_the_root_of_the_ranks() -> None:
    volume = {}
    for size in (16, 64):
        ranks = traces("tile", size=size, tokens=64 * size, heads_q=16, heads_kv=16)
        volume[size] = sent(ranks, "fwd")[0]
    assert volume[64] / volume[16] < 2.5  # a ring's grows 63 / 15 times


@pytest.mark.parametrize("size", SIZES)
def test_tree_sends_queries_only(size: int) -> None:
    q, _, row = volumes(size)
    n = size - 1
    ranks = traces("tree", size=size)
    # Queries to all; the largest lse by all-reduce; numerator and denominator in float32.
    assert sent(ranks, "fwd") == [n * q + 2 * n * row + n * (2 * q + row)] * size
    assert sent(ranks, "bwd") == [n * (2 * q + 2 * row) + n * 2 * q] * size


@pytest.mark.parametrize(("nodes", "copies"), [(2, 1), (4, 2), (8, 4)])
def test_hierarchical_sends_one_copy_of_the_keys_across(nodes: int, copies: int) -> None:
    size = 8
    _, kv, _ = volumes(size)
    for strategy, sent_copies in (("hierarchical", 1), (f"usp:ulysses={nodes}", copies)):
        ranks = traces(strategy, size=size, nodes=nodes)
        for phase, times in (("fwd", 1), ("bwd", 3)):
            across = sent_across(ranks, phase, nodes)
            assert across == [(size // nodes - 1) * kv * sent_copies * times] * size


def test_placement_decides_what_crosses_nodes() -> None:
    crossing = {}
    for placement in ("", "ring"):
        ranks = traces("usp:ulysses=4", size=16, nodes=4, placement=placement, tokens=256)
        crossing[placement] = sum(sent_across(ranks, "fwd", 4))
        assert len(set(sent(ranks, "fwd"))) == 1
    q, kv, _ = volumes(16, tokens=256)
    assert crossing[""] == 16 * 3 * 2 * kv  # the ring alone, two copies of each head
    assert crossing["ring"] == 16 * (2 * q + 2 * kv) * 3 // 4  # the all-to-all


def test_ring_skips_steps_that_the_mask_leaves_empty() -> None:
    _, kv, _ = volumes(4)
    ranks = traces("ring", "causal")
    # Keys of rank s are sent on to ranks s+1 … 3 only: rank r sends its own and those before.
    assert sent(ranks, "fwd") == [kv, 2 * kv, 3 * kv, 0]
    # Two documents on two ranks each: keys never leave the pair.
    ranks = traces("ring", "causal_document:doc_lens=[24,24]")
    assert sent(ranks, "fwd") == [kv, 0, kv, 0]
    # The gradient of a pair's keys returns in one hop, in float32.
    assert sent(ranks, "bwd") == [kv, 2 * kv, kv, 2 * kv]


def test_idle_ranks_help_under_distflash() -> None:
    ring, distflash = (
        [trace.phases["fwd"].pairs for trace in traces(s, "causal", size=8, tokens=4096)]
        for s in ("ring", "distflash")
    )
    assert sum(ring) == sum(distflash)
    assert max(ring) / (sum(ring) / 8) == pytest.approx(15 / 8, rel=0.01)
    assert max(distflash) / (sum(distflash) / 8) < 1.2


@functools.cache
def _large(strategy: str) -> tuple[list[RankTrace], float]:
    start = time.process_time()
    ranks = traces(
        strategy, "causal_document:corpus=prolong64k,seed=0", "zigzag", size=128, nodes=8,
        tokens=1 << 20, heads_q=64, heads_kv=8, head_dim=128, batch=1,
    )  # fmt: skip
    return ranks, time.process_time() - start


@pytest.mark.parametrize("strategy", ["ring", "usp", "tile", "distflash"])
def test_traces_of_many_ranks_cover_the_whole_area(strategy: str) -> None:
    ranks, _ = _large(strategy)
    mask = masks.build("causal_document:corpus=prolong64k,seed=0", 1 << 20)
    assert sum(trace.phases["fwd"].pairs for trace in ranks) == 64 * mask.area


def _world(size: int, ranks_per_node: int) -> World:
    tokens = 64 * size
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=24, heads_kv=12, head_dim=8, dtype="float32"
    )
    mask = masks.build("full", tokens)
    return World.of(problem, mask, build_layout("contiguous", tokens, size), ranks_per_node)


def test_the_last_node_may_have_fewer_ranks() -> None:
    """12 ranks on nodes of 8: bytes across nodes by hand, groups of heads inside nodes."""
    world = _world(12, 8)
    sent = [Traffic(12) for _ in range(12)]
    for rank, traffic in enumerate(sent):
        traffic.add((rank + 1) % 12, 100)
    across = [traffic.bytes_across_nodes(rank, 8) for rank, traffic in enumerate(sent)]
    assert across == [100 if rank in (7, 11) else 0 for rank in range(12)]
    size = head_shares.group_size(world, 0, pad=False)
    assert size == 4  # 6 divides the ranks, but would put a group on two nodes
    assert head_shares.group_size(_world(16, 8), 0, pad=False) == 4
    refusal = Hierarchical().unsupported(world)
    assert refusal is not None
    assert "equally many ranks on every node, not 12 ranks on nodes of 8" in refusal
    assert Hierarchical(local=4).unsupported(world) is None


def test_ranks_per_node_from_the_sizes_of_nodes() -> None:
    assert _ranks_per_node([8] * 16) == 8
    assert _ranks_per_node([8] * 8 + [4] * 4) == 8
    assert _ranks_per_node([4] * 4 + [8] * 8) == 1
    assert _ranks_per_node([2, 2, 3, 3, 3]) == 1
