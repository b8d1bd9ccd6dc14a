"""Dispatch: every rank receives only the keys that its queries see.

A group-cast sends them in stages: those of the next stage are in transfer while the previous stage
is computed, the first while a rank attends to its local keys.  In the backward pass the keys are
sent again, and a group-reduce returns their gradients stage by stage to their owners, which add
them up.  The plan fixes all messages; the layout ``dispatch`` also balances the work of the ranks
and keeps the traffic low.

``by=node`` sends a key once to each other node, to a rank that needs it and passes it on to the
others there: while a stage is computed, the keys of the next one are passed on inside the nodes and
those of the one after it cross between them.  Gradients go the opposite way, summed in float32
where they leave a node.

Source: MagiAttention's group collectives and multi-stage overlap (https://github.com/SandAI-org/
MagiAttention); the solver is our own (``cpbench.parallel.dispatch_solver``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.partial_results.accumulators import unpacked
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.dispatch.messages import GroupReduce, group_cast
from cpbench.strategies.dispatch.relays import rank_transfers
from cpbench.strategies.dispatch.stages import Plan, Stage, plan_rank

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="dispatch",
    summary="send each rank only the keys that its queries see, in overlapped stages",
    source="MagiAttention's group collectives",
    load="cpbench.strategies.dispatch.strategy:Dispatch",
    layouts=("contiguous", "zigzag", "zigzag_document", "dispatch"),
    value_dims=True,
    merges=True,
    params=("stages", "grad_dtype", "by"),
    variants=("stages=1", "stages=3", "by=node", "by=node,stages=2"),
)

BY = ("rank", "node")


class Dispatch:
    """The strategy.

    Args:
        stages: number of stages in which keys are sent (``by=node``: across nodes, after one with
            keys of the own node only); 0 chooses the best for the plan.
        grad_dtype: in which dK and dV are sent.
        by: whether keys are sent to every ``"rank"`` that needs them, or once to every ``"node"``.
    """

    def __init__(self, stages: int = 0, grad_dtype: str = "float32", by: str = "rank") -> None:
        if stages < 0:
            raise ValueError(f"dispatch: stages = {stages} must be 1 or more, or 0 to choose")
        if by not in BY:
            raise ValueError(f"dispatch: by = {by!r} is not {' or '.join(BY)}")
        self.stages, self.grad_dtype = stages, gradient_dtype.validate("dispatch", grad_dtype)
        self.by = by

    def unsupported(self, world: World) -> str | None:
        return gradient_dtype.refusal("dispatch", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        """Plan the stages; the first one computes with the local keys."""
        if world.size == 1:
            return Plan((Stage(plan=op.prepare(world.subproblem([rank], [rank]))),))
        return plan_rank(op, world, rank, rank_transfers(world, self.stages, self.by == "node"))

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        q, k, v = qkv
        accumulator = op.forward_accumulator(q, v.shape[3])
        for stage, k_s, v_s in group_cast(plan, k, v, comm):
            if stage.plan is not None:
                accumulator.add(k_s, v_s, stage.plan)
        out, lse = accumulator.finish()
        return out, lse, Saved(q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        import torch

        q, k, v, out, lse, _ = saved
        accumulator = op.backward_accumulator(dout, q, out, lse)
        reduce = GroupReduce(plan, gradient_dtype.torch_dtype(self.grad_dtype), comm)
        for stage, k_s, v_s in group_cast(plan, k, v, comm):
            gradients: Sequence[torch.Tensor] = ()
            if stage.plan is not None:
                gradients = accumulator.add(k_s, v_s, stage.plan)
            if stage is plan.stages[0]:
                gradients = gradients or (torch.zeros_like(k), torch.zeros_like(v))
                dk_dv = op.sum_float32(None, gradients)
                reduce.start(unpacked(dk_dv, [k.shape, v.shape]))
            else:
                reduce.add(stage, gradients)
        reduce.finish()
        dk, dv = unpacked(dk_dv.to(k.dtype), [k.shape, v.shape])
        return accumulator.finish(), dk, dv
