"""Subproblems as operators receive them: cropped to the rectangle of visible pairs."""

from __future__ import annotations

import naive
import pytest
import torch
from threads import ThreadComm, run_threads

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.operator import QKV
from cpbench.core.problem import Problem
from cpbench.parallel import layout as layouts
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.world import World

TOKENS = 64


def _world(layout: str, mask_text: str = "causal", size: int = 4) -> World:
    problem = Problem(
        batch=2, seq_q=TOKENS, seq_k=TOKENS, heads_q=4, heads_kv=2, head_dim=16, dtype="float32"
    )
    mask = masks.build(mask_text, TOKENS)
    return World.of(problem, mask, layouts.build(layout, TOKENS, size, mask))


@pytest.mark.parametrize(
    ("layout", "ranks", "crop", "kind"),
    [
        ("zigzag", (2, 1), (0, 16, 0, 8), "full"),  # all queries see the first half of the keys
        ("zigzag", (1, 2), (8, 16, 0, 16), "full"),  # the second half sees all
        ("zigzag", (1, 1), None, "causal"),
        ("striped", (1, 2), (1, 16, 0, 15), "causal"),  # strictly causal
        ("contiguous", (2, 1), None, "full"),
    ],
)
def test_a_step_of_a_causal_ring_is_native_to_any_flash_operator(
    layout: str, ranks: tuple[int, int], crop: tuple[int, ...] | None, kind: str
) -> None:
    subproblem = _world(layout).subproblem([ranks[0]], [ranks[1]])
    planned = BoundOperator.load("sdpa.cpu_flash", "cpu").prepare(subproblem)
    assert planned.crop == crop
    hull = subproblem.mask.hull
    assert subproblem.mask.crop(*hull).kind == kind
    assert subproblem.mask.crop(*hull).area == subproblem.area == planned.area


@pytest.mark.parametrize("strategy", ["ring", "burst", "distflash", "tile:rows=2", "tree"])
@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
@pytest.mark.parametrize("operator", ["sdpa.cpu_flash", "bands"])
def test_cropped_partial_results_add_up(strategy: str, layout: str, operator: str) -> None:
    world = _world(layout)
    inputs = naive.random_inputs(2, TOKENS, 4, 2, 16, torch.float32)
    expected = naive.attention(*inputs, world.mask)

    def rank(comm: ThreadComm) -> tuple[torch.Tensor, ...]:
        work = Attention(operator, strategy, world, comm.rank, "cpu")
        q, k, v, dout = (world.keys.shard(x, comm.rank) for x in inputs)
        out, lse, saved = work.forward(QKV(q, k, v), comm)
        return (out, lse.transpose(1, 2), *work.backward(dout, saved, comm))

    for name, shards in zip(naive.TENSORS, zip(*run_threads(4, rank), strict=True), strict=True):
        result = world.keys.unshard(list(shards))
        result = result.transpose(1, 2) if name == "lse" else result
        assert naive.error(result, expected[name]) < 2e-6, name
