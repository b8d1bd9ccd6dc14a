"""Ulysses for sequence mixers: all-to-all from token shards to head shards and back.

A mixer computes each head by itself, so every rank computes whole sequences of some heads.  Tokens
arrive in the order of ranks and are put into that of the sequence: any layout will do.

Source: DeepSpeed-Ulysses (arXiv 2309.14509); for Mamba-2 in Megatron-LM's and NeMo's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from cpbench.core.operator import MixerInputs, state_dtype
from cpbench.parallel import layout as layouts
from cpbench.parallel.strategy import SavedMixer
from cpbench.parallel.world import World
from cpbench.strategies.common import head_exchange, head_shares
from cpbench.strategies.common.head_shares import HeadShares

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.layout import Layout
    from cpbench.parallel.strategy import Forward


@dataclass(frozen=True)
class Plan:
    """What one rank knows of all.

    Attributes:
        shares: the heads of each rank.
        tokens: of all ranks, with padding.
        order: where each token of the sequence is among those of all ranks, one rank after another;
            a slice if they are in order.
        local: the operator's, of the sequence and the heads of this rank; None without heads.
        decays: ``[h]``, of those heads, where the mixer has its own.
    """

    shares: HeadShares
    tokens: int
    order: Any
    local: Any
    decays: torch.Tensor | None


class Saved(NamedTuple):
    """What the backward pass needs: the inputs of the local heads, and what was computed of them;
    None without heads."""

    inputs: MixerInputs
    mixed: SavedMixer | None


class UlyssesMixers:
    """The strategy.

    Args:
        pad: whether the number of heads need not divide.
    """

    def __init__(self, pad: bool = False) -> None:
        self.pad = pad

    def unsupported(self, world: World) -> str | None:
        return head_shares.refusal("ulysses", world.problem, world.size, self.pad)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        layout, problem = world.keys, world.problem
        shares = HeadShares.of(problem, world.size)
        heads, decays, local = slice(*shares.q[rank]), op.decays(problem), None
        count = heads.stop - heads.start
        if count:
            scale = problem.softmax_scale
            of_heads = replace(problem, heads_q=count, heads_kv=count, scale=scale)
            in_order = layouts.build("contiguous", layout.seq_len, 1)
            local = op.prepare(World.of(of_heads, world.mask, in_order).subproblem([0], [0]))
        own = None if decays is None else decays[heads]
        return Plan(shares, layout.padded_len, _order(layout), local, own)

    def forward(
        self, qkv: MixerInputs, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        heads, state = slice(*plan.shares.q[comm.rank]), qkv.initial_state
        start = None if state is None else state[:, heads]
        local = _exchanged(qkv.by_token, lambda parts: _to_heads(parts, plan, comm))
        local = local.with_decays(plan.decays)._replace(initial_state=start)
        mixed, out, end = None, local.v, None
        if plan.local is not None:
            mixed = SavedMixer.mix(local, plan.local, op)
            out, end = mixed.out, mixed.state
        (out,) = _to_tokens([out], plan, comm)
        last = None
        if need_lse:
            B, _, H, K = qkv.q.shape
            last = out.new_zeros((B, H, K, out.shape[3]), dtype=state_dtype(out))
            if end is not None:
                last[:, heads] = end
            comm.all_reduce(last).wait()
        return out, last, Saved(local, mixed)

    def backward(
        self,
        dout: torch.Tensor,
        saved: Saved,
        plan: Plan,
        op: BoundOperator,
        comm: Comm,
        dstate: torch.Tensor | None = None,
    ) -> Gradients:
        (dout,) = _to_heads([dout], plan, comm)
        heads = slice(*plan.shares.q[comm.rank])
        if dstate is not None:
            dstate = dstate.contiguous().clone()
            comm.all_reduce(dstate).wait()
            dstate = dstate[:, heads]
        x, gradients = saved.inputs, saved.inputs
        if saved.mixed is not None:
            gradients = x.named(saved.mixed.differentiate(dout, plan.local, op, dstate))
        if plan.decays is not None:
            gradients = gradients._replace(g=None)
        joined = _exchanged(gradients.by_token, lambda parts: _to_tokens(parts, plan, comm))
        if x.initial_state is not None:
            assert gradients.initial_state is not None
            shape = list(x.initial_state.shape)
            shape[1] = plan.shares.heads_q
            initial = dout.new_zeros(shape, dtype=state_dtype(dout))
            initial[:, heads] = gradients.initial_state
            joined = joined._replace(initial_state=initial)
        return joined.given


@functools.lru_cache(maxsize=2)  # shared by all ranks of a trace
def _order(layout: Layout) -> Any:
    """See :class:`Plan`."""
    import numpy as np

    positions = np.concatenate([layout.positions(rank) for rank in range(layout.world_size)])
    order = np.argsort(positions)[: layout.seq_len]
    return slice(layout.seq_len) if (np.diff(order) == 1).all() else order


def _exchanged(
    x: MixerInputs, exchange: Callable[[list[torch.Tensor]], list[torch.Tensor]]
) -> MixerInputs:
    """Exchange all tensors, those of one dtype together; ``[B, S, H]`` as ``[B, S, H, 1]``."""
    given = {name: y for name, y in x._asdict().items() if y is not None}
    found = {}
    for dtype in dict.fromkeys(y.dtype for y in given.values()):
        names = [name for name, y in given.items() if y.dtype == dtype]
        sent = [y if y.ndim == 4 else y.unsqueeze(-1) for y in map(given.__getitem__, names)]
        for name, y in zip(names, exchange(sent), strict=True):
            found[name] = y if given[name].ndim == 4 else y.squeeze(-1)
    return MixerInputs.of(found)


def _to_heads(x: Sequence[torch.Tensor], plan: Plan, comm: Comm) -> list[torch.Tensor]:
    """Token shards ``[B, L, H, D]`` as head shards ``[B, S, h, D]``, in sequence order."""
    import torch

    pending = head_exchange.tokens_to_heads(x, [plan.shares.q] * len(x), comm)
    if isinstance(plan.order, slice):
        return [y[:, plan.order] for y in pending.wait()]
    order = torch.as_tensor(plan.order, device=x[0].device)
    return [y.index_select(1, order) for y in pending.wait()]


def _to_tokens(x: Sequence[torch.Tensor], plan: Plan, comm: Comm) -> list[torch.Tensor]:
    """The inverse of :func:`_to_heads`; 0 for padding."""
    import torch

    by_rank = []
    for y in x:
        padded = y.new_zeros((y.shape[0], plan.tokens, *y.shape[2:]))
        if isinstance(plan.order, slice):
            padded[:, plan.order] = y
        else:
            padded.index_copy_(1, torch.as_tensor(plan.order, device=y.device), y)
        by_rank.append(padded)
    pending = head_exchange.heads_to_tokens(by_rank, [plan.shares.q] * len(x), comm)
    return [head_exchange.join_heads([y], plan.shares.heads_q) for y in pending.wait()]
