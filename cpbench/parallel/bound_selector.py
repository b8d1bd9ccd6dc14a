"""Selectors on one of several ranks: they are given their tokens in the order of the sequence.

A selector selects blocks of the sequence.  So its tokens, which a layout has permuted and padded,
are put in order before each call and back after it; it may have a subset of the queries, but all
keys, and as many heads as it selects for together.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim, Dv that of values;
Y blocks of keys, n of them on a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.operator import (
    QKV,
    BackwardInputs,
    Unsupported,
    nothing_visible,
    zero_gradients,
)
from cpbench.masks.slices import IntArray
from cpbench.parallel.partial_results.accumulators import Planned
from cpbench.parallel.world import Subproblem

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse
    from cpbench.core.registry import OperatorInfo
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.layout import Layout
    from cpbench.parallel.world import Chunk, KeySubset, World


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """Where the tokens of a call are in the sequence.

    Attributes:
        rows: ``[S]``: which queries of the sequence they are, in order and without padding.
        queries, keys: ``[S]``, ``[T]``: the index of each among the tokens given, in the order of
            the sequence; None where they are given so.
    """

    rows: IntArray
    queries: torch.Tensor | None
    keys: torch.Tensor | None


def in_order(layout: Layout, ranks: Sequence[int]) -> tuple[IntArray, IntArray]:
    """The positions in the sequence of the tokens of some ranks, ascending and without padding, and
    the index of each among these tokens."""
    positions = np.concatenate([layout.positions(rank) for rank in ranks])
    index = np.argsort(positions, kind="stable")
    index = index[positions[index] < layout.seq_len]
    return positions[index], index


def prepare(op: BoundOperator, subproblem: Subproblem | KeySubset | Chunk) -> Planned:
    """Plan a selector for the queries of some ranks and all keys.

    Raises:
        Unsupported: if it does not take this mask or problem, has not all keys and heads that it
            needs, or its blocks of queries are cut.
    """
    info, impl, world = op.info, op.impl, subproblem.world
    if not isinstance(subproblem, Subproblem) or len({*subproblem.k_ranks}) < world.size:
        raise Unsupported(f"{info.name} selects from all keys, and is given a part of them")
    reason = heads_refusal(info, world)
    if reason is not None:
        raise Unsupported(reason)
    rows, q_index = in_order(world.queries, subproblem.q_ranks)
    _, k_index = in_order(world.keys, subproblem.k_ranks)
    mask = world.shared_mask
    order = TokenOrder(
        rows,
        token_index(q_index, world.queries.local_len * len(subproblem.q_ranks), op),
        token_index(k_index, world.keys.padded_len, op),
    )
    problem = replace(subproblem.problem, seq_q=max(len(rows), 1), seq_k=mask.seq_k)
    reason = impl.unsupported(problem, mask, op.device)
    if reason is None and len(rows) < mask.seq_q:
        reason = queries_refusal(op, world, rows)
    if reason is not None:
        raise Unsupported(reason)
    if not len(rows):
        return Planned(None, problem, mask, 0, None, world.kv_heads, order)
    plan: Any
    if len(rows) == mask.seq_q:
        plan = impl.prepare(mask.simplify(), problem, op.device)
    else:
        plan = impl.prepare_rows(mask, rows, problem, op.device)  # type: ignore[attr-defined]
    return Planned(plan, problem, plan.mask, subproblem.area, None, world.kv_heads, order)


def heads_refusal(info: OperatorInfo, world: World) -> str | None:
    """The reason why a selector cannot run on the heads of a world, or None."""
    problem, whole = world.problem, world.whole or world.problem
    if info.selects_for == "all" and problem.heads_q < whole.heads_q:
        return (
            f"{info.name} selects for all {whole.heads_q} heads together, and is given "
            f"{problem.heads_q} of them: use ring_allgather, which does not divide heads"
        )
    if info.selects_for == "group" and problem.group != whole.group:
        return (
            f"{info.name} selects for the {whole.group} query heads of a key/value head together, "
            f"and is given {problem.group} of them: use fewer ranks, or ring_allgather"
        )
    return None


def queries_refusal(op: BoundOperator, world: World, rows: IntArray) -> str | None:
    """The reason why a selector cannot run on these queries alone, or None."""
    if op.info.selects_from == "sequence":
        return (
            f"{op.info.name} selects by other queries of the sequence too, and is given some: use "
            "ulysses, which does not divide the sequence"
        )
    block: int = op.impl.query_block  # type: ignore[attr-defined]
    return cut_refusal(op.info.name, "queries", block, world.queries, rows)


def cut_refusal(name: str, what: str, block: int, layout: Layout, tokens: IntArray) -> str | None:
    """The reason why tokens in ascending order are not whole blocks of the sequence, or None."""
    starts = tokens[::block]
    ends = np.minimum(starts + block, layout.seq_len)
    expected = np.arange(len(tokens)) % block + np.repeat(starts, block)[: len(tokens)]
    whole = int((ends - starts).sum()) == len(tokens) and not (starts % block).any()
    if whole and np.array_equal(tokens, expected):
        return None
    return (
        f"{name} selects blocks of {block} {what}, which the layout {layout.name} cuts: on "
        f"{layout.world_size} ranks its runs of tokens must be multiples of {block}"
    )


def token_index(index: IntArray, tokens: int, op: BoundOperator) -> torch.Tensor | None:
    """An index of tokens on the device of an operator; None for all of them in order."""
    import torch

    if np.array_equal(index, np.arange(tokens)):
        return None
    return torch.as_tensor(index, device=op.device)


def forward(op: BoundOperator, qkv: QKV, plan: Planned) -> OutLse:
    """The forward pass of :meth:`BoundOperator.forward` for a selector."""
    assert plan.order is not None
    order, q = plan.order, qkv.q
    if plan.plan is None:
        out, lse = nothing_visible(q, qkv.v.shape[3])
        return out, lse if op.returns_lse else None
    inner = QKV(_take(q, order.queries), *(_take(x, order.keys) for x in qkv[1:]))
    return given_back(op, q, *op.call(inner, plan), plan)


def given_back(
    op: BoundOperator,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    plan: Planned,
    branches: Any = None,
) -> OutLse:
    """out and lse of queries in the order of the sequence, for those given; the state that the
    selector keeps for its backward pass goes with out.

    Args:
        branches: what was selected, unless that is what was computed.
    """
    assert plan.order is not None
    if op.selected is not None:
        branches = branches or op.impl.selection_of(out).branches  # type: ignore[attr-defined]
        op.selected.append((plan.order.rows, q.shape[2], branches))
    index = plan.order.queries
    if index is None:
        return out, lse
    (B, S, H), Dv = q.shape[:3], out.shape[3]
    given = out.new_zeros((B, S, H, Dv)).index_copy_(1, index, out)
    state = op.take_state(out)
    if state is not None:
        op.restore_state(given, state)
    if lse is not None:
        lse = lse.new_full((B, H, S), -float("inf")).index_copy_(2, index, lse)
    return given, lse


def backward(op: BoundOperator, x: BackwardInputs, plan: Planned) -> Gradients:
    """The backward pass of :meth:`BoundOperator.backward` for a selector."""
    assert plan.order is not None
    order = plan.order
    if plan.plan is None:
        return zero_gradients(x.qkv)
    dq, dk, dv = op.call_backward(taken(op, x, plan, order.keys), plan)
    return (
        _put(dq, order.queries, x.q.shape[1]),
        _put(dk, order.keys, x.k.shape[1]),
        _put(dv, order.keys, x.v.shape[1]),
    )


def taken(
    op: BoundOperator, x: BackwardInputs, plan: Planned, keys: torch.Tensor | None
) -> BackwardInputs:
    """The inputs of a backward pass in the order of the sequence, with the state of out."""
    assert plan.order is not None
    index = plan.order.queries
    dout, q, out = (_take(tensor, index) for tensor in (x.dout, x.q, x.out))
    lse: Any = x.lse
    if index is not None:
        op.restore_state(out, op.impl.states.get(x.out))  # type: ignore[attr-defined]
        lse = None if lse is None else lse.index_select(2, index)
    return BackwardInputs(dout, q, _take(x.k, keys), _take(x.v, keys), out, lse)


def _take(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return x if index is None else x.index_select(1, index)


def _put(x: torch.Tensor, index: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The inverse of :func:`_take`; tokens that were not taken are 0."""
    if index is None:
        return x
    given = x.new_zeros((x.shape[0], tokens, *x.shape[2:]))
    return given.index_copy_(1, index, x)


class BoundPooledSelector:
    """A selector that selects by pooled keys, in the steps of a strategy that exchanges these.

    Args:
        plan: for the queries of one rank and all keys.

    Attributes:
        key_block: keys of a block.
    """

    def __init__(self, op: BoundOperator, plan: Planned) -> None:
        self._op, self._impl, self._plan = op, _pooled(op.impl), plan
        self.key_block: int = self._impl.key_block

    @property
    def refusal(self) -> str | None:
        """Why it needs more keys than the selected blocks, or None."""
        reason = self._impl.needs_all_keys()
        return None if reason is None else f"{self._op.info.name} needs all keys: {reason}"

    def pool(self, k: torch.Tensor) -> torch.Tensor:
        """The pooled keys ``[B, n, G, E]`` of whole blocks of keys."""
        import torch

        return torch.cat(self._impl.pool_keys(k), 3)

    def select(self, q: torch.Tensor, pooled: torch.Tensor) -> Any:
        """The selection of the local queries, from the pooled keys of the sequence; None without
        queries."""
        assert self._plan.order is not None
        if self._plan.plan is None:
            return None
        parts = pooled.split(q.shape[3], 3)
        return self._impl.select_by(_take(q, self._plan.order.queries), parts, self._plan.plan)

    def wanted(self, branches: Any, pooled: torch.Tensor) -> torch.Tensor:
        """The blocks of keys of a selection, ``[B, G, Y]`` booleans."""
        B, Y, G, _ = pooled.shape
        if branches is None:
            return pooled.new_zeros((B, G, Y)).bool()
        wanted: torch.Tensor = self._impl.wanted_blocks(branches, G)
        return wanted

    def attend(self, qkv: QKV, branches: Any, columns: IntArray) -> OutLse:
        """out and lse of a selection, of which ``qkv`` has the keys of the blocks ``columns``."""
        op, plan, q = self._op, self._plan, qkv.q
        assert plan.order is not None
        if not len(columns):
            if op.selected is not None and branches is not None:
                op.selected.append((plan.order.rows, q.shape[2], branches))
            out, lse = nothing_visible(q, qkv.v.shape[3])
            return out, lse if op.returns_lse else None
        narrow = self._impl.narrowed(branches, columns)
        given = qkv._replace(q=_take(q, plan.order.queries))
        out, lse = self._impl.attend_to(given, narrow, plan.plan)
        return given_back(op, q, out, lse, plan, branches)

    def backward(self, x: BackwardInputs) -> Gradients:
        """The backward pass of :meth:`attend`."""
        if not x.k.shape[1]:
            return zero_gradients(x.qkv)
        dq, dk, dv = self._op.impl.backward(taken(self._op, x, self._plan, None), self._plan.plan)
        assert self._plan.order is not None
        return _put(dq, self._plan.order.queries, x.q.shape[1]), dk, dv


def _pooled(impl: Any) -> Any:
    """The implementation of a selector that declares to select by pooled keys."""
    assert hasattr(impl, "select_by"), f"{type(impl).__name__} has no pooled keys"
    return impl
