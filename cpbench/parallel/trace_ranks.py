"""Trace some ranks of a case: ``python -m cpbench.parallel.trace_ranks``, a subprocess.

Started by ``cpbench.tools.traffic``.

Takes a JSON request on stdin and prints a JSON answer: what each rank of its share would do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from cpbench.core.problem import Case
from cpbench.core.registry import implementation, operator_info, strategy_info
from cpbench.parallel.strategy import declared_refusal
from cpbench.parallel.trace import RankTrace, trace_rank
from cpbench.parallel.world import World


def answer(case: Case, ranks: Sequence[int], for_buffers: Sequence[int]) -> dict[str, Any]:
    """Rows by rank, and the memory that the strategy needs on some ranks.

    Raises:
        ValueError: when the strategy refuses the case.
    """
    from cpbench.parallel.memory_trace import peak_bytes

    world = World.of_case(case, case.world_size)
    info, operator = strategy_info(case.strategy.name), operator_info(case.operator.name)
    if not info.traced:
        raise ValueError(f"{info.name} does its own sending: only a run can count its bytes")
    strategy = implementation(info, case.strategy.kwargs)
    reason = declared_refusal(info, world) or strategy.unsupported(world)
    if reason is not None:
        raise ValueError(reason)
    phases = case.direction.split("_")
    return {
        "area": world.mask.area,
        "local_tokens": world.keys.local_len,
        "ranks": {
            rank: {phase: _row(found, phase, rank, world) for phase in phases}
            for rank, found in ((r, trace_rank(strategy, operator, world, r)) for r in ranks)
        },
        "buffers": {rank: peak_bytes(strategy, operator, world, rank) for rank in for_buffers},
    }


def _row(found: RankTrace, phase: str, rank: int, world: World) -> dict[str, int]:
    seen = found.phases[phase]
    node = rank // world.ranks_per_node * world.ranks_per_node
    same = sum(seen.bytes_to[node : node + world.ranks_per_node])
    return {
        "same_node": same,
        "across_nodes": sum(seen.bytes_to) - same,
        "messages": seen.messages,
        "largest": seen.largest,
        "pairs": seen.pairs,
    }


def main() -> int:
    """One request from stdin; a refusal is one line and exit code 2."""
    request = json.load(sys.stdin)
    try:
        found = answer(Case.from_json(request["case"]), request["ranks"], request["buffers"])
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
