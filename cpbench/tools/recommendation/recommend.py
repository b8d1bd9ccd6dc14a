"""The search for the fastest strategies, in subprocesses, and what becomes of its outcomes.

Every method is bounded or predicted on the first draw of the mask; those that come near the best,
on the number of ranks that was asked for, are predicted on all draws.  The best are all whose mean
time is within the interval of the smallest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpbench import masks
from cpbench.core.environment import usable_cores
from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.core.subprocess_call import RequestRefused, read_reply, subprocesses
from cpbench.simulator.cluster import Cluster, load
from cpbench.simulator.memory import TOO_LARGE
from cpbench.simulator.recommendation.candidates import candidates
from cpbench.tools.recommendation.draws import draw_masks
from cpbench.tools.recommendation.reasons import reason

SEARCH = "cpbench.simulator.recommendation.search"
MANY_RANKS = 64  # beyond which a search is divided
SEARCH_PARTS = 4  # into so many
NEAR = 1.25  # times the best of the first draw, up to which the others are predicted
Outcome = dict[str, Any]
Search = dict[str, Any]


def recommend(
    case: Case, strategies: list[str], cluster: str, draws: int = 4, memory_gib: float = 0.0,
    sizes: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """Rank the methods that may solve a problem.

    Args:
        case: the problem: all but strategy, layout and placement.
        strategies: names to choose from; one with parameters stands for itself.
        cluster: name of a packaged cluster, or a file.
        draws: of a mask with random documents.
        memory_gib: of a GPU; 0 for the cluster's.
        sizes: numbers of ranks, of which the last is the case's; () to choose, see
            :func:`world_sizes`.

    Returns:
        what ``cpbench recommend --json`` prints.

    Raises:
        ValueError: if nothing can be predicted, in one line.
        OSError: when the file of the cluster cannot be read.
    """
    constants = load(cluster)
    constants.kernel(case.operator.name, case.dtype, case.head_dim)
    _check_links(case, constants)
    drawn = draw_masks(case.mask, case.seq_len, draws)
    sizes = sizes or world_sizes(case.world_size, case.ranks_per_node)
    by_size = {
        size: candidates(
            replace(case, world_size=size, ranks_per_node=min(size, case.ranks_per_node)),
            strategies, masks.build(drawn[0], case.seq_len),
        )
        for size in sizes
    }  # fmt: skip
    if not by_size[case.world_size]:
        raise ValueError(
            f"{', '.join(strategies)}: no usual parameters for {case.world_size} ranks; give them, "
            "as in usp:ulysses=2"
        )
    by_size = {size: methods for size, methods in by_size.items() if methods}
    where = {"cluster": cluster, "memory_gib": memory_gib}
    searches = [
        {"cases": _on(drawn[0], methods), "everything": False} for methods in by_size.values()
    ]
    first = dict(zip(by_size, _answers(searches, where), strict=True))
    methods = by_size[case.world_size]
    near = _near(first[case.world_size])
    searches = [
        {"cases": _on(mask, [methods[i] for i in near]), "everything": True}
        for mask in drawn[1:]
        if near
    ]
    more = _answers(searches, where)
    results = []
    for size, candidates_of_size in by_size.items():
        of_draws = [[one] for one in first[size]]
        if size == case.world_size:
            for outcomes in more:
                for i, outcome in zip(near, outcomes, strict=True):
                    of_draws[i].append(outcome)
        rows = ranked(candidates_of_size, of_draws, constants)
        draws_of_size = max(map(len, of_draws))
        results.append({
            "ranks": size, "draws": draws_of_size, "warnings": _warnings(of_draws), "methods": rows,
        })  # fmt: skip
    return _result(case, constants, memory_gib, len(drawn), results)


def world_sizes(size: int, per_node: int) -> list[int]:
    """Numbers of ranks to compare: a node, twice as many, … up to ``size``, which is the last."""
    sizes = [size]
    while sizes[0] % 2 == 0 and sizes[0] // 2 >= per_node and sizes[0] // 2 % per_node == 0:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def _check_links(case: Case, cluster: Cluster) -> None:
    if case.world_size > case.ranks_per_node and "across" not in cluster.links:
        raise ValueError(
            f"cluster {cluster.name} has no [links.across]: at most {case.ranks_per_node} ranks, "
            "those of a node"
        )


def _on(mask: Spec, methods: Iterable[Case]) -> list[dict[str, Any]]:
    return [replace(method, mask=mask).to_json() for method in methods]


def _answers(searches: Sequence[Search], where: dict[str, Any]) -> list[list[Outcome]]:
    """The outcomes of searches, in as many subprocesses as there are cores.

    Those on many ranks are divided into ``SEARCH_PARTS``.  The division does not depend on the
    number of cores, as it decides which losing methods are predicted and which are only bounded;
    which process answers which part does.
    """
    parts = [
        (i, slice(part, None, count))
        for i, search in enumerate(searches)
        for count in [SEARCH_PARTS if _ranks(search) > MANY_RANKS else 1]
        for part in range(count)
    ]
    requests = [searches[i] | {"cases": searches[i]["cases"][part]} for i, part in parts]
    order = sorted(range(len(parts)), key=lambda k: -_work(requests[k]))
    outcomes: list[list[Outcome]] = [[{}] * len(search["cases"]) for search in searches]
    with tempfile.TemporaryDirectory() as claims:
        shared = where | {"searches": [requests[k] for k in order], "claims": claims}
        file = Path(claims) / "request.json"
        file.write_text(json.dumps(shared), "utf-8")  # larger than a pipe
        requests_of = [{"request": str(file)}] * min(usable_cores(), len(parts))
        with subprocesses(SEARCH, requests_of) as processes:
            for process in processes:
                try:
                    replies = json.loads(read_reply(process, "search"))
                except RequestRefused as refusal:
                    raise ValueError(str(refusal)) from None
                for place, reply in replies.items():
                    i, part = parts[order[int(place)]]
                    outcomes[i][part] = reply
    return outcomes


def _work(search: Search) -> int:
    """Steps to record, about: those of all ranks where they are few, else of a few of them."""
    sizes = [int(case["world_size"]) for case in search["cases"]]
    return sum(size * (size if size <= 32 else 8) for size in sizes)


def _ranks(search: Search) -> int:
    return max((int(case["world_size"]) for case in search["cases"]), default=0)


def seconds(outcome: Outcome) -> float:
    """The predicted time of all phases."""
    return float(sum(phase["seconds"] for phase in outcome["phases"].values()))


def least_seconds(outcome: Outcome) -> float:
    """The time that a case takes at least."""
    return float(max(outcome["bound"]["total"], sum(outcome.get("busiest_rank", {}).values())))


def _fits(outcome: Outcome) -> bool:
    return "phases" in outcome and outcome["memory"]["verdict"] != TOO_LARGE


def _near(outcomes: Sequence[Outcome]) -> list[int]:
    """Indices of the methods that may be the best on the mean of all draws."""
    times = {i: seconds(outcome) for i, outcome in enumerate(outcomes) if _fits(outcome)}
    return [i for i, time in times.items() if time <= NEAR * min(times.values())]


def ranked(
    methods: Sequence[Case], of_draws: Sequence[Sequence[Outcome]], cluster: Cluster
) -> list[dict[str, Any]]:
    """A row for each method: the best first, then the others by their time relative to the best, on
    the same draws (where none fits, by their time); then those without a time.

    Args:
        of_draws: by method, the outcomes of the first draw, and of all draws if it comes near the
            best.
    """
    draws = max(map(len, of_draws))
    error = cluster.calibrated.percentile_90_error
    means = {
        i: sum(map(seconds, outcomes)) / draws
        for i, outcomes in enumerate(of_draws)
        if len(outcomes) == draws and all(map(_fits, outcomes))
    }
    best = min(means, key=lambda i: (means[i], i), default=None)
    rows = []
    for i, (method, outcomes) in enumerate(zip(methods, of_draws, strict=True)):
        row: dict[str, Any] = {
            "strategy": str(method.strategy), "layout": str(method.layout),
            "placement": method.placement,
        }  # fmt: skip
        refused = next((one["refused"] for one in outcomes if "refused" in one), None)
        if refused is not None:
            row |= {"status": "refused"}
        elif not all(map(_fits, outcomes)) and "phases" in outcomes[0]:
            row |= {"status": TOO_LARGE}
        else:
            near = i in means and best is not None and means[i] <= means[best] * (1 + error)
            row |= {"status": "best" if near else "slower"}
        if refused is None:
            row |= _figures(outcomes, of_draws[best] if best is not None else (), error)
        row["why"] = refused if refused is not None else reason(
            row, outcomes[0], None if best is None else of_draws[best][0]
        )  # fmt: skip
        rows.append(row)
    order = {"best": 0, "slower": 1, TOO_LARGE: 2, "refused": 3}
    time = "seconds" if best is None else "ratio"
    return sorted(rows, key=lambda row: (order[row["status"]], row.get(time) or 0.0))


def _figures(outcomes: Sequence[Outcome], best: Sequence[Outcome], error: float) -> dict[str, Any]:
    """Times, memory and traffic of a method; relative to the best on the same draws."""
    timed = "phases" in outcomes[0]
    times = [seconds(one) if timed else least_seconds(one) for one in outcomes]
    mean = sum(times) / len(times)
    relative = mean * len(times) / sum(map(seconds, best[: len(times)])) if best else None
    bound = outcomes[0]["bound"]
    figures = {
        "seconds": mean, "draw_seconds": times, "at_least": not timed, "ratio": relative,
        "across_bytes": bound["across"], "inside_bytes": bound["inside"],
        "imbalance": bound["balance"],
    }  # fmt: skip
    if timed:
        phases = [phase for one in outcomes for phase in one["phases"].values()]
        figures |= {
            "low": mean / (1 + error), "high": mean * (1 + error),
            "breakdown": {
                part: sum(phase["breakdown"][part] for phase in phases) / len(outcomes)
                for part in phases[0]["breakdown"]
            },
            "memory": max(
                (one["memory"] for one in outcomes), key=lambda need: need["high_bytes"]
            ),
        }  # fmt: skip
    return figures


def _warnings(of_draws: Sequence[Sequence[Outcome]]) -> list[str]:
    predicted = (one for outcomes in of_draws for one in outcomes if "phases" in one)
    return list(dict.fromkeys(line for one in predicted for line in one["warnings"]))


def _result(
    case: Case, cluster: Cluster, memory_gib: float, draws: int, results: list[dict[str, Any]]
) -> dict[str, Any]:
    methods = results[-1]["methods"]
    if all(row["status"] == "refused" for row in methods):
        raise ValueError("; ".join(dict.fromkeys(row["why"] for row in methods)))
    return {
        "cluster": cluster.name,
        "cluster_hash": cluster.digest,
        "operator": str(case.operator),
        "mask": str(case.mask),
        "draws": draws,
        "gpu_gib": memory_gib or cluster.gpu.memory_gib,
        "error": cluster.calibrated.percentile_90_error,
        **{
            name: getattr(case, name)
            for name in ("seq_len", "queries", "batch", "num_heads_q", "num_heads_kv", "head_dim",
                         "head_dim_v", "dtype", "direction", "ranks_per_node")
        },
        "ranks": case.world_size,
        "warnings": results[-1]["warnings"],
        "by_ranks": results,
    }  # fmt: skip
