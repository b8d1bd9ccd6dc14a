"""Methods that a recommendation chooses from: strategies of our own with their usual parameters, on
each layout, with each placement that may pay off."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cpbench.core.problem import Case
from cpbench.core.registry import StrategyInfo, operator_info, strategies_for, strategy_info
from cpbench.core.spec import Spec
from cpbench.masks.attn_mask import AttnMask

FEW_SLICES = 8  # of a mask, up to which a striped layout is one of the candidates
MOST_PIECES = 8192  # documents times ranks, up to which documents may be divided one by one
Method = tuple[str, str]  # a strategy with parameters, a placement


@dataclass(frozen=True)
class Ranks:
    """The ranks, heads and kind of operator that parameters depend on."""

    size: int
    per_node: int
    heads_q: int
    kind: str = "attention"

    @property
    def several_nodes(self) -> bool:
        return self.size > self.per_node

    @property
    def degrees(self) -> list[int]:
        """Numbers of ranks that may exchange heads while others exchange keys: powers of two from
        half a node (two ranks, if there is one node)."""
        least = self.per_node // 2 if self.several_nodes else 2
        powers = (1 << i for i in range(1, self.size.bit_length()))
        return [
            n for n in powers
            if least <= n <= self.heads_q and n < self.size and self.size % n == 0
        ]  # fmt: skip


def own_strategies(kind: str = "attention") -> list[str]:
    """Names of the strategies of a kind of operators on several ranks whose communication is
    traced."""
    known = strategies_for(kind).items()
    return [name for name, info in known if info.traced and name != "single"]


def candidates(case: Case, names: list[str], mask: AttnMask) -> list[Case]:
    """The case with each method that may pay off.

    Args:
        case: the problem, with ``ranks_per_node``.
        names: of strategies; one with parameters stands for itself.
        mask: of the problem.

    Raises:
        ValueError: for an unknown strategy.
    """
    kind = operator_info(case.operator.name).kind
    ranks = Ranks(case.world_size, case.ranks_per_node, case.num_heads_q, kind)
    return [
        replace(case, strategy=Spec.parse(strategy), layout=Spec(layout), placement=placement)
        for name in names
        for strategy, placement in methods(name, ranks)
        for layout in layouts(strategy_info(Spec.parse(name).name), mask, case.world_size)
    ]


def methods(name: str, ranks: Ranks) -> Iterator[Method]:
    """A strategy with each of its usual parameters and placements."""
    usual = _USUAL.get(name)
    if usual is None:
        yield name, ""
        return
    for parameters, placement in dict.fromkeys(usual(ranks)):
        yield f"{name}:{parameters}" if parameters else name, placement


def layouts(info: StrategyInfo, mask: AttnMask, size: int) -> list[str]:
    """The layouts that differ for a mask: every layout balances a full one, and strategies that
    give each rank all tokens of some heads are the same on all; one band is as even in a zigzag as
    where it is dispatched.

    Documents are not striped, which cuts each into bands of single tokens for every pair of ranks;
    nor are they divided one by one where that makes too many pieces.
    """
    if mask.kind == "full" or info.name == "ulysses":
        return ["contiguous"]
    pieces = len(mask.slices)
    left_out = {
        "zigzag_document": pieces == 1 or pieces * size > MOST_PIECES,
        "dispatch": pieces == 1 and info.name != "dispatch",
        "striped": pieces > FEW_SLICES,
    }
    return [name for name in info.layouts if not left_out.get(name)]


def _scan(ranks: Ranks) -> Iterator[Method]:
    for parameters in ("", "by=ring", "by=ring,blocks=4", "by=doubling"):
        yield parameters, ""


def _windows(ranks: Ranks) -> Iterator[Method]:
    """A ring, and a double ring with windows of a node."""
    yield "", ""
    if ranks.several_nodes and ranks.size % ranks.per_node == 0:
        yield f"window={ranks.per_node}", ""


def _stages(ranks: Ranks) -> Iterator[Method]:
    for parameters in ("", "stages=4", "keep=true"):
        yield parameters, ""


def _ulysses(ranks: Ranks) -> Iterator[Method]:
    chunks = ("chunks=2",) if ranks.kind == "attention" else ()
    for parameters in ("", *chunks, *(("pad=true",) if ranks.heads_q % ranks.size else ())):
        yield parameters, ""


def _degrees(ranks: Ranks, inside: str, more: tuple[str, ...] = ()) -> Iterator[Method]:
    """Each number of ranks that exchange heads; of several nodes, also with another axis inside."""
    for degree in ranks.degrees:
        yield f"ulysses={degree}", ""
        if ranks.several_nodes:
            yield f"ulysses={degree}", inside
        for parameters in more:
            yield f"{parameters},ulysses={degree}", ""


def _by_node(ranks: Ranks) -> Iterator[Method]:
    yield "", ""
    if ranks.several_nodes:
        yield "by=node", ""


def _padded(ranks: Ranks) -> Iterator[Method]:
    yield "", ""
    if ranks.heads_q % ranks.per_node:
        yield "pad=true", ""


_USUAL: dict[str, Callable[[Ranks], Iterator[Method]]] = {
    "ring": _windows,
    "burst": _windows,
    "ring_allgather": _stages,
    "ulysses": _ulysses,
    "usp": functools.partial(_degrees, inside="ring", more=("inner=allgather",)),
    "loongtrain": functools.partial(_degrees, inside="inner"),
    "hierarchical": _padded,
    "dispatch": _by_node,
    "scan": _scan,
}
