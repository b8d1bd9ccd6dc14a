"""Predicted times of cases: ``python -m cpbench.simulator.prediction``, a subprocess.

All ranks of a small world are recorded, or their recordings read, and replayed together on the
links of the cluster; of a large one, representatives are, each alone, or, where the ranks of a node
share its links, with the others of its node.  Reads a request from stdin, the case and the name of
the cluster, and prints the reply.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import value_dims_refusal
from cpbench.core.problem import Case
from cpbench.core.registry import LoadError, operator_info, strategy_info
from cpbench.core.subprocess_call import collect_rarely
from cpbench.masks.head_masks import per_head
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.strategy import untraced_reason
from cpbench.parallel.tracing import method
from cpbench.parallel.world import World
from cpbench.simulator import memory
from cpbench.simulator.cluster import Cluster, load
from cpbench.simulator.costs import event_seconds
from cpbench.simulator.events import Program
from cpbench.simulator.recordings import cached, cached_value, content_key
from cpbench.simulator.replay import RankTimes, replay
from cpbench.simulator.representatives import representative_nodes, representatives
from cpbench.simulator.tiles import Tiling
from cpbench.simulator.timeline import timeline

if TYPE_CHECKING:
    from cpbench.parallel.strategy import Strategy
    from cpbench.parallel.tracing.traced_operator import Traceable

TOGETHER = 32  # ranks of which all are recorded and replayed together
FAR = 4  # times what was calibrated, from where on a prediction is an extrapolation


def predict(
    case: Case, cluster: Cluster, trace: bool = False, world: World | None = None
) -> dict[str, Any]:
    """The predicted time and memory of a case, as ``cpbench predict --json`` prints it.

    Args:
        trace: whether to add ``trace``, a timeline of the simulated ranks for Perfetto.
        world: that of the case, if it is known.

    Raises:
        ValueError: if the strategy does not take the case, or it was not calibrated; in one line.
    """
    kernel = cluster.kernel(case.operator.name, case.dtype, case.head_dim)
    world = world or World.of_case(case, cluster.gpus_per_node)
    strategy, operator, world = load_method(case, world, cluster)
    offloaded = strategy_info(case.strategy.name).is_offloaded(case.strategy.kwargs)
    counts = chosen = representatives(world)
    groups = [[rank] for rank in counts]
    mixes = isinstance(operator, BoundOperator)  # each rank is recorded in milliseconds
    if world.size <= TOGETHER or mixes:
        counts, groups = dict.fromkeys(range(world.size), 1), []
    elif cluster.shares_links(world.ranks_per_node, offloaded):
        counts = chosen = representative_nodes(world)
        groups = _by_node(counts, world.ranks_per_node)
    programs = record(case, world, strategy, operator, kernel.tiling, counts)
    in_memory = {rank: programs[rank] for rank in chosen}
    if world.size > TOGETHER:
        largest = memory.likely_largest(in_memory, world.ranks_per_node)
        in_memory = {rank: programs[rank] for rank in largest}
    cost = functools.partial(event_seconds, costs=kernel, cluster=cluster)
    phases, times_by_phase = {}, {}
    for phase, flops in problem_flops(operator, world).items():
        if phase not in case.direction.split("_"):
            continue
        of_phase = {rank: programs[rank][phase] for rank in counts}
        times = replay(of_phase, cluster, world.ranks_per_node, cost, groups)
        times_by_phase[phase] = times
        phases[phase] = _phase(times, counts, flops / world.size, cluster)
    facts = {"case": case.label, "cluster": f"{cluster.name} ({cluster.digest})", "simulated": True}
    return {
        **({"trace": timeline(times_by_phase, kernel, cluster.name, facts)} if trace else {}),
        "cluster": cluster.name,
        "cluster_hash": cluster.digest,
        "operator": str(case.operator),
        "ranks": list(counts),
        "warnings": warnings(case, world, cluster),
        "phases": phases,
        "memory": memory.summary(
            needs(case, world, strategy, operator, kernel.tiling, in_memory), cluster
        ),
    }


def load_method(case: Case, world: World, cluster: Cluster) -> tuple[Strategy, Traceable, World]:
    """The strategy and the operator of a case, and its world with the inputs of that operator.

    Raises:
        ValueError: if the case is not predicted, one of them does not take it, or it takes links
            that the cluster lacks.
    """
    info, operator = strategy_info(case.strategy.name), operator_info(case.operator.name)
    if not info.traced:
        raise ValueError(f"{untraced_reason(info)}; so its time is not predicted")
    if case.page_size:
        raise ValueError(
            "the time of decoding is not predicted: no cluster is calibrated for it; cpbench "
            "traffic says what is sent"
        )
    if operator.selects:
        raise ValueError(f"{operator.name} selects by the data, so its work is not known before")
    if per_head(world.mask):
        raise ValueError("a mask that differs from head to head is not predicted")
    if info.is_offloaded(case.strategy.kwargs) and cluster.host is None:
        raise ValueError(
            f"cluster {cluster.name} has no [links.host], which the copies of {case.strategy} take"
        )
    strategy, traceable, world = method.load_method(case, world)
    if reason := value_dims_refusal(operator, world.problem):
        raise ValueError(reason)
    return strategy, traceable, world


def problem_flops(operator: Traceable, world: World) -> dict[str, int]:
    """FLOPs by phase, all ranks together."""
    if isinstance(operator, BoundOperator):
        flops: dict[str, int] = operator.impl.flops(world.problem)  # type: ignore[attr-defined]
        return flops
    return world.problem.flops(world.mask.area)


def record(
    case: Case, world: World, strategy: Strategy, operator: Traceable, tiling: Tiling,
    ranks: Iterable[int],
) -> dict[int, dict[str, Program]]:  # fmt: skip
    """The recordings of some ranks."""

    def record_one(rank: int) -> dict[str, Program]:
        from cpbench.simulator.recording import record_rank

        return record_rank(strategy, operator, world, rank, tiling)

    return {
        rank: cached(
            content_key(case, world, tiling, rank), functools.partial(record_one, rank)
        )
        for rank in ranks
    }  # fmt: skip


def needs(
    case: Case, world: World, strategy: Strategy, operator: Traceable, tiling: Tiling,
    programs: Mapping[int, Mapping[str, Program]],
) -> dict[int, memory.Need]:  # fmt: skip
    """The memory that ranks need, from their recordings."""
    offloaded = strategy_info(case.strategy.name).is_offloaded(case.strategy.kwargs)

    def of_rank(rank: int) -> memory.Need:
        return memory.need(strategy, operator, world, rank, programs[rank], offloaded)

    return {
        rank: cached_value(
            f"{content_key(case, world, tiling, rank)}-memory", functools.partial(of_rank, rank),
            asdict, lambda values: memory.Need(**values),
        )
        for rank in programs
    }  # fmt: skip


def _by_node(ranks: Iterable[int], per_node: int) -> list[list[int]]:
    """The ranks of each node."""
    return [list(group) for _, group in itertools.groupby(sorted(ranks), lambda r: r // per_node)]


def _phase(
    times: dict[int, RankTimes], counts: dict[int, int], flops: float, cluster: Cluster
) -> dict[str, Any]:
    """The result of one phase: that of its slowest rank, and how even the work is."""
    slowest = max(times, key=lambda rank: (times[rank].end, -rank))
    one = times[slowest]
    mean = sum(times[rank].end * n for rank, n in counts.items()) / sum(counts.values())
    error = cluster.calibrated.percentile_90_error
    return {
        "seconds": one.end,
        "low": one.end / (1 + error),
        "high": one.end * (1 + error),
        "tflops_per_gpu": flops / one.end / 1e12 if one.end else None,
        "breakdown": {"attention": one.attention, "side": one.side, "exposed": one.exposed},
        "slowest_rank": slowest,
        "imbalance": one.end / mean if mean else None,
    }


def warnings(case: Case, world: World, cluster: Cluster) -> list[str]:
    """In how far a case is beyond what the cluster was calibrated on."""
    known, lines = cluster.calibrated, []
    for name, value, most in (
        ("ranks", case.world_size, known.ranks),
        ("tokens per rank", world.keys.local_len, known.tokens),
    ):
        if value > FAR * most:
            lines.append(
                f"extrapolated: {value:,} {name}, more than {FAR} times the {most:,} that "
                f"{cluster.name} was calibrated on"
            )
    return lines


def main() -> int:
    """Answer the request from stdin."""
    collect_rarely()
    request = json.load(sys.stdin)
    try:
        case, cluster = Case.from_json(request["case"]), load(request["cluster"])
        reply = predict(case, cluster, request.get("trace", False))
    except (ValueError, LoadError, OSError) as refusal:
        print(refusal, file=sys.stderr)
        return 2
    print(json.dumps(reply))
    return 0


if __name__ == "__main__":
    sys.exit(main())
