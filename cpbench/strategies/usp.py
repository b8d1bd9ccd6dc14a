"""USP: Ulysses inside groups of ranks, a ring across them.

The ranks form a mesh, ``ring`` x ``ulysses``.  By default the Ulysses groups are neighbours, so
that the all-to-all stays inside a node and only keys cross: ``placement`` turns that round.

Source: USP (arXiv 2405.07719).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.mesh import Mesh
from cpbench.strategies.common import gradient_dtype, head_exchange
from cpbench.strategies.ring import Ring

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="usp",
    summary="Ulysses inside groups of ranks, a ring across them",
    source="USP, arXiv 2405.07719",
    load="cpbench.strategies.usp:Usp",
    merges=True,
    params=("ulysses", "grad_dtype"),
    axes=("ring", "ulysses"),
    variants=("ulysses=2",),
)


@dataclass(frozen=True)
class Plan:
    """The groups of one rank, and the plan of the ring."""

    heads_group: tuple[int, ...]
    ring_group: tuple[int, ...]
    ring: Any
    heads_kv: int


class Usp:
    """The strategy.

    Args:
        ulysses: ranks that exchange heads; 0 for as many of a node's as the heads allow.
        grad_dtype: in which dK and dV travel round the ring.
    """

    name = "usp"

    def __init__(self, ulysses: int = 0, grad_dtype: str = "float32") -> None:
        if ulysses < 0:
            raise ValueError(
                f"{self.name}: ulysses = {ulysses} must be a number of ranks, or 0 to choose"
            )
        self.ulysses, self.ring = ulysses, Ring(grad_dtype)

    def unsupported(self, world: World) -> str | None:
        size = head_exchange.group_size(world, self.ulysses)
        if world.size % size:
            return f"{self.name}: ulysses = {size} must divide the {world.size} ranks"
        reason = head_exchange.refusal(self.name, world.problem, size)
        return reason or gradient_dtype.refusal(self.name, self.ring.grad_dtype, world.problem)

    def mesh(self, world: World) -> Mesh:
        """The ranks as a mesh; the axes before ``ulysses`` make up the ring, the last of them its
        windows."""
        size = head_exchange.group_size(world, self.ulysses)
        return world.mesh(ring=world.size // size, ulysses=size)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        mesh = self.mesh(world)
        inner = head_exchange.exchanged(world, mesh.groups("ulysses"))
        ring_group = mesh.group(rank, *mesh.names[:-1])
        ring = Ring(window=mesh.sizes[-2])
        return Plan(
            heads_group=mesh.group(rank, "ulysses"),
            ring_group=ring_group,
            ring=ring.prepare(op, inner, ring_group.index(rank)),
            heads_kv=world.problem.heads_kv,
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
        group = comm.sub(plan.heads_group)
        q_all, k_all, v_all = (
            x.contiguous() for x in head_exchange.qkv_to_heads(q, k, v, group).wait()
        )
        ring = comm.sub(plan.ring_group)
        out_all, lse_all, saved = self.ring.forward(
            q_all, k_all, v_all, plan.ring, op, ring, need_lse
        )
        (out,) = head_exchange.to_tokens([out_all], group).wait()
        lse = (
            head_exchange.lse_to_tokens(lse_all, group)
            if need_lse and lse_all is not None
            else None
        )
        return out, lse, saved

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        group = comm.sub(plan.heads_group)
        (dout_all,) = head_exchange.to_heads([dout], group).wait()
        ring = comm.sub(plan.ring_group)
        grads = self.ring.backward(dout_all, saved, plan.ring, op, ring)
        dq, dk, dv = head_exchange.to_tokens(list(grads), group).wait()
        return (
            dq,
            head_exchange.sum_replicas(dk, plan.heads_kv),
            head_exchange.sum_replicas(dv, plan.heads_kv),
        )
