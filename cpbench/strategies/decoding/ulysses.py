"""Ulysses of a batch that is decoded: each rank holds the whole cache of its key/value heads.

The cache stays where it is: a step exchanges the queries of the sequences of a rank for those of
its heads in all sequences, and the results back.  A key/value head whose query heads are on several
ranks is in the cache of each.

Source: DeepSpeed-Ulysses (arXiv 2309.14509), for one token of each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV
from cpbench.parallel import layout as layouts
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import head_exchange, head_shares
from cpbench.strategies.common.head_shares import HeadShares

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World


@dataclass(frozen=True)
class Plan:
    """The heads of all ranks, and the operator's plan for those of this one."""

    shares: HeadShares
    op: Any


class UlyssesDecoding:
    """The strategy.

    Args:
        pad: whether the number of heads need not divide; a key/value head that its query heads
            share unevenly is then in the cache several times.
    """

    def __init__(self, pad: bool = False) -> None:
        self.pad = pad

    def held_heads(self, world: World) -> tuple[tuple[int, ...], ...]:
        """The key/value heads in the cache of each rank."""
        shares = HeadShares.of(world.problem, world.size)
        return tuple(
            tuple(first + head for head in shares.repeated(rank))
            for rank, (first, _) in enumerate(shares.kv)
        )

    def unsupported(self, world: World) -> str | None:
        heads_q = world.problem.heads_q
        if world.size > heads_q:
            return f"ulysses divides the cache by heads: {heads_q} on {world.size} ranks"
        return head_shares.refusal("ulysses", world.problem, world.size, self.pad)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        shares = HeadShares.of(world.problem, world.size)
        first, last = shares.q[rank]
        merged = world.merged(
            (tuple(range(world.size)),), last - first, len(world.held_heads[rank])
        )
        keys = layouts.build("contiguous", world.keys.seq_len, 1)  # without padding
        return Plan(shares, op.prepare(replace(merged, keys=keys).subproblem([0], [0])))

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        q, k, v = qkv
        (q_all,) = head_exchange.tokens_to_heads([q], (plan.shares.q,), comm).wait()
        result = op.forward(QKV(q_all, k, v), plan.op)
        out, lse = head_exchange.result_to_tokens(result, need_lse, plan.shares, comm)
        return out, lse, Saved(q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        raise NotImplementedError("decoding has no backward pass")
