"""Recordings of all ranks are replayed together: their messages match, whatever the strategy."""

from __future__ import annotations

import functools

import pytest

from cpbench import masks
from cpbench.core.problem import Problem
from cpbench.core.registry import implementation, operator_info, strategies, strategies_for
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.world import World
from cpbench.simulator.cluster import load
from cpbench.simulator.costs import event_seconds
from cpbench.simulator.recording import record_rank
from cpbench.simulator.replay import replay

SIZE, NODES, TOKENS = 8, 4, 8 * 2048
NAMES = [
    name for name, info in strategies_for("attention").items() if info.traced and name != "single"
]


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_together_and_alone(name: str) -> None:
    """Every rank ends.  Work is even, so peers keep up with each other, except where ranks send and
    receive different amounts at once."""
    mask = masks.build("causal", TOKENS)
    problem = Problem(batch=1, seq_q=TOKENS, seq_k=TOKENS, heads_q=16, heads_kv=8, head_dim=128,
                      dtype="bfloat16")  # fmt: skip
    world = World.of(problem, mask, build_layout("zigzag", TOKENS, SIZE, mask), NODES)
    cluster = load("h100-ib")
    (kernel,) = cluster.kernels
    strategy = implementation(strategies()[name], {})
    recorded = [
        record_rank(strategy, operator_info("flash_attn.3"), world, rank, kernel.tiling)
        for rank in range(SIZE)
    ]
    cost = functools.partial(event_seconds, costs=kernel, cluster=cluster)
    for phase in ("fwd", "bwd"):
        programs = {rank: recorded[rank][phase] for rank in range(SIZE)}
        together, alone = (
            max(one.end for one in replay(programs, cluster, NODES, cost, groups).values())
            for groups in ([], [[rank] for rank in programs])
        )
        uneven = 1.4 if name == "dispatch" else 1.01
        assert 0.99 * alone < together < uneven * alone
