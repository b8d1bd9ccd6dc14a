"""What a run refuses by declaration, traffic and predictions refuse too, in the same words."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from cpbench.api import Attention
from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.parallel.world import World
from cpbench.simulator.cluster import load
from cpbench.simulator.prediction import load_method
from cpbench.simulator.recording import record_rank
from cpbench.simulator.tiles import Tiling
from cpbench.tools.traffic_ranks import trace_case

CLUSTER, NO_TILES = load("h100-ib"), Tiling((16, 16), (16, 16), "mask")
SIZE = 2


def case(**fields: Any) -> Case:
    values = {"operator": "bands", "strategy": "ring", "layout": "zigzag", "mask": "causal",
              "dtype": "bfloat16", **fields}  # fmt: skip
    specs = {key: Spec.parse(values.pop(key)) for key in ("operator", "strategy", "layout", "mask")}
    sizes = {"seq_len": 96, "world_size": SIZE, "num_heads_q": 4, "num_heads_kv": 4, "head_dim": 16}
    return Case(**specs, **{**sizes, **values})


def of_run(one: Case) -> str:
    """Why a run refuses it; "" if it does not."""
    world = World.of_case(one, SIZE)
    try:
        for rank in range(SIZE):
            Attention(one.operator, one.strategy, world, rank, "cpu")
    except ValueError as refusal:
        return str(refusal)
    return ""


def of_traffic(one: Case) -> str:
    try:
        trace_case(one, range(SIZE), [0])
    except ValueError as refusal:
        return str(refusal)
    return ""


def of_prediction(one: Case) -> str:
    try:
        strategy, operator, world = load_method(one, World.of_case(one, SIZE), CLUSTER)
        for rank in range(SIZE):
            record_rank(strategy, operator, world, rank, NO_TILES)
    except ValueError as refusal:
        return str(refusal)
    return ""


REFUSED = {
    "local mask": {"operator": "dilated", "strategy": "ring_allgather", "mask": "causal",
                   "layout": "contiguous"},
    "head_dim": {"head_dim": 512},
    "no lse": {"operator": "dilated"},
    "heads": {"strategy": "ulysses", "num_heads_q": 3, "num_heads_kv": 3},
    "placement": {"placement": "ulysses"},
    "layout": {"operator": "ssd", "strategy": "scan", "layout": "striped"},
    "mixer": {"operator": "ssd"},
    "attention": {"strategy": "scan"},
    "heads of a mixer": {"operator": "ssd", "strategy": "scan", "num_heads_kv": 2},
    "mask of a mixer": {"operator": "ssd", "strategy": "ulysses", "mask": "full"},
    "offloaded mixer": {"operator": "ssd", "strategy": "ulysses:offload=host"},
}  # fmt: skip
SELECTORS = {
    "selector": {"operator": "moba"},
    "offloaded selector": {"operator": "moba", "strategy": "ulysses:offload=host"},
}


@pytest.mark.parametrize("name", [*REFUSED, *SELECTORS])
def test_in_the_same_words(name: str) -> None:
    one = case(**{**REFUSED, **SELECTORS}[name])
    reason = of_run(one)
    assert reason
    assert of_traffic(one) == reason
    if name in REFUSED:  # selectors are not predicted at all
        assert of_prediction(one) == reason


@pytest.mark.parametrize("mask", ["causal", "causal_document:doc_lens=[40,56]"])
def test_and_nothing_else(mask: str) -> None:
    for operator, strategy, layout in itertools.product(
        ("bands", "reference", "sdpa.cpu_flash"),
        ("ring", "ulysses", "ring_allgather", "burst", "ulysses:offload=host,chunk=16"),
        ("contiguous", "zigzag"),
    ):
        one = case(operator=operator, strategy=strategy, layout=layout, mask=mask)
        reason = of_run(one)
        assert of_traffic(one) == reason, one.label
        assert of_prediction(one) == reason, one.label
