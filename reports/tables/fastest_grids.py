"""The fastest method per problem as grids: masks by lengths, or lengths by ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cpbench.core.spec import format_size
from cpbench.reports.labels import describe, pluralize
from cpbench.reports.tables.mask_seeds import SeedGroup
from cpbench.reports.tables.summary import MethodRanking, method_names

_AXES = ("mask", "tokens", "ranks")
_MAX_TIED = 2  # methods that are named in a cell


@dataclass(frozen=True)
class FastestMethod:
    """The fastest method for one problem.

    Attributes:
        problem: values of ``summary.PROBLEM_KEYS``; ``mask`` without its seed in a seed group.
        method: the method with the lowest median time.
        verdict: ``"won"``, ``"tie"``, ``"inconclusive"`` (too few launches, turns or mask seeds) or
            ``"uncontested"``.
        lead: time of the runner-up over that of the fastest; None when uncontested.
        tied: methods that are not significantly slower, or on which there is too little evidence.
        shortage: how many launches, turns or mask seeds there are, if they are too few.
        runner_up: the second fastest method; "" when uncontested.
        ms, tflops: of the fastest.
        num_seeds: number of mask seeds compared; 0 outside of seed groups.
        flags: caveats of its times, such as ``oversubscribed``.
    """

    problem: dict[str, Any]
    method: str
    verdict: str
    lead: float | None
    tied: tuple[str, ...]
    shortage: str
    runner_up: str
    ms: float
    tflops: float
    num_seeds: int
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class FastestGrid:
    """A grid of the fastest methods.

    Attributes:
        title: facts that its problems have in common.
        corner: what rows and columns are.
        rows, columns: headings.
        cells: by row and column; absent where nothing was compared.
    """

    title: str
    corner: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], FastestMethod]


def fastest_methods(
    rankings: Iterable[MethodRanking], seed_groups: Iterable[SeedGroup]
) -> list[FastestMethod]:
    """The fastest method of every problem with a competing case."""
    fastest = [_from_ranking(ranking) for ranking in rankings]
    return fastest + [_from_seed_group(group) for group in seed_groups if group.compared]


def fastest_grids(
    fastest: Sequence[FastestMethod], varying_facts: Sequence[str]
) -> list[FastestGrid]:
    """Grids on one rank by mask and length; on several ranks, per mask, by length and ranks.

    Args:
        varying_facts: headings of the facts that differ between problems.
    """
    extra_facts = [fact for fact in varying_facts if fact not in _AXES]
    multi_rank = {_context(x, extra_facts) for x in fastest if x.problem["world_size"] > 1}
    groups: dict[tuple[str, ...], list[FastestMethod]] = {}
    for cell in fastest:
        context, mask = _context(cell, extra_facts), str(cell.problem["mask"])
        if cell.problem["world_size"] == 1:
            groups.setdefault(("masks", "", context), []).append(cell)
        if context in multi_rank:  # one rank is the first column there
            groups.setdefault(("ranks", mask, context), []).append(cell)
    grids = []
    for (kind, mask, context), cells in sorted(groups.items(), key=lambda item: item[0]):
        if kind == "masks":
            grids.append(_masks_grid(context, cells))
        elif any(cell.problem["world_size"] > 1 for cell in cells):
            grids.append(_ranks_grid(mask, context, cells))
    return grids


def _masks_grid(context: str, fastest: Sequence[FastestMethod]) -> FastestGrid:
    lengths = sorted({x.problem["seq_len"] for x in fastest})
    rows = sorted({str(x.problem["mask"]) for x in fastest})
    cells = {(str(x.problem["mask"]), format_size(x.problem["seq_len"])): x for x in fastest}
    title = "One rank" + (f": {context}" if context else "")
    return FastestGrid(title, "mask \\ tokens", rows, [format_size(n) for n in lengths], cells)


def _ranks_grid(mask: str, context: str, fastest: Sequence[FastestMethod]) -> FastestGrid:
    ranks = sorted({x.problem["world_size"] for x in fastest})
    lengths = sorted({x.problem["seq_len"] for x in fastest})
    cells = {(format_size(x.problem["seq_len"]), str(x.problem["world_size"])): x for x in fastest}
    title = mask + (f": {context}" if context else "")
    return FastestGrid(title, "tokens \\ ranks", [format_size(n) for n in lengths],
                       [str(n) for n in ranks], cells)  # fmt: skip


def _context(fastest: FastestMethod, extra_facts: Sequence[str]) -> str:
    """Facts of the problem other than the axes, in words."""
    return describe(fastest.problem, extra_facts)


def _from_ranking(ranking: MethodRanking) -> FastestMethod:
    names, contest = method_names(ranking.rows), ranking.contest
    undecided = False if ranking.verdict == "tie" else contest.shortage
    tied = [name for name, slower in zip(names[1:], contest.slower, strict=True)
            if slower == undecided]  # fmt: skip
    return FastestMethod(
        problem=ranking.problem, method=names[0], verdict=ranking.verdict, lead=ranking.lead,
        tied=tuple(tied), shortage=str(contest.shortage or ""),
        runner_up=names[1] if len(names) > 1 else "",
        ms=ranking.rows["time_ms"].tolist()[0],
        tflops=ranking.rows["tflops_per_rank"].tolist()[0], num_seeds=0,
        flags=tuple(ranking.rows["flags"].tolist()[0].split()),
    )  # fmt: skip


def _from_seed_group(group: SeedGroup) -> FastestMethod:
    fastest, *others = group.compared
    tied = [other.method for other in others if not other.is_slower_than(fastest)]
    return FastestMethod(
        problem=group.problem, method=fastest.method, verdict=group.verdict,
        lead=others[0].time_ratio(fastest) if others else None, tied=tuple(tied),
        shortage=f"only {pluralize(group.num_common_seeds, 'mask seed')}",
        runner_up=others[0].method if others else "", ms=fastest.median("time_ms"),
        tflops=fastest.median("tflops_per_rank"), num_seeds=group.num_common_seeds,
        flags=tuple(sorted({f for row in fastest.rows.values() for f in row["flags"].split()})),
    )  # fmt: skip


def verdict_text(fastest: FastestMethod) -> str:
    """Text of a grid cell below the name of the method."""
    seeds = pluralize(fastest.num_seeds, "mask seed")
    suffix = f", {seeds}" if fastest.num_seeds else ""
    if fastest.verdict == "won":
        assert fastest.lead is not None
        return f"{fastest.lead:.2f}x over {fastest.runner_up}{suffix}"
    if fastest.verdict == "tie":
        return f"tie with {_some(fastest.tied)}{suffix}"
    if fastest.verdict == "inconclusive":
        others = _some(fastest.tied) or fastest.runner_up
        return f"inconclusive against {others}: {fastest.shortage}"
    return f"uncontested{suffix}"


def _some(names: Sequence[str]) -> str:
    """Names, the first ones where there are many."""
    more = f" and {len(names) - _MAX_TIED} more" if len(names) > _MAX_TIED + 1 else ""
    return ", ".join(names[:_MAX_TIED] if more else names) + more
