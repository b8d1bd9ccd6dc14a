"""Ulysses for sequence mixers: all-to-all from token shards to head shards and back.

A mixer computes each head by itself, so every rank computes whole sequences of some heads.  Tokens
arrive in the order of ranks and are put into that of the sequence: any layout will do.

Source: DeepSpeed-Ulysses (arXiv 2309.14509); for Mamba-2 in Megatron-LM's and NeMo's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from cpbench.core.registry import StrategyInfo
from cpbench.strategies.common import head_exchange, head_shares
from cpbench.strategies.common.head_shares import HeadShares

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm
    from cpbench.parallel.mixing import BoundMixer, Inputs, MixerGradients
    from cpbench.parallel.world import World

INFO = StrategyInfo(
    name="ulysses",
    summary="all-to-all to head shards and back",
    source="DeepSpeed-Ulysses, arXiv 2309.14509",
    load="cpbench.strategies.ulysses_mixers:UlyssesMixers",
    value_dims=True,
    params=("pad",),
    variants=("pad=true",),
)


@dataclass(frozen=True)
class Plan:
    """What one rank knows of all.

    Attributes:
        shares: the heads of each rank.
        tokens: of all ranks, with padding.
        order: where each token of the sequence is among those of all ranks, one rank after another;
            a slice if they are in order.
        documents: first tokens of all documents; None if every token sees all.
        keeps: whether a backward pass follows.
    """

    shares: HeadShares
    tokens: int
    order: Any
    documents: tuple[int, ...] | None
    keeps: bool


class Saved(NamedTuple):
    """What the backward pass needs: the inputs of the local heads, and what the mixer saved."""

    inputs: Inputs
    mixed: Any


class UlyssesMixers:
    """The strategy.

    Args:
        pad: whether the number of heads need not divide.
    """

    def __init__(self, pad: bool = False) -> None:
        self.pad = pad

    def unsupported(self, world: World) -> str | None:
        return head_shares.refusal("ulysses", world.problem, world.size, self.pad)

    def prepare(self, mixer: BoundMixer, world: World, rank: int) -> Plan:
        import numpy as np

        layout, mask = world.keys, world.shared_mask
        positions = np.concatenate([layout.positions(r) for r in range(world.size)])
        order: Any = np.argsort(positions)[: layout.seq_len]
        if (np.diff(order) == 1).all():
            order = slice(layout.seq_len)
        shares, keeps = HeadShares.of(world.problem, world.size), world.problem.backward
        return Plan(shares, layout.padded_len, order, mask.causal_documents, keeps)

    def forward(
        self,
        x: Inputs,
        plan: Plan,
        mixer: BoundMixer,
        comm: Comm,
        need_state: bool,
        state: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Saved]:
        local = x._make(_map(lambda parts: _to_heads(parts, plan, comm), x))
        heads = slice(*plan.shares.q[comm.rank])
        start = None if state is None else state[:, heads]
        if heads.start == heads.stop:
            out, end, mixed = local.v, mixer.empty_summary(local).state, None
        else:
            out, end, mixed = mixer.mix(local, plan.documents, start, plan.keeps)
        (out,) = _to_tokens([out], plan, comm)
        last = None
        if need_state:
            B, _, H, _ = x.q.shape
            last = end.new_zeros((B, H, *end.shape[2:]))
            last[:, heads] = end
            comm.all_reduce(last).wait()
        return out, last, Saved(local, mixed)

    def backward(
        self,
        dout: torch.Tensor,
        saved: Saved,
        plan: Plan,
        mixer: BoundMixer,
        comm: Comm,
        dstate: torch.Tensor | None = None,
    ) -> MixerGradients:
        (dout,) = _to_heads([dout], plan, comm)
        heads = slice(*plan.shares.q[comm.rank])
        if dstate is not None:
            dstate = dstate.contiguous().clone()
            comm.all_reduce(dstate).wait()
            dstate = dstate[:, heads]
        local = saved.inputs
        if heads.start == heads.stop:
            gradients, dstart = local, mixer.empty_summary(local).state
        else:
            gradients, dstart = mixer.mix_backward(local, plan.documents, saved.mixed, dout, dstate)
        initial = dstart.new_zeros((dstart.shape[0], plan.shares.heads_q, *dstart.shape[2:]))
        initial[:, heads] = dstart
        joined = _map(lambda parts: _to_tokens(parts, plan, comm), gradients)
        return local._make(joined), initial


def _map(
    exchange: Callable[[list[torch.Tensor]], list[torch.Tensor]], x: Inputs
) -> list[torch.Tensor | None]:
    """Exchange all tensors, those of one dtype together; ``[B, S, H]`` as ``[B, S, H, 1]``."""
    found: list[torch.Tensor | None] = [None] * len(x)
    dtypes = dict.fromkeys(y.dtype for y in x if y is not None)
    for dtype in dtypes:
        numbers = [i for i, y in enumerate(x) if y is not None and y.dtype == dtype]
        given = [x[i] if x[i].ndim == 4 else x[i].unsqueeze(-1) for i in numbers]
        for i, y in zip(numbers, exchange(given), strict=True):
            found[i] = y if x[i].ndim == 4 else y.squeeze(-1)
    return found


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
