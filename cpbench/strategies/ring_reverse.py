"""A ring whose backward pass reverses direction, so that its last transfer is overlapped too.

The forward pass is that of ``ring``.  The block received last is saved, and the backward pass
begins with it: blocks rotate in the other direction, followed by their gradients, and the local
block is computed last, while its gradient returns.  A plain ring ends with that hop exposed, and
sends one more block.  The cost is one block of keys and values held between the passes.  If some
rank does not need some block, blocks do not rotate all the way, and a plain ring is used.

Source: our own, based on Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.comm import CompletedHandle
from cpbench.parallel.partial_results.accumulators import unpacked
from cpbench.parallel.strategy import Saved
from cpbench.strategies import ring
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.rotation import rotate_blocks

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm, Handle
    from cpbench.parallel.partial_results.accumulators import BackwardAccumulator
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="ring_reverse",
    summary="a ring that reverses direction in the backward pass: no exposed last transfer",
    source="cpbench, based on Ring Attention, arXiv 2310.01889",
    load="cpbench.strategies.ring_reverse:RingReverse",
    value_dims=True,
    merges=True,
    params=("grad_dtype",),
    variants=("grad_dtype=bfloat16",),
)
Block = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class Plan(ring.Plan):
    """Adds the operator's plans by owner of the block, if every rank needs every block."""

    by_owner: dict[int, Any] | None = None


class RingReverse(ring.Ring):
    """The strategy; ``grad_dtype`` as for :class:`Ring`."""

    def __init__(self, grad_dtype: str = "float32") -> None:
        super().__init__(grad_dtype)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        keys = super().prepare(op, world, rank).keys
        all_needed = world.size > 1 and bool((world.areas > 0).all())
        return Plan(keys, {step.source: step.plan for step in keys.steps} if all_needed else None)

    def forward(
        self, qkv: QKV, plan: ring.Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        q, k, v = qkv
        assert isinstance(plan, Plan)
        if plan.by_owner is None:
            return super().forward(qkv, plan, op, comm, need_lse)
        accumulator, last = op.forward_accumulator(q, v.shape[3]), (k, v)
        for step, (k_s, v_s) in rotate_blocks(plan.keys, (k, v), comm):
            accumulator.add(k_s, v_s, step.plan)
            last = k_s, v_s
        out, lse = accumulator.finish()
        return out, lse, Saved(q, k, v, out, lse, last)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: ring.Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        assert isinstance(plan, Plan)
        if plan.by_owner is None:
            return super().backward(dout, saved, plan, op, comm)
        q, k, v, out, lse, last = saved
        accumulator = op.backward_accumulator(dout, q, out, lse)
        handle, received = self._reverse_ring(accumulator, last, plan.by_owner, op, comm)
        local = op.sum_float32(None, accumulator.add(k, v, plan.by_owner[comm.rank]))
        handle.wait()
        dk, dv = unpacked(local.add_(received).to(k.dtype), [k.shape, v.shape])
        return accumulator.finish(), dk, dv

    def _reverse_ring(
        self,
        accumulator: BackwardAccumulator,
        last: Block,
        plans: dict[int, Any],
        op: BoundOperator,
        comm: Comm,
    ) -> tuple[Handle, torch.Tensor]:
        """Compute with the blocks of all other ranks, each received from the next rank and sent to
        the previous one; return the pending gradient of the local block."""
        import torch

        send_dtype = gradient_dtype.torch_dtype(self.grad_dtype)
        next_rank, previous_rank = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        current, free = last, list[Block]()
        incoming: torch.Tensor | None = None
        gradient_handle: Handle = CompletedHandle()
        for turn in range(1, comm.size):
            next_block = current
            handle: Handle = CompletedHandle()
            if turn < comm.size - 1:
                if free:
                    next_block = free.pop()
                else:
                    next_block = torch.empty_like(last[0]), torch.empty_like(last[1])
                sends = [(x, previous_rank) for x in current]
                recvs = [(x, next_rank) for x in next_block]
                handle = comm.exchange(sends, recvs, "keys")
            k_s, v_s = current
            dk_dv = accumulator.add(k_s, v_s, plans[(comm.rank + turn) % comm.size])
            gradient_handle.wait()
            grad = op.sum_float32(None if incoming is None else incoming.float(), dk_dv)
            incoming = grad.new_empty(grad.shape, dtype=send_dtype)
            sends = [(grad.to(send_dtype), previous_rank)]
            gradient_handle = comm.exchange(sends, [(incoming, next_rank)], "gradients")
            handle.wait()
            if current is not last:  # saved, as the backward pass may be repeated
                free.append(current)
            current = next_block
        assert incoming is not None
        return gradient_handle, incoming
