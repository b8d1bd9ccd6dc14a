"""Ulysses: all-to-all from token shards to head shards, attention over all tokens, and back.

With ``chunks`` above 1 the heads of a rank go in so many turns, so that one chunk is computed while
the next is on its way and the one before it returns.  Head-uniform masks are always balanced.

Source: DeepSpeed-Ulysses (arXiv 2309.14509); chunks of heads as in FPDT (arXiv 2408.16978).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.strategies.common import head_exchange

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="ulysses",
    summary="all-to-all to head shards and back; chunks of heads overlap with computing",
    source="DeepSpeed-Ulysses, arXiv 2309.14509",
    load="cpbench.strategies.ulysses:Ulysses",
    params=("chunks",),
    variants=("chunks=2",),
)


@dataclass(frozen=True)
class Plan:
    """The operator's plan for a chunk of the heads, and the key/value heads of this problem."""

    op: Any
    heads_kv: int


class Ulysses:
    """The strategy.

    Args:
        chunks: turns in which the heads of a rank go.
    """

    def __init__(self, chunks: int = 1) -> None:
        if chunks < 1:
            raise ValueError(f"ulysses: chunks = {chunks} must be 1 or more")
        self.chunks = chunks

    def unsupported(self, world: World) -> str | None:
        reason = head_exchange.refusal("ulysses", world.problem, world.size)
        if reason is None:
            mine_q, mine_kv = head_exchange.local_heads(world.problem, world.size)
            turns_kv = min(self.chunks, mine_kv)
            if mine_q % self.chunks or mine_kv % turns_kv or self.chunks % turns_kv:
                reason = (
                    f"ulysses: chunks = {self.chunks} must divide the {mine_q} query and "
                    f"{mine_kv} key/value heads of a rank (or be a multiple of the latter)"
                )
        return reason

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        mine_q, mine_kv = head_exchange.local_heads(world.problem, world.size)
        chunk = (mine_q // self.chunks, max(mine_kv // self.chunks, 1))
        whole = world.merged((tuple(range(world.size)),), *chunk)
        return Plan(op.prepare(whole.part([0], [0])), world.problem.heads_kv)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Plan,
        op: BoundOperator,
        comm: Comm,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        import torch

        turns = self._turns(q, k, v, comm.size)
        coming = head_exchange.to_heads(turns[0], comm)
        kv: list[torch.Tensor] = []
        chunks: list[Any] = []
        going = []
        for i in range(self.chunks):
            q_all, *kv_all = coming.wait()
            k_all, v_all = kv = kv_all or kv  # chunks that share a key/value head get it once
            if i + 1 < self.chunks:
                coming = head_exchange.to_heads(turns[i + 1], comm)
            out_all, lse_all = op.forward(q_all, k_all, v_all, plan.op)
            going.append(head_exchange.to_tokens([out_all], comm))
            chunks.append((q_all, k_all, v_all, out_all, lse_all))
        out = _joined([pending.wait()[0] for pending in going], comm.size)
        lse = None
        if need_lse and chunks[0][-1] is not None:
            lse = head_exchange.lse_to_tokens(torch.cat([c[-1] for c in chunks], dim=1), comm)
        return out, lse, chunks

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        douts = [[x] for x in _split(dout, comm.size, self.chunks)]
        coming = head_exchange.to_heads(douts[0], comm)
        going = []
        kv: tuple[torch.Tensor, torch.Tensor] | None = None  # of the chunks that share a head
        for i, (q_all, k_all, v_all, out_all, lse_all) in enumerate(saved):
            (dout_all,) = coming.wait()
            if i + 1 < self.chunks:
                coming = head_exchange.to_heads(douts[i + 1], comm)
            dq, dk, dv = op.backward(dout_all, q_all, k_all, v_all, out_all, lse_all, plan.op)
            kv = (dk, dv) if kv is None else (kv[0].float().add_(dk), kv[1].float().add_(dv))
            grads = [dq]
            if i + 1 == self.chunks or saved[i + 1][1] is not k_all:
                grads += [grad.to(dq.dtype) for grad in kv]
                kv = None
            going.append(head_exchange.to_tokens(grads, comm))
        arrived = [pending.wait() for pending in going]
        dq = _joined([grads[0] for grads in arrived], comm.size)
        of_kv = [grads[1:] for grads in arrived if len(grads) > 1]
        dk, dv = (_joined(list(x), comm.size) for x in zip(*of_kv, strict=True))
        return (
            dq,
            head_exchange.sum_replicas(dk, plan.heads_kv),
            head_exchange.sum_replicas(dv, plan.heads_kv),
        )

    def _turns(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int
    ) -> list[list[torch.Tensor]]:
        """What is sent in each turn: a chunk of query heads and, unless an earlier one brought
        them, its key/value heads."""
        k, v = head_exchange.replicated(k, size), head_exchange.replicated(v, size)
        turns_kv = min(self.chunks, k.shape[2] // size)
        turns: list[list[torch.Tensor]] = [[x] for x in _split(q, size, self.chunks)]
        pairs = zip(_split(k, size, turns_kv), _split(v, size, turns_kv), strict=True)
        for i, kv in enumerate(pairs):
            turns[i * (self.chunks // turns_kv)] += kv
        return turns


def _split(x: torch.Tensor, size: int, chunks: int) -> list[torch.Tensor]:
    """The heads of every rank in ``chunks`` parts: ``[B, L, size * h, D]`` each."""
    if chunks == 1:
        return [x]
    by_chunk = x.unflatten(2, (size, chunks, -1))
    return [by_chunk[:, :, :, i].flatten(2, 3) for i in range(chunks)]


def _joined(chunks: list[torch.Tensor], size: int) -> torch.Tensor:
    """The inverse of :func:`_split`."""
    import torch

    if len(chunks) == 1:
        return chunks[0]
    return torch.stack([x.unflatten(2, (size, -1)) for x in chunks], dim=3).flatten(2, 4)
