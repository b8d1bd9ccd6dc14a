"""Trace a subset of the ranks of cases: ``python -m cpbench.tools.traffic_ranks``, a subprocess.

Started by ``cpbench.tools.traffic``.  Reads a JSON list of requests from stdin and prints a JSON
list of replies: the communication, work and memory of the requested ranks of each case, or the
reason why its strategy refuses it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpbench.core.problem import Case
from cpbench.core.registry import LoadError
from cpbench.core.subprocess_call import collect_rarely
from cpbench.parallel.tracing.method import load_method
from cpbench.parallel.world import World

if TYPE_CHECKING:
    from cpbench.parallel.tracing.trace import PhaseTrace


def trace_case(case: Case, ranks: Sequence[int], memory_ranks: Sequence[int]) -> dict[str, Any]:
    """Trace ``ranks`` of a case, and the peak memory of the strategy on ``memory_ranks``.

    Raises:
        ValueError: if the strategy cannot run this case.
    """
    from cpbench.parallel.tracing.memory_trace import peak_bytes
    from cpbench.parallel.tracing.trace import count_rank

    strategy, operator, world = load_method(case, World.of_case(case, case.world_size))
    phases = case.direction.split("_")
    peaks = {rank: peak_bytes(strategy, operator, world, rank) for rank in memory_ranks}
    return {
        "area": world.mask.area,
        "local_tokens": world.keys.local_len,
        "ranks": {
            rank: {phase: _phase_row(traced[phase], rank, world) for phase in phases}
            for rank, traced in ((r, count_rank(strategy, operator, world, r)) for r in ranks)
        },
        "buffers": {rank: peak.device for rank, peak in peaks.items()},
        "host_buffers": {rank: peak.host for rank, peak in peaks.items()},
    }


def _phase_row(phase_trace: PhaseTrace, rank: int, world: World) -> dict[str, int]:
    first = rank // world.ranks_per_node * world.ranks_per_node
    same_node = sum(phase_trace.bytes_to[first : first + world.ranks_per_node])
    return {
        "same_node": same_node,
        "across_nodes": sum(phase_trace.bytes_to) - same_node,
        "messages": phase_trace.messages,
        "largest": phase_trace.largest_message,
        "pairs": phase_trace.pairs,
        "to_device": phase_trace.to_device,
        "to_host": phase_trace.to_host,
    }


def main() -> int:
    """Handle the requests from stdin."""
    collect_rarely()
    replies: list[dict[str, Any]] = []
    for request in json.load(sys.stdin):
        case = Case.from_json(request["case"])
        try:
            replies.append(trace_case(case, request["ranks"], request["buffers"]))
        except (ValueError, LoadError) as refusal:
            replies.append({"refused": str(refusal)})
    print(json.dumps(replies))
    return 0


if __name__ == "__main__":
    sys.exit(main())
