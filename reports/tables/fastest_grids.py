"""The best choice for every problem, as grids: masks by lengths, or lengths by ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cpbench.core.spec import format_size
from cpbench.reports.labels import counted, sentence
from cpbench.reports.tables.mask_seeds import Family
from cpbench.reports.tables.summary import Answer, methods

_AXES = ("mask", "tokens", "ranks")


@dataclass(frozen=True)
class Best:
    """Who won one problem.

    Attributes:
        question: what was to be computed, see ``answer.QUESTION``; ``mask`` without a drawn seed.
        method: the fastest in the median.
        verdict: ``"won"``, ``"tie"``, ``"open"`` (too few draws to tell) or ``"alone"``.
        lead: time of the runner-up over the winner's; None without one.
        tied: methods that cannot be told apart from the fastest.
        over: the runner-up.
        ms, tflops: of the fastest.
        draws: how many were compared; 0 where the problem was not drawn.
    """

    question: dict[str, Any]
    method: str
    verdict: str
    lead: float | None
    tied: tuple[str, ...]
    over: str
    ms: float
    tflops: float
    draws: int


@dataclass(frozen=True)
class Grid:
    """A table of winners.

    Attributes:
        title: what its problems have in common.
        rows, columns: headings.
        corner: what rows and columns are.
        cells: by row and column; None where nothing competed.
    """

    title: str
    corner: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Best]


def winners(singles: Iterable[Answer], families: Iterable[Family]) -> list[Best]:
    """The best of every problem that has a contest."""
    found = [_of_answer(answer) for answer in singles]
    return found + [_of_family(family) for family in families if family.compared]


def grids(found: Sequence[Best], varying: Sequence[str]) -> list[Grid]:
    """Winners on one rank by mask and length; on several, for each mask, by length and ranks.

    Args:
        varying: headings of facts that are not the same throughout.
    """
    common = [fact for fact in varying if fact not in _AXES]
    several = {_rest(best, common) for best in found if best.question["world_size"] > 1}
    groups: dict[tuple[str, ...], list[Best]] = {}
    for best in found:
        rest, mask = _rest(best, common), str(best.question["mask"])
        if best.question["world_size"] == 1:
            groups.setdefault(("masks", "", rest), []).append(best)
        if rest in several:  # one rank is the first column there
            groups.setdefault(("ranks", mask, rest), []).append(best)
    made = []
    for (kind, mask, rest), bests in sorted(groups.items(), key=lambda item: item[0]):
        if kind == "ranks" and all(best.question["world_size"] == 1 for best in bests):
            continue
        made.append(_masks_grid(rest, bests) if kind == "masks" else _ranks_grid(mask, rest, bests))
    return made


def _masks_grid(rest: str, bests: Sequence[Best]) -> Grid:
    lengths = sorted({best.question["seq_len"] for best in bests})
    rows = sorted({str(best.question["mask"]) for best in bests})
    cells = {(str(b.question["mask"]), format_size(b.question["seq_len"])): b for b in bests}
    title = "One rank" + (f": {rest}" if rest else "")
    return Grid(title, "mask \\ tokens", rows, [format_size(n) for n in lengths], cells)


def _ranks_grid(mask: str, rest: str, bests: Sequence[Best]) -> Grid:
    ranks = sorted({best.question["world_size"] for best in bests})
    lengths = sorted({best.question["seq_len"] for best in bests})
    cells = {(format_size(b.question["seq_len"]), str(b.question["world_size"])): b for b in bests}
    title = mask + (f": {rest}" if rest else "")
    return Grid(title, "tokens \\ ranks", [format_size(n) for n in lengths],
                [str(n) for n in ranks], cells)  # fmt: skip


def _rest(best: Best, common: Sequence[str]) -> str:
    return sentence(best.question, common)


def _of_answer(answer: Answer) -> Best:
    names, reach = methods(answer.ranking), answer.ranking["high_ms"].iat[0]
    low = answer.ranking["low_ms"].tolist()
    tied = [name for name, ms in zip(names[1:], low[1:], strict=True) if not ms > reach]
    verdict = "alone" if answer.lead is None else "tie" if answer.tie else "won"
    return Best(
        question=answer.question, method=names[0], verdict=verdict, lead=answer.lead,
        tied=tuple(tied) if verdict == "tie" else (), over=names[1] if len(names) > 1 else "",
        ms=answer.ranking["time_ms"].tolist()[0],
        tflops=answer.ranking["tflops_per_rank"].tolist()[0], draws=0,
    )  # fmt: skip


def _of_family(family: Family) -> Best:
    first, *rivals = family.compared
    unsure = [rival.method for rival in rivals if not rival.slower(first)]
    return Best(
        question=family.question, method=first.method, verdict=family.verdict,
        lead=rivals[0].ratio(first) if rivals else None, tied=tuple(unsure),
        over=rivals[0].method if rivals else "", ms=first.median("time_ms"),
        tflops=first.median("tflops_per_rank"), draws=family.common,
    )  # fmt: skip


def words(best: Best) -> str:
    """What a cell says below the name of the winner."""
    drawn = f", {counted(best.draws, 'draw')}" if best.draws else ""
    if best.verdict == "won":
        assert best.lead is not None
        return f"{best.lead:.2f}x over {best.over}{drawn}"
    if best.verdict == "tie":
        return f"tie with {', '.join(best.tied)}{drawn}"
    if best.verdict == "open":
        return f"open against {', '.join(best.tied) or best.over}: {counted(best.draws, 'draw')}"
    return f"no rival{drawn}"
