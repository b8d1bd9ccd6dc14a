"""BurstAttention: the forward pass is a ring; in the backward pass the queries travel.

The queries' side (q, dout, and per query delta and the log-sum-exp) goes round with dq following
it, while keys, values and their gradients stay at home.  That sends less than dK and dV would with
as many key/value heads as query heads, and more under GQA.

Source: BurstAttention (arXiv 2403.09347), backward communication optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.bound_operator import row_delta
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.rotation import Following, Step, steps, travel
from cpbench.strategies.ring import Ring

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="burst",
    summary="ring forward; backward sends queries round and keeps keys at home: for MHA",
    source="BurstAttention, arXiv 2403.09347",
    load="cpbench.strategies.burst:Burst",
    merges=True,
    params=("grad_dtype", "window"),
    variants=("grad_dtype=bfloat16",),
)


@dataclass(frozen=True)
class Plan:
    """The steps of one rank with travelling keys (forward) and queries (backward)."""

    steps: tuple[Step, ...]
    back: tuple[Step, ...]


class Burst(Ring):
    """The strategy; parameters as for :class:`Ring`, ``grad_dtype`` being that of dQ."""

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:  # type: ignore[override]
        forward = super().prepare(op, world, rank).steps
        back = steps(
            world.areas.T > 0,
            rank,
            self.window or world.size,
            lambda source: op.prepare(world.part([source], [rank])),
        )
        return Plan(forward, back if world.problem.backward else ())

    def backward(
        self,
        dout: torch.Tensor,
        saved: Any,
        plan: Plan,  # type: ignore[override]
        op: BoundOperator,
        comm: Comm,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        q, k, v, out, lse = saved
        grads = Following((1, *q.shape), gradient_dtype.dtype(self.grad_dtype), op, comm)
        own = None
        block = (q, dout, row_delta(dout, out), lse)
        for step, (q_s, dout_s, delta_s, lse_s) in travel(plan.back, block, comm, "queries"):
            found = None
            if step.computes:
                parts = op.lent_parts(dout_s, q_s, delta_s, lse_s)
                own = op.add_up(own, parts.add(k, v, step.plan))
                found = [parts.finish(torch.float32)]
            grads.add(step, found)
        dk, dv = own.to(k.dtype) if own is not None else (torch.zeros_like(k), torch.zeros_like(v))
        return grads.finish()[0].to(q.dtype), dk, dv
