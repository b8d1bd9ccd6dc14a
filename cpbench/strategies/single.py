"""One rank, no communication: the operator alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.problem import Problem
from cpbench.registry import StrategyInfo

if TYPE_CHECKING:
    import torch

    from cpbench.comm import Comm
    from cpbench.layout import Layout
    from cpbench.mask import AttnMask
    from cpbench.merge import BoundOperator

STRATEGY = StrategyInfo(
    name="single",
    summary="one rank, no communication",
    source="the operator alone",
    load="cpbench.strategies.single:Single",
    layouts=("contiguous",),
)


class Single:
    def unsupported(self, problem: Problem, mask: AttnMask, layout: Layout) -> str | None:
        if layout.world_size != 1:
            return f"single runs on 1 rank, not on {layout.world_size}"
        return None

    def prepare(
        self, op: BoundOperator, mask: AttnMask, layout: Layout, problem: Problem, rank: int
    ) -> Any:
        return op.prepare(mask, problem)

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
