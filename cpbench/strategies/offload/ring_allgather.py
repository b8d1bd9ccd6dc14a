"""``ring_allgather:offload=host``: a chunk of every rank's keys is gathered at a time and kept in
host memory, also for the backward pass; gradients are reduce-scattered chunk by chunk in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV
from cpbench.parallel.strategy import Saved
from cpbench.strategies.offload import attention, exchange
from cpbench.strategies.offload.grid import Grid, plan_grid
from cpbench.strategies.offload.option import Offloaded

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World


class OffloadedRingAllGather(Offloaded):
    """The strategy."""

    name = "ring_allgather"

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Grid:
        return plan_grid(op, world.subproblem([rank], range(world.size)), self.chunk)

    def forward(
        self, qkv: QKV, plan: Grid, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        q, k, v = qkv
        k_all, v_all = (exchange.gather(x, self.chunk, op, comm) for x in (k, v))
        out, lse = attention.forward(QKV(q, k_all, v_all), plan, op, comm)
        return out, lse, Saved(q, k_all, v_all, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Grid, op: BoundOperator, comm: Comm
    ) -> Gradients:
        import torch

        if comm.size == 1:
            return attention.backward(dout, saved, plan, op, comm)
        dq, *sums = attention.backward(dout, saved, plan, op, comm, dkv_dtype=torch.float32)
        dk, dv = (exchange.reduce_scatter(x, self.chunk, op, comm, dq.dtype) for x in sums)
        return dq, dk, dv
