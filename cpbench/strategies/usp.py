"""USP: Ulysses inside groups of ranks, a ring or an all-gather of keys across them.

The ranks form a mesh, ``ring`` x ``ulysses``.  By default the Ulysses groups are neighbours, so the
all-to-all stays inside a node and only keys cross nodes; ``placement = "ring"`` is the reverse.

Source: USP (arXiv 2405.07719); across nodes by all-gather as in Llama 3 (arXiv 2407.21783).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV, nothing_visible, zero_gradients
from cpbench.core.registry import StrategyInfo
from cpbench.parallel.mesh import Mesh
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import gradient_dtype, head_exchange, head_shares
from cpbench.strategies.common.head_shares import HeadShares
from cpbench.strategies.ring import Ring
from cpbench.strategies.ring_allgather import RingAllGather

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="usp",
    summary="Ulysses inside groups of ranks, a ring or an all-gather across them",
    source="USP, arXiv 2405.07719",
    load="cpbench.strategies.usp:Usp",
    value_dims=True,
    merges=True,
    params=("ulysses", "grad_dtype", "inner", "stages", "keep", "pad"),
    axes=("ring", "ulysses"),
    variants=(
        "inner=allgather,ulysses=2",
        "inner=allgather,ulysses=2,stages=8,keep=true",
        "ulysses=2,pad=true",
        "inner=allgather,pad=true",
        "ulysses=2",
    ),
)


INNER = ("ring", "allgather")


@dataclass(frozen=True)
class Plan:
    """The groups of one rank, the heads of each rank of the first, and the plan of the ring or
    all-gather of the second; None if the rank has no heads."""

    heads_group: tuple[int, ...]
    ring_group: tuple[int, ...]
    shares: HeadShares
    inner: Any


class Usp:
    """The strategy.

    Args:
        ulysses: ranks that exchange heads; 0 for as many of a node's as the heads allow.
        grad_dtype: in which dK and dV are sent in the ring.
        inner: how keys reach the other ranks that hold the same heads: ``"ring"`` or
            ``"allgather"``.
        stages, keep: of the all-gather, as for ``RingAllGather``.
        pad: as for ``Ulysses``.
    """

    name = "usp"

    def __init__(
        self,
        ulysses: int = 0,
        grad_dtype: str = "float32",
        inner: str = "ring",
        stages: int = 1,
        keep: bool = False,
        pad: bool = False,
    ) -> None:
        if ulysses < 0:
            raise ValueError(
                f"{self.name}: ulysses = {ulysses} must be a number of ranks, or 0 to choose"
            )
        if inner not in INNER:
            raise ValueError(f"{self.name}: inner = {inner!r} is not {' or '.join(INNER)}")
        if inner == "ring" and (stages, keep) != (1, False):
            raise ValueError(f"{self.name}: stages and keep are for inner = allgather")
        if inner == "allgather" and grad_dtype != "float32":
            raise ValueError(
                f"{self.name}: grad_dtype = {grad_dtype} is for inner = ring; an all-gather "
                "returns gradients in float32"
            )
        self.ulysses, self.grad_dtype, self.pad = ulysses, grad_dtype, pad
        self.inner: Ring | RingAllGather = Ring(grad_dtype)
        if inner == "allgather":
            self.inner = RingAllGather(stages, keep)

    def unsupported(self, world: World) -> str | None:
        size = self.group_size(world)
        if world.size % size:
            return f"{self.name}: ulysses = {size} must divide the {world.size} ranks"
        reason = head_shares.refusal(self.name, world.problem, size, self.pad)
        reason = reason or gradient_dtype.refusal(self.name, self.grad_dtype, world.problem)
        if reason is None and isinstance(self.inner, RingAllGather):
            merged, shares = self._exchanged(world)
            of_ranks = (self.inner.unsupported(shares.attention(merged, r)) for r in range(size))
            reason = next(filter(None, of_ranks), None)
        return reason

    def group_size(self, world: World) -> int:
        """The ranks that exchange heads."""
        return head_shares.group_size(world, self.ulysses, self.pad)

    def mesh(self, world: World) -> Mesh:
        """The mesh of the ranks: the axes before ``ulysses`` form the ring, the last of them its
        windows."""
        size = self.group_size(world)
        return world.mesh(ring=world.size // size, ulysses=size)

    def _exchanged(self, world: World) -> tuple[World, HeadShares]:
        """The world in which each Ulysses group is one rank, and the heads of its members."""
        groups = self.mesh(world).groups("ulysses")
        problem = world.problem
        merged = world.merged(groups, problem.heads_q, problem.heads_kv)
        return merged, HeadShares.of(problem, len(groups[0]))

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        mesh = self.mesh(world)
        heads_group = mesh.group(rank, "ulysses")
        ring_group = mesh.group(rank, *mesh.names[:-1])
        merged, shares = self._exchanged(world)
        attention = shares.attention(merged, heads_group.index(rank))
        inner = self.inner
        if isinstance(inner, Ring):
            inner = Ring(self.grad_dtype, window=mesh.sizes[-2])
        plan = None
        if attention.problem.heads_q:
            plan = inner.prepare(op, attention, ring_group.index(rank))
        return Plan(heads_group, ring_group, shares, plan)

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        group, ring = comm.sub(plan.heads_group), comm.sub(plan.ring_group)
        exchanged = head_exchange.qkv_to_heads(qkv, plan.shares, group).wait()
        qkv_all = QKV(*(x.contiguous() for x in exchanged))
        if plan.inner is None:
            result: OutLse = nothing_visible(qkv_all.q, qkv.v.shape[3])
            saved: Any = Saved(*qkv_all, *result)
        else:
            out, lse, saved = self.inner.forward(qkv_all, plan.inner, op, ring, need_lse)
            result = out, lse
        return *head_exchange.result_to_tokens(result, need_lse, plan.shares, group), saved

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        group = comm.sub(plan.heads_group)
        (dout_all,) = head_exchange.tokens_to_heads([dout], (plan.shares.q,), group).wait()
        ring = comm.sub(plan.ring_group)
        if plan.inner is None:
            gradients = zero_gradients(QKV(*saved[:3]))
        else:
            gradients = self.inner.backward(dout_all, saved, plan.inner, op, ring)
        return head_exchange.gradients_to_tokens(gradients, plan.shares, group)
