"""All-gathers of keys: stages of heads and of tokens, keys that are kept, and under ``usp``."""

from __future__ import annotations

import pytest
from traced import implemented, sent, sent_across, traces

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.operator import Unsupported
from cpbench.core.problem import Problem
from cpbench.core.registry import operator_info
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.tracing.memory_trace import peak_bytes
from cpbench.parallel.world import World


def world_of(size: int, nodes: int = 0, layout: str = "contiguous", tokens: int = 96) -> World:
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=8, heads_kv=2, head_dim=16, dtype="bfloat16"
    )
    mask = masks.build("causal", tokens)
    return World.of(problem, mask, build_layout(layout, tokens, size, mask), nodes)


def gradient_bytes(kv: int) -> int:
    return kv * 4 // 2  # float32 instead of bfloat16


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
@pytest.mark.parametrize("keep", [False, True])
def test_stages_send_the_same_in_more_messages(stages: int, keep: bool) -> None:
    world = world_of(4)
    kv = world.problem.kv_bytes(24)
    ranks = traces(f"ring_allgather:stages={stages},keep={str(keep).lower()}", world)
    assert sent(ranks, "fwd") == [3 * kv] * 4
    gathered_again = 0 if keep else 3 * kv
    assert sent(ranks, "bwd") == [gathered_again + 3 * gradient_bytes(kv)] * 4
    assert ranks[0].phases["fwd"].messages == stages * 2 * 3
    area = masks.build("causal", 96).area
    for phase in ("fwd", "bwd"):
        assert sum(trace.phases[phase].pairs for trace in ranks) == 8 * area


def test_stages_of_tokens_bound_memory_where_heads_do_not_suffice() -> None:
    """Two key/value heads: eight stages gather a quarter of the tokens each."""
    world = world_of(8, tokens=4096)
    kv = world.problem.kv_bytes(4096)

    def peak(strategy: str) -> int:
        made = implemented(strategy)
        return max(peak_bytes(made, operator_info("bands"), world, rank).device for rank in (0, 7))

    one, two, eight = (peak(f"ring_allgather:stages={stages}") for stages in (1, 2, 8))
    assert one - two > kv / 2
    assert two - eight > kv / 2
    assert peak("ring_allgather:stages=8,keep=true") >= eight + kv / 2


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("size", "ulysses"), [(4, 2), (8, 2), (8, 4)])
def test_usp_gathers_across_nodes(size: int, ulysses: int, keep: bool) -> None:
    world = world_of(size, nodes=ulysses)
    tokens = 96 // size
    q, kv = world.problem.q_bytes(tokens), world.problem.kv_bytes(tokens)
    replicated = kv * max(2, ulysses) // 2
    strategy = f"usp:inner=allgather,ulysses={ulysses},keep={str(keep).lower()}"
    ranks = traces(strategy, world)
    exchanged = (2 * q + replicated) * (ulysses - 1) // ulysses
    across = (size // ulysses - 1) * replicated
    assert sent(ranks, "fwd") == [exchanged + across] * size
    back = gradient_bytes(across) + (0 if keep else across)
    assert sent(ranks, "bwd") == [exchanged + back] * size
    for phase, bytes_across in (("fwd", across), ("bwd", back)):
        assert sent_across(ranks, phase, ulysses) == [bytes_across] * size


def test_refusals() -> None:
    striped = world_of(4, layout="striped")
    reason = implemented("ring_allgather:stages=3").unsupported(striped)
    assert reason == (
        "ring_allgather: stages = 3 must divide num_heads_kv, 2 on a rank, with the layout "
        "striped; others also divide the tokens"
    )
    assert implemented("ring_allgather:stages=2").unsupported(striped) is None
    with pytest.raises(Unsupported, match="or use stages = 1, which merges nothing"):
        Attention("sdpa.math", "ring_allgather:stages=3", world_of(4), 0, "cpu")
    for wrong, words in (
        ("inner=tree", "inner = 'tree' is not ring or allgather"),
        ("stages=2", "stages and keep are for inner = allgather"),
        ("keep=true", "stages and keep are for inner = allgather"),
        ("inner=allgather,grad_dtype=bfloat16", "grad_dtype = bfloat16 is for inner = ring"),
        ("inner=allgather,stages=0", "stages = 0 must be 1 or more"),
        ("inner=allgather,keep=1", "keep = 1 is not true or false"),
    ):
        with pytest.raises(ValueError, match=words):
            implemented(f"usp:{wrong}")
