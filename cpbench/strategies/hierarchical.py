"""Hierarchical: heads are exchanged inside a node, keys go from node to node, one copy of each.

As USP with a node's ranks for the Ulysses groups, but where key/value heads are fewer than those
ranks, and so replicated, each replica carries only its slice of the tokens across the slow link,
and the replicas gather the slices inside the node.  Their gradients are summed inside the node
before they go back, again one copy.

Source: 2D attention with KV replication (LoongTrain, arXiv 2406.18485), the replicas' common part
kept off the slow link as in hierarchical collectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.strategies.common import gradient_dtype, head_exchange
from cpbench.strategies.common.collectives import gather, reduce
from cpbench.strategies.common.rotation import Following, Step, steps, travel

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="hierarchical",
    summary="all-to-all inside a node, a ring of nodes; one copy of the keys crosses",
    source="LoongTrain, arXiv 2406.18485",
    load="cpbench.strategies.hierarchical:Hierarchical",
    merges=True,
    axes=("nodes", "local"),
    variants=("local=2",),
    params=("local", "grad_dtype"),
)


@dataclass(frozen=True)
class Plan:
    """The groups of one rank, the replicas of its heads in its node, and the steps of its ring."""

    node: tuple[int, ...]
    across: tuple[int, ...]
    replicas: tuple[int, ...]
    steps: tuple[Step, ...]
    heads_kv: int


class Hierarchical:
    """The strategy.

    Args:
        local: ranks that exchange heads; 0 for those of a node.
        grad_dtype: in which dK and dV travel between nodes.
    """

    def __init__(self, local: int = 0, grad_dtype: str = "float32") -> None:
        if local < 0:
            raise ValueError(
                f"hierarchical: local = {local} must be a number of ranks, or 0 for a node's"
            )
        if grad_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"hierarchical: grad_dtype = {grad_dtype!r} is not float32 or bfloat16"
            )
        self.local, self.grad_dtype = local, gradient_dtype.checked("hierarchical", grad_dtype)

    def unsupported(self, world: World) -> str | None:
        size = self.local or world.ranks_per_node
        if world.size % size:
            return f"hierarchical: local = {size} must divide the {world.size} ranks"
        reason = head_exchange.refusal("hierarchical", world.problem, size)
        return reason or gradient_dtype.refusal("hierarchical", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        size = self.local or world.ranks_per_node
        mesh = world.mesh(nodes=world.size // size, local=size)
        inner = head_exchange.exchanged(world, mesh.groups("local"))
        node, across = mesh.group(rank, "local"), mesh.group(rank, "nodes")
        copies = max(size // world.problem.heads_kv, 1)
        first = node.index(rank) // copies * copies
        me = across.index(rank)
        return Plan(
            node=node,
            across=across,
            replicas=node[first : first + copies],
            steps=steps(
                inner.areas > 0,
                me,
                inner.size,
                lambda source: op.prepare(inner.part([me], [source])),
            ),
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
        node = comm.sub(plan.node)
        q_all, k_all, v_all = head_exchange.qkv_to_heads(q, k, v, node).wait()
        parts = op.forward_parts(q_all)
        for step, keys, values in self._rounds(k_all, v_all, plan, comm):
            parts.add(keys, values, step.plan)
        out_all, lse_all = parts.finish()
        (out,) = head_exchange.to_tokens([out_all], node).wait()
        lse = (
            head_exchange.lse_to_tokens(lse_all, node) if need_lse and lse_all is not None else None
        )
        return out, lse, (q_all, k_all, v_all, out_all, lse_all)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        q_all, k_all, v_all, out_all, lse_all = saved
        node, across, replicas = (comm.sub(g) for g in (plan.node, plan.across, plan.replicas))
        (dout_all,) = head_exchange.to_heads([dout], node).wait()
        parts = op.backward_parts(dout_all, q_all, out_all, lse_all)
        batch, tokens, local_heads, dim = k_all.shape
        thin = (2, tokens // replicas.size, batch, local_heads, dim)
        grads = Following(thin, gradient_dtype.dtype(self.grad_dtype), op, across)
        own = torch.zeros((2, tokens, *thin[2:]), dtype=torch.float32, device=k_all.device)
        for step, keys, values in self._rounds(k_all, v_all, plan, comm, idle=True):
            found: Any = None
            if step.computes:
                dk_dv = [x.transpose(0, 1) for x in parts.add(keys, values, step.plan)]
                if step.source == across.rank:
                    own = op.add_up(None, dk_dv)
                else:
                    found = reduce([x.float().contiguous() for x in dk_dv], replicas).wait()
            grads.add(step, found)
        mine = own.unflatten(1, (replicas.size, -1))[:, replicas.rank]
        mine += grads.finish()
        local = [parts.finish(), *(x.transpose(0, 1).to(k_all.dtype) for x in own)]
        dq, dk, dv = head_exchange.to_tokens(local, node).wait()
        return (
            dq,
            head_exchange.sum_replicas(dk, plan.heads_kv),
            head_exchange.sum_replicas(dv, plan.heads_kv),
        )

    def _rounds(
        self, k: torch.Tensor, v: torch.Tensor, plan: Plan, comm: Comm, idle: bool = False
    ) -> Any:
        """Each step of the ring of nodes with the keys and values of its node, ``[B, T, g, D]``;
        steps that compute nothing only where asked for."""
        across, replicas = comm.sub(plan.across), comm.sub(plan.replicas)
        thin = tuple(
            x.transpose(0, 1).unflatten(0, (replicas.size, -1))[replicas.rank].contiguous()
            for x in (k, v)
        )
        for step, block in travel(plan.steps, thin, across):
            keys, values = k, v
            if step.computes and step.source != across.rank:
                keys, values = (x.transpose(0, 1) for x in gather(block, replicas).wait())
            if step.computes or idle:
                yield step, keys, values
