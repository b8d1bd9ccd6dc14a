"""Traces of strategies, by their descriptions."""

from __future__ import annotations

from typing import Any

from cpbench.core.registry import implementation, operator_info, strategy_info
from cpbench.core.spec import Spec
from cpbench.parallel.tracing.trace import MODULUS, RankTrace, trace_rank
from cpbench.parallel.world import World


def implemented(strategy: str) -> Any:
    """The strategy of a description such as ``"ulysses:pad=true"``."""
    spec = Spec.parse(strategy)
    return implementation(strategy_info(spec.name), spec.kwargs)


def traces(strategy: str, world: World, log: bool = False) -> list[RankTrace]:
    """The traces of all ranks, whose checksums match; with a log of every message if wanted."""
    made = implemented(strategy)
    assert made.unsupported(world) is None
    operator = operator_info("bands")
    ranks = [trace_rank(made, operator, world, rank, log) for rank in range(world.size)]
    assert sum(trace.checksum for trace in ranks) % MODULUS == 0
    return ranks


def sent(ranks: list[RankTrace], phase: str) -> list[int]:
    """The bytes that every rank sends."""
    return [sum(trace.phases[phase].bytes_to) for trace in ranks]


def sent_across(ranks: list[RankTrace], phase: str, per_node: int) -> list[int]:
    """The bytes that every rank sends to other nodes."""
    across = []
    for rank, trace in enumerate(ranks):
        to, first = trace.phases[phase].bytes_to, rank // per_node * per_node
        across.append(sum(to) - sum(to[first : first + per_node]))
    return across
