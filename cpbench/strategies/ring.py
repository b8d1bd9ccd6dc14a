"""Ring attention: keys and values travel from rank to rank while queries stay.

Keys go only as far as some rank needs them (contiguous causal: no rank before their owner does),
and two receive buffers serve any number of ranks.  In the backward pass the gradient of a rank's
keys follows them one step behind, each rank adding its part, and goes home in one hop.  With a
``window`` it is LoongTrain's double ring.

Source: Ring Attention (arXiv 2310.01889); layouts make it zigzag or striped (arXiv 2311.09431).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.rotation import Following, Step, steps, travel

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="ring",
    summary="keys travel round a ring, overlapped; steps that the mask leaves empty are skipped",
    source="Ring Attention, arXiv 2310.01889",
    load="cpbench.strategies.ring:Ring",
    merges=True,
    params=("grad_dtype", "window"),
    variants=("grad_dtype=bfloat16", "window=2"),
)


@dataclass(frozen=True)
class Plan:
    """The steps of one rank."""

    steps: tuple[Step, ...]


class Ring:
    """The strategy.

    Args:
        grad_dtype: in which dK and dV travel; sums on a rank are float32.
        window: ranks of an inner ring; 0 for one ring of all.
    """

    def __init__(self, grad_dtype: str = "float32", window: int = 0) -> None:
        if window < 0:
            raise ValueError(f"ring: window = {window} must be a number of ranks, or 0 for all")
        self.grad_dtype, self.window = gradient_dtype.checked("ring", grad_dtype), window

    def unsupported(self, world: World) -> str | None:
        if self.window and world.size % self.window:
            return f"ring: window = {self.window} must divide the {world.size} ranks of the ring"
        return gradient_dtype.refusal("ring", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        return Plan(
            steps(
                world.areas > 0,
                rank,
                self.window or world.size,
                lambda source: op.prepare(world.part([rank], [source])),
            )
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Plan,
        op: BoundOperator,
        comm: Comm,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        parts = op.forward_parts(q)
        for step, (k_s, v_s) in travel(plan.steps, (k, v), comm):
            if step.computes:
                parts.add(k_s, v_s, step.plan)
        out, lse = parts.finish()
        return out, lse, (q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, lse = saved
        parts = op.backward_parts(dout, q, out, lse)
        grads = Following((2, *k.shape), gradient_dtype.dtype(self.grad_dtype), op, comm)
        for step, (k_s, v_s) in travel(plan.steps, (k, v), comm):
            grads.add(step, parts.add(k_s, v_s, step.plan) if step.computes else None)
        dk, dv = grads.finish()
        return parts.finish(), dk.to(k.dtype), dv.to(v.dtype)
