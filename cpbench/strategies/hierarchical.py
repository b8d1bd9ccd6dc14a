"""Hierarchical: all-to-all of heads inside a node, a ring of keys across nodes, one copy of each.

As USP with the ranks of a node as Ulysses groups; but if key/value heads are fewer than those ranks
and therefore replicated, each replica sends only its slice of the tokens across nodes, and the
replicas all-gather the slices inside the node.  Their gradients are summed inside the node before
they are returned, again as one copy.

Source: 2D attention with KV replication (LoongTrain, arXiv 2406.18485), with redundant data kept
off the slow link as in hierarchical collectives.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV, zero_gradients
from cpbench.core.registry import StrategyInfo
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import gradient_dtype, head_exchange, head_shares
from cpbench.strategies.common.collectives import all_gather_tokens, reduce_scatter_tokens
from cpbench.strategies.common.head_shares import HeadShares
from cpbench.strategies.common.rotation import (
    GradientRotation,
    Rotation,
    Step,
    plan_rotation,
    rotate_blocks,
)

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
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
    params=("local", "grad_dtype", "pad"),
    variants=("pad=true", "local=2"),
)


@dataclass(frozen=True)
class Slice:
    """What one rank sends across nodes of some of its key/value heads.

    Attributes:
        heads: from the first to before the last, among those of the rank.
        ranks: of its node, that hold the same heads.
        lengths: the tokens that each of these sends.
    """

    heads: tuple[int, int]
    ranks: tuple[int, ...]
    lengths: tuple[int, ...]

    def of(self, x_TBGD: torch.Tensor, rank: int) -> torch.Tensor:
        """The slice of the ``rank``-th of ``ranks``, a view."""
        first = sum(self.lengths[:rank])
        return self.all_tokens(x_TBGD)[first : first + self.lengths[rank]]

    def all_tokens(self, x_TBGD: torch.Tensor) -> torch.Tensor:
        """The heads, a view."""
        return x_TBGD[:, :, self.heads[0] : self.heads[1]]


@dataclass(frozen=True)
class Plan:
    """The groups of one rank, the heads of each rank of its node, and its ring; None without heads.

    Attributes:
        slices: of the ring's blocks: key/value heads by the ranks of the node that hold them.
    """

    node: tuple[int, ...]
    across: tuple[int, ...]
    shares: HeadShares
    slices: tuple[Slice, ...]
    ring: Rotation | None


class Hierarchical:
    """The strategy.

    Args:
        local: ranks that exchange heads; 0 for all ranks of a node.
        grad_dtype: in which dK and dV are sent between nodes.
        pad: as for ``Ulysses``.
    """

    def __init__(self, local: int = 0, grad_dtype: str = "float32", pad: bool = False) -> None:
        if local < 0:
            raise ValueError(
                f"hierarchical: local = {local} must be a number of ranks, or 0 for all of a node"
            )
        self.local, self.grad_dtype = local, gradient_dtype.validate("hierarchical", grad_dtype)
        self.pad = pad

    def unsupported(self, world: World) -> str | None:
        size = self.local or world.ranks_per_node
        if world.size % size and not self.local:
            return (
                f"hierarchical needs equally many ranks on every node, not {world.size} ranks on "
                f"nodes of {size}; set local, which must divide {world.size}"
            )
        if world.size % size:
            return f"hierarchical: local = {size} must divide the {world.size} ranks"
        reason = head_shares.refusal("hierarchical", world.problem, size, self.pad)
        return reason or gradient_dtype.refusal("hierarchical", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        size = self.local or world.ranks_per_node
        mesh = world.mesh(nodes=world.size // size, local=size)
        node, across = mesh.group(rank, "local"), mesh.group(rank, "nodes")
        problem, member, ring_rank = world.problem, node.index(rank), across.index(rank)
        merged = world.merged(mesh.groups("local"), problem.heads_q, problem.heads_kv)
        shares = HeadShares.of(problem, size)
        attention = shares.attention(merged, member)
        if not attention.problem.heads_q:
            return Plan(node, across, shares, (), None)
        tokens = merged.keys.local_len
        slices = []
        for heads, members in shares.replicas(member):
            bounds = [i * tokens // len(members) for i in range(len(members) + 1)]
            lengths = tuple(last - first for first, last in itertools.pairwise(bounds))
            slices.append(Slice(heads, tuple(node[i] for i in members), lengths))
        ring = plan_rotation(
            attention.areas > 0,
            ring_rank,
            attention.size,
            lambda source: op.prepare(attention.subproblem([ring_rank], [source])),
        )
        return Plan(node, across, shares, tuple(slices), ring)

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        node = comm.sub(plan.node)
        q_all, k_all, v_all = head_exchange.qkv_to_heads(qkv, plan.shares, node).wait()
        accumulator = op.forward_accumulator(q_all, v_all.shape[3])
        if plan.ring is not None:
            for step, keys, values in _ring_steps(k_all, v_all, plan, plan.ring, comm):
                accumulator.add(keys, values, step.plan)
        out_all, lse_all = accumulator.finish()
        result = head_exchange.result_to_tokens((out_all, lse_all), need_lse, plan.shares, node)
        return *result, Saved(q_all, k_all, v_all, out_all, lse_all)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        node = comm.sub(plan.node)
        (dout_all,) = head_exchange.tokens_to_heads([dout], (plan.shares.q,), node).wait()
        if plan.ring is None:
            gradients = zero_gradients(QKV(*saved[:3]))
        else:
            gradients = self._backward_of_heads(dout_all, saved, plan, plan.ring, op, comm)
        return head_exchange.gradients_to_tokens(gradients, plan.shares, node)

    def _backward_of_heads(
        self,
        dout_all: torch.Tensor,
        saved: Saved,
        plan: Plan,
        ring: Rotation,
        op: BoundOperator,
        comm: Comm,
    ) -> Gradients:
        """dq, dk, dv of the heads of this rank."""
        import torch

        q_all, k_all, v_all, out_all, lse_all, _ = saved
        across = comm.sub(plan.across)
        accumulator = op.backward_accumulator(dout_all, q_all, out_all, lse_all)
        local_dk_dv = [
            torch.zeros_like(x.transpose(0, 1), dtype=torch.float32) for x in (k_all, v_all)
        ]
        slices = _slices(local_dk_dv, plan, comm)
        gradient_rotation = GradientRotation(
            [x.shape for x in slices],
            gradient_dtype.torch_dtype(self.grad_dtype),
            op,
            ring,
            across,
        )
        for step, keys, values in _ring_steps(k_all, v_all, plan, ring, comm, idle=True):
            gradients: Any = None
            if step.computes:
                dk_dv = [x.transpose(0, 1) for x in accumulator.add(keys, values, step.plan)]
                if step.source == across.rank:
                    for local, gradient in zip(local_dk_dv, dk_dv, strict=True):
                        local.copy_(gradient)
                else:
                    gradients = _sum_replicas(dk_dv, plan, comm)
            gradient_rotation.add(step, gradients)
        for own_slice, received in zip(slices, gradient_rotation.finish(), strict=True):
            own_slice += received
        dk, dv = (x.transpose(0, 1).to(k_all.dtype) for x in local_dk_dv)
        return accumulator.finish(), dk, dv


def _slices(kv_TBGD: Sequence[torch.Tensor], plan: Plan, comm: Comm) -> tuple[torch.Tensor, ...]:
    """What this rank sends across nodes: for each slice, that of each tensor; views."""
    return tuple(part.of(x, part.ranks.index(comm.rank)) for part in plan.slices for x in kv_TBGD)


def _ring_steps(
    k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Rotation, comm: Comm, idle: bool = False
) -> Iterator[tuple[Step, torch.Tensor, torch.Tensor]]:
    """Iterate over the steps of the ring of nodes with their keys and values, ``[B, T, g, D]``;
    ``idle`` includes steps without computation."""
    across = comm.sub(plan.across)
    block = tuple(
        x.contiguous() for x in _slices((k.transpose(0, 1), v.transpose(0, 1)), plan, comm)
    )
    for step, received in rotate_blocks(ring, block, across):
        keys, values = k, v
        if step.computes and step.source != across.rank:
            keys, values = _gather_replicas(received, plan, comm)
        if step.computes or idle:
            yield step, keys, values


def _gather_replicas(block: Sequence[torch.Tensor], plan: Plan, comm: Comm) -> list[torch.Tensor]:
    """Gather the keys and values of a node, ``[B, T, g, D]``, from the ranks that received them."""
    import torch

    pending = [
        all_gather_tokens(block[2 * i : 2 * i + 2], comm.sub(part.ranks), part.lengths)
        for i, part in enumerate(plan.slices)
    ]
    kv = zip(*(gathered.wait() for gathered in pending), strict=True)
    joined = (heads[0] if len(heads) == 1 else torch.cat(heads, dim=2) for heads in kv)
    return [x.transpose(0, 1) for x in joined]


def _sum_replicas(dk_dv_TBGD: Sequence[torch.Tensor], plan: Plan, comm: Comm) -> list[torch.Tensor]:
    """Sum gradients over the ranks that hold the same heads; each gets its slice, float32."""
    pending = [
        reduce_scatter_tokens(
            [part.all_tokens(x).float().contiguous() for x in dk_dv_TBGD],
            comm.sub(part.ranks),
            part.lengths,
        )
        for part in plan.slices
    ]
    return [x for scattered in pending for x in scattered.wait()]
