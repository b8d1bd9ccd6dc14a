"""The fastest of many cases: ``python -m cpbench.simulator.recommendation.search``, a subprocess.

The cases are methods for one problem.  Each is bounded from below first; in the order of their
bounds, the rank with the most work is recorded, and if it may be within the interval of the best
time, the others are; until no bound is.  Reads a request, searches of which several processes each
claim one after another, and prints the outcomes of those that it claimed, by number.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from cpbench.core.problem import Case
from cpbench.core.registry import LoadError
from cpbench.core.subprocess_call import collect_rarely
from cpbench.parallel.world import World
from cpbench.simulator.cluster import Cluster, load
from cpbench.simulator.costs import event_seconds
from cpbench.simulator.memory import TOO_LARGE
from cpbench.simulator.prediction import load_method, predict, record
from cpbench.simulator.recommendation.bounds import bound
from cpbench.simulator.replay import replay
from cpbench.simulator.representatives import representatives

PARTS = ("attention", "side", "exposed")


def search(cases: Sequence[Case], cluster: Cluster, everything: bool = False) -> list[Any]:
    """Find the fastest cases.

    Args:
        everything: whether to predict all cases that are not refused.

    Returns:
        for each case a table with ``refused``, the reason; or ``bound`` (seconds, see
        :class:`~cpbench.simulator.recommendation.bounds.Bound`), with ``busiest_rank`` (seconds of
        its parts) if that one was recorded, and with ``phases`` and ``memory`` if the case was
        predicted, see :func:`cpbench.simulator.prediction.predict`.
    """
    outcomes = [_bounded(case, cluster) for case in cases]
    possible = [i for i, outcome in enumerate(outcomes) if "bound" in outcome]
    limit = float("inf")
    for i in sorted(possible, key=lambda i: (outcomes[i]["bound"]["total"], i)):
        least = outcomes[i]["bound"]
        if least["total"] > limit and not everything:
            break
        world = _world(cases[i], cluster.gpus_per_node)
        try:
            if not everything:
                busiest = _one_rank(cases[i], world, cluster)
                if sum(busiest.values()) > limit:
                    outcomes[i]["busiest_rank"] = busiest
                    continue
            prediction = predict(cases[i], cluster, world=world)
        except ValueError as refusal:
            outcomes[i] = {"refused": str(refusal)}
            continue
        outcomes[i] |= prediction
        if prediction["memory"]["verdict"] != TOO_LARGE:
            limit = min(limit, sum(phase["high"] for phase in prediction["phases"].values()))
    return outcomes


def _one_rank(case: Case, world: World, cluster: Cluster) -> dict[str, float]:
    """The parts of the predicted time of the rank with the most work, alone: what it waits for is
    at least as late when all ranks run."""
    kernel = cluster.kernel(case.operator.name, case.dtype, case.head_dim)
    rank = _busiest(world)[0]
    strategy, operator, world = load_method(case, world, cluster)
    programs = record(case, world, strategy, operator, kernel.tiling, [rank])[rank]
    cost = functools.partial(event_seconds, costs=kernel, cluster=cluster)
    times = [
        replay({rank: programs[phase]}, cluster, world.ranks_per_node, cost)[rank]
        for phase in case.direction.split("_")
    ]
    return {part: sum(getattr(one, part) for one in times) for part in PARTS}


@functools.lru_cache(maxsize=64)
def _busiest(world: World) -> list[int]:
    """The representative with the most work, and one of the node with the most, where that has
    more than its own."""
    work, nodes = world.areas.sum(1), world.ranks_per_node
    rank = max(representatives(world), key=lambda rank: (int(work[rank]), -rank))
    starts = range(0, world.size, nodes)
    of_node = {start: int(work[start : start + nodes].sum()) for start in starts}
    first = max(starts, key=lambda start: (of_node[start], -start))
    return [rank] if of_node[rank // nodes * nodes] == of_node[first] else [rank, first]


def _bounded(case: Case, cluster: Cluster) -> dict[str, Any]:
    """The bound of the rank with the most work, or why the case is refused."""
    try:
        world = _world(case, cluster.gpus_per_node)
        strategy, operator, world = load_method(case, world, cluster)
        kernel = cluster.kernel(case.operator.name, case.dtype, case.head_dim)
        least = max(
            (bound(strategy, operator, world, rank, cluster, kernel) for rank in _busiest(world)),
            key=attrgetter("total"),
        )
    except (ValueError, LoadError) as refusal:
        return {"refused": str(refusal)}
    return {"bound": {**asdict(least), "balance": _balance(least.pairs, case, world)}}


def _balance(pairs: int, case: Case, world: World) -> float:
    """The work of a rank over the mean of all."""
    whole = world.mask.area * case.num_heads_q
    return pairs * world.size / whole if whole else 1.0


@functools.lru_cache(maxsize=64)
def _world(case: Case, per_node: int) -> World:
    """The world of a case, which shares layout and areas with those of other strategies."""
    plain = replace(case, strategy=Case.strategy, placement="")
    if case == plain:
        return World.of_case(case, per_node)
    shared = _world(plain, per_node)
    if not case.placement:
        return shared
    assert shared.areas is not None  # computed once, for all placements
    return shared.changed(placement=case.placement)


def _claimed(path: Path) -> bool:
    """Whether this process is the first to make a file."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def main() -> int:
    """Answer the request in the file that stdin names: those of its searches that no other process
    has claimed."""
    collect_rarely()
    request = json.loads(Path(json.load(sys.stdin)["request"]).read_text("utf-8"))
    try:
        cluster = load(request["cluster"])
        if request["memory_gib"]:
            gpu = replace(cluster.gpu, memory_gib=request["memory_gib"])
            cluster = replace(cluster, gpu=gpu)
        replies = {
            i: search([Case.from_json(case) for case in one["cases"]], cluster, one["everything"])
            for i, one in enumerate(request["searches"])
            if _claimed(Path(request["claims"]) / str(i))
        }
    except (ValueError, OSError) as refusal:
        print(refusal, file=sys.stderr)
        return 2
    print(json.dumps(replies))
    return 0


if __name__ == "__main__":
    sys.exit(main())
