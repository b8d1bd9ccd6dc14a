"""USP: Ulysses inside groups of ranks, a ring across them.

The ranks form a mesh, ``ring`` x ``ulysses``.  By default the Ulysses groups are neighbours, so the
all-to-all stays inside a node and only keys cross nodes; ``placement = "ring"`` is the reverse.

Source: USP (arXiv 2405.07719).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV
from cpbench.core.registry import StrategyInfo
from cpbench.parallel.mesh import Mesh
from cpbench.strategies.common import gradient_dtype, head_exchange
from cpbench.strategies.ring import Ring

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="usp",
    summary="Ulysses inside groups of ranks, a ring across them",
    source="USP, arXiv 2405.07719",
    load="cpbench.strategies.usp:Usp",
    value_dims=True,
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
        grad_dtype: in which dK and dV are sent in the ring.
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
        """The mesh of the ranks: the axes before ``ulysses`` form the ring, the last of them its
        windows."""
        size = head_exchange.group_size(world, self.ulysses)
        return world.mesh(ring=world.size // size, ulysses=size)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        mesh = self.mesh(world)
        inner = head_exchange.world_after_exchange(world, mesh.groups("ulysses"))
        ring_group = mesh.group(rank, *mesh.names[:-1])
        ring = Ring(window=mesh.sizes[-2])
        return Plan(
            heads_group=mesh.group(rank, "ulysses"),
            ring_group=ring_group,
            ring=ring.prepare(op, inner, ring_group.index(rank)),
            heads_kv=world.problem.heads_kv,
        )

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        group, ring = comm.sub(plan.heads_group), comm.sub(plan.ring_group)
        qkv_all = QKV(*(x.contiguous() for x in head_exchange.qkv_to_heads(qkv, group).wait()))
        out_all, lse_all, saved = self.ring.forward(qkv_all, plan.ring, op, ring, need_lse)
        return *head_exchange.result_to_tokens(out_all, lse_all, need_lse, group), saved

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        group = comm.sub(plan.heads_group)
        (dout_all,) = head_exchange.tokens_to_heads([dout], group).wait()
        ring = comm.sub(plan.ring_group)
        grads = self.ring.backward(dout_all, saved, plan.ring, op, ring)
        return head_exchange.gradients_to_tokens(grads, plan.heads_kv, group)
