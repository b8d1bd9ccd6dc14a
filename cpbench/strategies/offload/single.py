"""``single:offload=host``: sequences that do not fit in device memory, on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.parallel.strategy import Saved
from cpbench.strategies.offload import attention
from cpbench.strategies.offload.grid import Grid, plan_grid
from cpbench.strategies.offload.option import Offloaded
from cpbench.strategies.single import Single

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World


class OffloadedSingle(Offloaded):
    """The strategy: all chunks pass through one device."""

    name = "single"

    def unsupported(self, world: World) -> str | None:
        return super().unsupported(world) or Single().unsupported(world)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Grid:
        return plan_grid(op, world.subproblem([0], [0]), self.chunk)

    def forward(
        self, qkv: QKV, plan: Grid, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        out, lse = attention.forward(qkv, plan, op, comm)
        return out, lse, Saved(*qkv, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Grid, op: BoundOperator, comm: Comm
    ) -> Gradients:
        return attention.backward(dout, saved, plan, op, comm)
