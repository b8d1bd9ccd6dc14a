"""Hierarchical: all-to-all of heads inside a node, a ring of keys across nodes, one copy of each.

As USP with the ranks of a node as Ulysses groups; but if key/value heads are fewer than those ranks
and therefore replicated, each replica sends only its slice of the tokens across nodes, and the
replicas all-gather the slices inside the node.  Their gradients are summed inside the node before
they are returned, again as one copy.

Source: 2D attention with KV replication (LoongTrain, arXiv 2406.18485), with redundant data kept
off the slow link as in hierarchical collectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import gradient_dtype, head_exchange
from cpbench.strategies.common.collectives import all_gather_tokens, reduce_scatter_tokens
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
    name="hierarchical",
    summary="all-to-all inside a node, a ring across nodes that sends one copy of the keys",
    source="LoongTrain, arXiv 2406.18485",
    load="cpbench.strategies.hierarchical:Hierarchical",
    value_dims=True,
    merges=True,
    axes=("nodes", "local"),
    variants=("local=2",),
    params=("local", "grad_dtype"),
)


@dataclass(frozen=True)
class Plan:
    """The groups of one rank, the replicas of its heads in its node, and its ring."""

    node: tuple[int, ...]
    across: tuple[int, ...]
    replicas: tuple[int, ...]
    ring: Rotation
    heads_kv: int


class Hierarchical:
    """The strategy.

    Args:
        local: ranks that exchange heads; 0 for all ranks of a node.
        grad_dtype: in which dK and dV are sent between nodes.
    """

    def __init__(self, local: int = 0, grad_dtype: str = "float32") -> None:
        if local < 0:
            raise ValueError(
                f"hierarchical: local = {local} must be a number of ranks, or 0 for all of a node"
            )
        self.local, self.grad_dtype = local, gradient_dtype.validate("hierarchical", grad_dtype)

    def unsupported(self, world: World) -> str | None:
        size = self.local or world.ranks_per_node
        if world.size % size and not self.local:
            return (
                f"hierarchical needs equally many ranks on every node, not {world.size} ranks on "
                f"nodes of {size}; set local, which must divide {world.size}"
            )
        if world.size % size:
            return f"hierarchical: local = {size} must divide the {world.size} ranks"
        reason = head_exchange.refusal("hierarchical", world.problem, size)
        return reason or gradient_dtype.refusal("hierarchical", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        size = self.local or world.ranks_per_node
        mesh = world.mesh(nodes=world.size // size, local=size)
        inner = head_exchange.world_after_exchange(world, mesh.groups("local"))
        node, across = mesh.group(rank, "local"), mesh.group(rank, "nodes")
        copies = max(size // world.problem.heads_kv, 1)
        first = node.index(rank) // copies * copies
        ring_rank = across.index(rank)
        return Plan(
            node=node,
            across=across,
            replicas=node[first : first + copies],
            ring=plan_rotation(
                inner.areas > 0,
                ring_rank,
                inner.size,
                lambda source: op.prepare(inner.subproblem([ring_rank], [source])),
            ),
            heads_kv=world.problem.heads_kv,
        )

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        node = comm.sub(plan.node)
        q_all, k_all, v_all = head_exchange.qkv_to_heads(qkv, node).wait()
        accumulator = op.forward_accumulator(q_all, v_all.shape[3])
        for step, keys, values in self._ring_steps(k_all, v_all, plan, comm):
            accumulator.add(keys, values, step.plan)
        out_all, lse_all = accumulator.finish()
        out, lse = head_exchange.result_to_tokens(out_all, lse_all, need_lse, node)
        return out, lse, Saved(q_all, k_all, v_all, out_all, lse_all)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        import torch

        q_all, k_all, v_all, out_all, lse_all, _ = saved
        node, across, replicas = (
            comm.sub(ranks) for ranks in (plan.node, plan.across, plan.replicas)
        )
        (dout_all,) = head_exchange.tokens_to_heads([dout], node).wait()
        accumulator = op.backward_accumulator(dout_all, q_all, out_all, lse_all)
        local_dk_dv = [
            torch.zeros_like(x.transpose(0, 1), dtype=torch.float32) for x in (k_all, v_all)
        ]
        slices = [x.unflatten(0, (replicas.size, -1))[replicas.rank] for x in local_dk_dv]
        gradient_rotation = GradientRotation(
            [x.shape for x in slices],
            gradient_dtype.torch_dtype(self.grad_dtype),
            op,
            plan.ring,
            across,
        )
        for step, keys, values in self._ring_steps(k_all, v_all, plan, comm, idle=True):
            gradients: Any = None
            if step.computes:
                dk_dv = [x.transpose(0, 1) for x in accumulator.add(keys, values, step.plan)]
                if step.source == across.rank:
                    for local, gradient in zip(local_dk_dv, dk_dv, strict=True):
                        local.copy_(gradient)
                else:
                    sums = [x.float().contiguous() for x in dk_dv]
                    gradients = reduce_scatter_tokens(sums, replicas).wait()
            gradient_rotation.add(step, gradients)
        for own_slice, received in zip(slices, gradient_rotation.finish(), strict=True):
            own_slice += received
        dk, dv = (x.transpose(0, 1).to(k_all.dtype) for x in local_dk_dv)
        gradients_by_head = (accumulator.finish(), dk, dv)
        return head_exchange.gradients_to_tokens(gradients_by_head, plan.heads_kv, node)

    def _ring_steps(
        self, k: torch.Tensor, v: torch.Tensor, plan: Plan, comm: Comm, idle: bool = False
    ) -> Any:
        """Iterate over the steps of the ring of nodes with their keys and values, ``[B, T, g, D]``;
        ``idle`` includes steps without computation."""
        across, replicas = comm.sub(plan.across), comm.sub(plan.replicas)
        kv_slice = tuple(
            x.transpose(0, 1).unflatten(0, (replicas.size, -1))[replicas.rank].contiguous()
            for x in (k, v)
        )
        for step, block in rotate_blocks(plan.ring, kv_slice, across):
            keys, values = k, v
            if step.computes and step.source != across.rank:
                keys, values = (
                    x.transpose(0, 1) for x in all_gather_tokens(block, replicas).wait()
                )
            if step.computes or idle:
                yield step, keys, values
