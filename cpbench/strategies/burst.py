"""BurstAttention: a ring of keys in the forward pass, a ring of queries in the backward pass.

In the backward pass q, dout and the delta and log-sum-exp of every query rotate, followed by dq,
while keys, values and their gradients stay on their rank.  That sends less than a ring of keys with
as many key/value heads as query heads, and more under GQA.

Source: BurstAttention (arXiv 2403.09347), backward communication optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.partial_results.accumulators import row_delta, unpacked
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.rotation import (
    GradientRotation,
    Rotation,
    plan_rotation,
    rotate_blocks,
)
from cpbench.strategies.ring import Ring

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="burst",
    summary="ring of keys in forward, ring of queries in backward: less traffic for MHA",
    source="BurstAttention, arXiv 2403.09347",
    load="cpbench.strategies.burst:Burst",
    value_dims=True,
    merges=True,
    params=("grad_dtype", "window"),
    variants=("grad_dtype=bfloat16",),
)


@dataclass(frozen=True)
class Plan:
    """The rotations of the keys (forward) and of the queries (backward)."""

    keys: Rotation
    queries: Rotation


class Burst(Ring):
    """The strategy; parameters as for :class:`Ring`, ``grad_dtype`` applies to dQ."""

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:  # type: ignore[override]
        keys = super().prepare(op, world, rank).keys
        if not world.problem.backward:
            return Plan(keys, Rotation((), windows=False))
        queries = plan_rotation(
            world.areas.T > 0,
            rank,
            self.window or world.size,
            lambda source: op.prepare(world.subproblem([source], [rank])),
        )
        return Plan(keys, queries)

    def backward(
        self,
        dout: torch.Tensor,
        saved: Any,
        plan: Plan,  # type: ignore[override]
        op: BoundOperator,
        comm: Comm,
    ) -> Gradients:
        import torch

        q, k, v, out, lse, _ = saved
        dq_rotation = GradientRotation(
            [q.shape], gradient_dtype.torch_dtype(self.grad_dtype), op, plan.queries, comm
        )
        dk_dv = None
        block = (q, dout, row_delta(dout, out), lse)
        rotation = rotate_blocks(plan.queries, block, comm, "queries")
        for step, (q_s, dout_s, delta_s, lse_s) in rotation:
            gradients = None
            if step.computes:
                accumulator = op.backward_accumulator_from_delta(dout_s, q_s, delta_s, lse_s)
                dk_dv = op.sum_float32(dk_dv, accumulator.add(k, v, step.plan))
                gradients = [accumulator.finish(torch.float32)]
            dq_rotation.add(step, gradients)
        dq = dq_rotation.finish()[0].to(q.dtype)
        if dk_dv is None:
            return dq, torch.zeros_like(k), torch.zeros_like(v)
        dk, dv = unpacked(dk_dv.to(k.dtype), [k.shape, v.shape])
        return dq, dk, dv
