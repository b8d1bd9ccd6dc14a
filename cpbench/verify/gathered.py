"""What a selector selected and computed on several ranks, gathered on rank 0 as if on one rank.

So the checks of selections (``cpbench.verify.selection``) and their quality are those of one rank.
Besides, the selection must be the one that one rank makes: but for near ties, since the scores of
fewer queries may be summed in another order.

Legend: B batch, S queries, T keys, H query heads; X blocks of queries, Y blocks of keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from cpbench.api import Attention
from cpbench.core.operator import QKV
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import IntArray
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World
from cpbench.selectors.common.base import Branch, SelectionResult, Selector
from cpbench.selectors.selections import Blocks, Lines, Selection
from cpbench.verify.check import RankContext, Tensors, WrongResult, contract_breach, run_pass
from cpbench.verify.fit import chunks

if TYPE_CHECKING:
    import torch

MAX_DIFFERENT = 1e-3  # share of the selected blocks, or keys, that near ties may change


class Selected(NamedTuple):
    """What one call on one rank selected: its queries, its number of heads, and for each branch
    the tensors of its selection; () for static masks."""

    rows: IntArray
    heads: int
    branches: tuple[tuple[torch.Tensor, ...], ...]


class OneRank(NamedTuple):
    """A pass as that of one rank.

    Attributes:
        work: the computation on one rank.
        inputs, results: of all tokens.
        selection: what was selected.
        different: share of it that one rank does not select.
    """

    work: Attention
    inputs: Tensors
    results: Tensors
    selection: SelectionResult
    different: float = 0.0


def run_pass_as_one_rank(
    work: Attention, inputs: Tensors, context: RankContext
) -> tuple[Tensors, OneRank | None, int]:
    """Run one pass as :func:`check.run_pass`; collective.

    Returns:
        The results of this rank; on rank 0 also the pass as that of one rank, else None; and the
        pairs that this rank selected, counted once per query head and phase.

    Raises:
        WrongResult: on all ranks, where a result breaks the contract of operators, or the selection
            is not the one of one rank.
        DoesNotFit: see :meth:`RankContext.compute`.
    """
    selector = work.op.impl
    assert isinstance(selector, Selector)
    selector.keep_selection, work.op.selected = True, []
    try:
        results = run_pass(work, inputs, context.comm)
        calls = list(work.op.selected)
    finally:
        selector.keep_selection, work.op.selected = False, None
    reasons = [reason for reason in context.gather(contract_breach(results, inputs)) if reason]
    if reasons:
        raise WrongResult(reasons[0])
    pairs = round(
        sum(heads * branch.mask.area for _, heads, of_call in calls for branch in of_call)
    )
    pairs *= 2 if work.problem.backward else 1
    if work.info.name == "single":
        one = OneRank(work, inputs, results, selector.selection_of(results["out"]))
        return results, one, pairs
    own = [_selected(*call) for call in calls]
    ranks = context.gather((own, _on_host(inputs), _on_host(results)))

    def as_one() -> OneRank | None:
        return None if work.rank else _as_one_rank(work, ranks)

    gathered = context.compute(as_one)
    different = max(context.gather(gathered.different if gathered else 0.0))
    if different > MAX_DIFFERENT:
        raise WrongResult(f"{different:.2%} of what it selected is not what one rank selects")
    return results, gathered, pairs


def _selected(rows: IntArray, heads: int, branches: tuple[Branch, ...]) -> Selected:
    """What a call selected, in host memory."""
    parts = [
        () if isinstance(branch.mask, AttnMask) else _tensors(branch.mask) for branch in branches
    ]
    on_host = (tuple(x.cpu() for x in part) for part in parts)
    return Selected(rows, heads, tuple(on_host))


def _as_one_rank(
    work: Attention, ranks: Sequence[tuple[list[Selected], Tensors, Tensors]]
) -> OneRank:
    """The pass of all ranks as that of one."""
    world, device = work.world, work.home
    layout = layouts.build("contiguous", world.keys.seq_len, 1)
    alone = World.of(work.problem, work.mask, layout)
    one = Attention(work.operator, "single", alone, 0, work.op.device)
    inputs = _unsharded([of_rank for _, of_rank, _ in ranks], world, device)
    results = _unsharded([of_rank for _, _, of_rank in ranks], world, device)
    selector, plan = one.op.impl, one.plan.plan
    assert isinstance(selector, Selector)
    qkv = QKV.of(inputs)
    expected = selector.select_from(qkv, plan)
    calls = [selected for rank in ranks for selected in rank[0]]
    branches = _joined(expected, calls)
    prepared = selector.prepare_branches(branches, plan)
    results_of_kernels = selector.compute(qkv, prepared)[2]
    selection = SelectionResult(prepared, results_of_kernels, selector.joined)
    pairs = zip(expected, branches, strict=True)
    different = max((_share_of_others(a.mask, b.mask) for a, b in pairs), default=0.0)
    return OneRank(one, inputs, results, selection, different)


def _on_host(tensors: Tensors) -> Tensors:
    return {name: x.cpu() for name, x in tensors.items()}


def _unsharded(ranks: Sequence[Tensors], world: World, device: str) -> Tensors:
    """The tensors of all tokens."""
    tensors = {}
    for name in ranks[0]:
        layout = world.keys if name in ("k", "v", "dk", "dv") else world.queries
        shards = [of_rank[name] for of_rank in ranks]
        tensors[name] = layout.unshard(shards, dim=2 if name == "lse" else 1).to(device)
    return tensors


def _joined(like: tuple[Branch, ...], calls: Sequence[Selected]) -> tuple[Branch, ...]:
    """The branches with what the calls selected: each of some queries, or of some heads, in
    order."""
    import torch

    tensors = [
        [] if isinstance(branch.mask, AttnMask) else [
            torch.full_like(x, -1) if x.dtype != torch.bool else torch.zeros_like(x)
            for x in _tensors(branch.mask)
        ]
        for branch in like
    ]  # fmt: skip
    heads_before: dict[bytes, int] = {}  # by queries
    for rows, heads, parts in calls:
        first = heads_before.get(rows.tobytes(), 0)
        heads_before[rows.tobytes()] = first + heads
        for branch, whole, part in zip(like, tensors, parts, strict=True):
            block = branch.mask.grid.block_q if isinstance(branch.mask, Blocks) else 1
            for x, own in zip(whole, part, strict=True):
                own_heads = slice(first, first + own.shape[1])
                if own.ndim == 3:  # lines, which have no queries
                    x[:, own_heads] = own.to(x.device)
                else:
                    index = torch.as_tensor(rows[::block] // block, device=x.device)
                    x[:, own_heads, index] = own.to(x.device)
    return tuple(
        branch if isinstance(branch.mask, AttnMask) else replace(branch, mask=_with(branch.mask, x))
        for branch, x in zip(like, tensors, strict=True)
    )


def _tensors(selected: Selection) -> tuple[torch.Tensor, ...]:
    if isinstance(selected, Blocks):
        return (selected.kept,)
    if isinstance(selected, Lines):
        return selected.distances, selected.columns
    return (selected.index,)


def _with(selected: Selection, tensors: Sequence[torch.Tensor]) -> Selection:
    if isinstance(selected, Blocks):
        return replace(selected, kept=tensors[0])
    if isinstance(selected, Lines):
        return replace(selected, distances=tensors[0], columns=tensors[1])
    return replace(selected, index=tensors[0])


def _share_of_others(expected: AttnMask | Selection, actual: AttnMask | Selection) -> float:
    """The share of the expected pairs, or blocks, that the actual selection does not have, or has
    besides."""
    if isinstance(expected, AttnMask) or isinstance(actual, AttnMask):
        return 0.0
    count, others = 0, 0
    for a, b in _flags(expected, actual):
        count += int(a.sum())
        others += int((a != b).sum())
    return others / max(count, 1)


def _flags(expected: Selection, actual: Selection) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What both select, as booleans."""
    if isinstance(expected, Blocks) and isinstance(actual, Blocks):
        allowed = expected.grid.allowed
        yield expected.kept & allowed, actual.kept & allowed
        return
    if isinstance(expected, Lines) and isinstance(actual, Lines):
        yield from zip(_tensors(expected), _tensors(actual), strict=True)
        return
    for part in chunks(expected.seq_q, expected.seq_k * expected.heads):
        yield tuple(x.dense_rows(part.start, part.stop) for x in (expected, actual))  # type: ignore[misc]
