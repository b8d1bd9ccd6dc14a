"""A ring whose backward pass turns round, so that its last transfer is hidden too.

The forward pass is that of ``ring``.  The block that came last is kept, and the backward pass
begins with it: blocks go the other way, gradients behind them, and the own block comes last,
computed while its gradient comes home.  A plain ring ends with that hop, under nothing; it also
sends one block more.  The price is one block of keys and values held between the passes.  Where
some rank does not need some block, blocks do not travel all the way, and it is a plain ring.

Source: ours, on Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.comm import Done
from cpbench.strategies import ring
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.rotation import travel

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BackwardParts, BoundOperator
    from cpbench.parallel.comm import Comm, Handle
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="ring_reverse",
    summary="a ring that turns round for the backward pass: no transfer is left uncovered",
    source="cpbench, on Ring Attention, arXiv 2310.01889",
    load="cpbench.strategies.ring_reverse:RingReverse",
    merges=True,
    params=("grad_dtype",),
    variants=("grad_dtype=bfloat16",),
)
Block = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class Plan(ring.Plan):
    """Also the operator's plans by owner of the block, where every rank needs every block."""

    by_owner: dict[int, Any] | None = None


class RingReverse(ring.Ring):
    """The strategy; ``grad_dtype`` as for :class:`Ring`."""

    def __init__(self, grad_dtype: str = "float32") -> None:
        super().__init__(grad_dtype)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        steps = super().prepare(op, world, rank).steps
        whole = world.size > 1 and bool((world.areas > 0).all())
        return Plan(steps, {step.source: step.plan for step in steps} if whole else None)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: ring.Plan,
        op: BoundOperator,
        comm: Comm,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        assert isinstance(plan, Plan)
        if plan.by_owner is None:
            return super().forward(q, k, v, plan, op, comm, need_lse)
        parts, last = op.forward_parts(q), (k, v)
        for step, (k_s, v_s) in travel(plan.steps, (k, v), comm):
            parts.add(k_s, v_s, step.plan)
            last = k_s, v_s
        out, lse = parts.finish()
        return out, lse, (q, k, v, out, lse, last)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: ring.Plan, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert isinstance(plan, Plan)
        if plan.by_owner is None:
            return super().backward(dout, saved, plan, op, comm)
        q, k, v, out, lse, last = saved
        parts = op.backward_parts(dout, q, out, lse)
        coming_home = self._others(parts, last, plan.by_owner, op, comm)
        own = op.add_up(None, parts.add(k, v, plan.by_owner[comm.rank]))
        handle, grad = coming_home
        handle.wait()
        dk, dv = own.add_(grad).to(k.dtype)
        return parts.finish(), dk, dv

    def _others(
        self,
        parts: BackwardParts,
        last: Block,
        plans: dict[int, Any],
        op: BoundOperator,
        comm: Comm,
    ) -> tuple[Handle, torch.Tensor]:
        """Work through the blocks of all others, each from the next rank and on to the one before;
        what the others found for the own block is on its way."""
        import torch

        travels = gradient_dtype.dtype(self.grad_dtype)
        after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        here, free = last, list[Block]()
        arriving: torch.Tensor | None = None
        following: Handle = Done()
        for turn in range(1, comm.size):
            coming = here
            moving: Handle = Done()
            if turn < comm.size - 1:
                coming = (
                    free.pop() if free else (torch.empty_like(last[0]), torch.empty_like(last[1]))
                )
                sends, recvs = [(x, before) for x in here], [(x, after) for x in coming]
                moving = comm.exchange(sends, recvs, "keys")
            k_s, v_s = here
            found = parts.add(k_s, v_s, plans[(comm.rank + turn) % comm.size])
            following.wait()
            grad = op.add_up(None if arriving is None else arriving.float(), found)
            arriving = grad.new_empty(grad.shape, dtype=travels)
            sent = [(grad.to(travels), before)]
            following = comm.exchange(sent, [(arriving, after)], "gradients")
            moving.wait()
            if here is not last:  # which another backward pass may start from
                free.append(here)
            here = coming
        assert arriving is not None
        return following, arriving
