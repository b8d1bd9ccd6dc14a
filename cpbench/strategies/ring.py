"""Ring attention: keys and values are sent from rank to rank while queries stay.

Keys are sent only as far as some rank needs them (contiguous causal: no rank before their owner
does), with two receive buffers for any number of ranks.  In the backward pass the gradient of a
rank's keys follows them one step behind, each rank adding its part, and returns to the owner in one
hop.  With a ``window`` it is LoongTrain's double ring.

Source: Ring Attention (arXiv 2310.01889); layouts make it zigzag or striped (arXiv 2311.09431).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.rotation import (
    GradientRotation,
    Rotation,
    plan_rotation,
    rotate_blocks,
)

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="ring",
    summary="ring of keys, overlapped with compute; steps without visible pairs are skipped",
    source="Ring Attention, arXiv 2310.01889",
    load="cpbench.strategies.ring:Ring",
    value_dims=True,
    merges=True,
    params=("grad_dtype", "window"),
    variants=("grad_dtype=bfloat16", "window=2"),
)


@dataclass(frozen=True)
class Plan:
    """The rotation of the keys."""

    keys: Rotation


class Ring:
    """The strategy.

    Args:
        grad_dtype: in which dK and dV are sent; sums on a rank are float32.
        window: ranks of an inner ring; 0 for a single ring.
    """

    def __init__(self, grad_dtype: str = "float32", window: int = 0) -> None:
        if window < 0:
            raise ValueError(f"ring: window = {window} must be a number of ranks, or 0 for all")
        self.grad_dtype, self.window = gradient_dtype.validate("ring", grad_dtype), window

    def unsupported(self, world: World) -> str | None:
        if self.window and world.size % self.window:
            return f"ring: window = {self.window} must divide the {world.size} ranks of the ring"
        return gradient_dtype.refusal("ring", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        return Plan(
            plan_rotation(
                world.areas > 0,
                rank,
                self.window or world.size,
                lambda source: op.prepare(world.subproblem([rank], [source])),
            )
        )

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        q, k, v = qkv
        accumulator = op.forward_accumulator(q, v.shape[3])
        for step, (k_s, v_s) in rotate_blocks(plan.keys, (k, v), comm):
            if step.computes:
                accumulator.add(k_s, v_s, step.plan)
        out, lse = accumulator.finish()
        return out, lse, Saved(q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        q, k, v, out, lse, _ = saved
        accumulator = op.backward_accumulator(dout, q, out, lse)
        gradients = GradientRotation(
            [k.shape, v.shape],
            gradient_dtype.torch_dtype(self.grad_dtype),
            op,
            plan.keys,
            comm,
        )
        for step, (k_s, v_s) in rotate_blocks(plan.keys, (k, v), comm):
            dk_dv = accumulator.add(k_s, v_s, step.plan) if step.computes else None
            gradients.add(step, dk_dv)
        dk, dv = gradients.finish()
        return accumulator.finish(), dk.to(k.dtype), dv.to(v.dtype)
