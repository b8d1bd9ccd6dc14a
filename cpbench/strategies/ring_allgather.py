"""Gather all keys, attend once; in the backward pass gather again and reduce-scatter dK and dV.

Memory is P times the local keys, but there is one operator call and no merging, so any operator
and any mask will do.  Gradients are summed in float32.

Source: Llama 3's context parallelism (arXiv 2407.21783).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.problem import Problem, local_problem
from cpbench.registry import StrategyInfo

if TYPE_CHECKING:
    import torch

    from cpbench.comm import Comm
    from cpbench.layout import Layout
    from cpbench.mask import AttnMask
    from cpbench.merge import BoundOperator

STRATEGY = StrategyInfo(
    name="ring_allgather",
    summary="all-gather the keys, attend once, reduce-scatter their gradients",
    source="Llama 3, arXiv 2407.21783",
    load="cpbench.strategies.ring_allgather:RingAllGather",
)


class RingAllGather:
    def unsupported(self, problem: Problem, mask: AttnMask, layout: Layout) -> str | None:
        return None

    def prepare(
        self, op: BoundOperator, mask: AttnMask, layout: Layout, problem: Problem, rank: int
    ) -> Any:
        local = local_problem(
            problem, layout.local_len, layout.padded_len, problem.heads_q, problem.heads_kv
        )
        return op.prepare(layout.local_mask(mask, rank, range(layout.world_size)), local)

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
        k_all, v_all = _gather(k, v, comm)
        out, lse = op.forward(q, k_all, v_all, plan)
        return out, lse, (q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Any, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, lse = saved
        k_all, v_all = _gather(k, v, comm)
        dq, dk_all, dv_all = op.backward(dout, q, k_all, v_all, out, lse, plan)
        dk, dv = _scatter((dk_all, dv_all), comm)
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _gather(k: torch.Tensor, v: torch.Tensor, comm: Comm) -> list[torch.Tensor]:
    """``[B, P * L, G, D]`` in rank-major order.

    Tokens lead on the wire, so that the gathered keys need no reordering: ``[B, …]`` is a view.
    """
    wire = [x.transpose(0, 1).contiguous() for x in (k, v)]
    everyone = [x.new_empty((comm.size, *x.shape)) for x in wire]
    handles = [comm.all_gather(out, x) for out, x in zip(everyone, wire, strict=True)]
    for handle in handles:
        handle.wait()
    return [x.flatten(0, 1).transpose(0, 1) for x in everyone]


def _scatter(grads: tuple[torch.Tensor, torch.Tensor], comm: Comm) -> list[torch.Tensor]:
    """The sum over ranks of the local part of each, ``[B, L, G, D]`` float32."""
    wire = [x.float().transpose(0, 1).contiguous().unflatten(0, (comm.size, -1)) for x in grads]
    local = [x.new_empty(x.shape[1:]) for x in wire]
    handles = [comm.reduce_scatter(out, x) for out, x in zip(local, wire, strict=True)]
    for handle in handles:
        handle.wait()
    return [x.transpose(0, 1) for x in local]
