"""One rank, no communication: the operator alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="single",
    summary="one rank, no communication",
    source="the operator alone",
    load="cpbench.strategies.single:Single",
    layouts=("contiguous",),
)


class Single:
    def unsupported(self, world: World) -> str | None:
        if world.size != 1:
            return f"single runs on 1 rank, not on {world.size}"
        return None

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Any:
        return op.prepare(world.part([0], [0]))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Any,
        op: BoundOperator,
        comm: Comm,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        out, lse = op.forward(q, k, v, plan)
        return out, lse, (q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Any, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, lse = saved
        return op.backward(dout, q, k, v, out, lse, plan)
