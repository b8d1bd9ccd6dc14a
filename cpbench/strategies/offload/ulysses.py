"""``ulysses:offload=host``: all-to-all of a chunk of tokens at a time; the tokens of all ranks, of
the heads of this one, are in host memory, and attention is that of one rank.

Source: FPDT (arXiv 2408.16978).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cpbench.core.operator import QKV, nothing_visible, zero_gradients
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import head_shares
from cpbench.strategies.common.head_shares import HeadShares
from cpbench.strategies.offload import attention, exchange
from cpbench.strategies.offload.grid import Grid, plan_grid
from cpbench.strategies.offload.option import DEFAULT_CHUNK, Offloaded

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World
    from cpbench.strategies.common.head_shares import Heads


class Plan(NamedTuple):
    """The grid of the heads of a rank, None without heads, and the heads of all ranks."""

    grid: Grid | None
    shares: HeadShares


class OffloadedUlysses(Offloaded):
    """The strategy.

    A chunk of the grid are ``chunk`` tokens of every rank, of the heads of one: as many bytes as
    ``chunk`` tokens of all heads.

    Args:
        chunk: tokens of a rank that are on the device at a time.
        pad: whether the number of heads need not divide, see ``cpbench.strategies.ulysses``.
    """

    name = "ulysses"

    def __init__(self, chunk: int = DEFAULT_CHUNK, pad: bool = False) -> None:
        super().__init__(chunk)
        self.pad = pad

    def unsupported(self, world: World) -> str | None:
        refusal = head_shares.refusal(self.name, world.problem, world.size, self.pad)
        return super().unsupported(world) or refusal

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        problem, size = world.problem, world.size
        shares = HeadShares.of(problem, size)
        first, last = shares.q[rank]
        if first == last:
            return Plan(None, shares)
        merged = world.merged((tuple(range(size)),), problem.heads_q, problem.heads_kv)
        whole, own_heads = merged.subproblem([0], [0]), shares.attention(merged, rank)
        return Plan(plan_grid(op, whole, self.chunk * size, own_heads), shares)

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        of_heads = (plan.shares.q, plan.shares.kv, plan.shares.kv)
        by_head = QKV(*(self._to_heads(x, s, op, comm) for x, s in zip(qkv, of_heads, strict=True)))
        if plan.grid is None:
            out_all, lse_all = nothing_visible(by_head.q, by_head.v.shape[3])
        else:
            out_all, lse_all = attention.forward(by_head, plan.grid, op, comm)
        out, lse = self._to_tokens(out_all, plan.shares.q, plan.shares.heads_q, op, comm), None
        if need_lse:
            lse_BSH1 = lse_all.transpose(1, 2).unsqueeze(-1)
            local = self._to_tokens(lse_BSH1, plan.shares.q, plan.shares.heads_q, op, comm)
            lse = local.squeeze(-1).transpose(1, 2)
        return out, lse, Saved(*by_head, out_all, lse_all)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        shares = plan.shares
        dout_all = self._to_heads(dout, shares.q, op, comm)
        if plan.grid is None:
            dq, dk, dv = zero_gradients(QKV(*saved[:3]))
        else:
            dq, dk, dv = attention.backward(dout_all, saved, plan.grid, op, comm)
        return (
            self._to_tokens(dq, shares.q, shares.heads_q, op, comm),
            self._to_tokens(dk, shares.kv, shares.heads_kv, op, comm),
            self._to_tokens(dv, shares.kv, shares.heads_kv, op, comm),
        )

    def _to_heads(
        self, x: torch.Tensor, shares: Sequence[Heads], op: BoundOperator, comm: Comm
    ) -> torch.Tensor:
        return exchange.tokens_to_heads(x, shares, self.chunk, op, comm)

    def _to_tokens(
        self, x: torch.Tensor, shares: Sequence[Heads], heads: int, op: BoundOperator, comm: Comm
    ) -> torch.Tensor:
        return exchange.heads_to_tokens(x, shares, self.chunk, op, comm, heads)
