"""Ulysses: all-to-all from token shards to head shards, attention over all tokens, and back.

With fewer key/value heads than ranks each is replicated to the ranks that need it, and the
gradients of its copies are summed in float32.  Head-uniform masks are always balanced.

Source: DeepSpeed-Ulysses (arXiv 2309.14509).
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
    name="ulysses",
    summary="all-to-all to head shards and back; KV heads are replicated when there are too few",
    source="DeepSpeed-Ulysses, arXiv 2309.14509",
    load="cpbench.strategies.ulysses:Ulysses",
    splits="heads",
)


class Ulysses:
    def unsupported(self, problem: Problem, mask: AttnMask, layout: Layout) -> str | None:
        size, heads_q, heads_kv = layout.world_size, problem.heads_q, problem.heads_kv
        if heads_q % size:
            return f"ulysses needs num_heads_q divisible by the ranks: {heads_q} on {size}"
        if heads_kv % size and size % heads_kv:
            return (
                f"ulysses needs num_heads_kv divisible by the ranks, or the ranks by num_heads_kv "
                f"(then heads are replicated): {heads_kv} on {size}"
            )
        return None

    def prepare(
        self, op: BoundOperator, mask: AttnMask, layout: Layout, problem: Problem, rank: int
    ) -> Any:
        size, tokens = layout.world_size, layout.padded_len
        heads_kv = max(problem.heads_kv // size, 1)
        local = local_problem(problem, tokens, tokens, problem.heads_q // size, heads_kv)
        return op.prepare(layout.gathered_mask(mask), local)

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
        kv_heads = _kv_head_of(k.shape[2], comm.size)
        q_all, k_all, v_all = _to_heads([q, k[:, :, kv_heads], v[:, :, kv_heads]], comm)
        out_all, lse_all = op.forward(q_all, k_all, v_all, plan)
        (out,) = _to_tokens([out_all], comm)
        lse = None
        if need_lse and lse_all is not None:
            (lse_BLH1,) = _to_tokens([lse_all.transpose(1, 2).unsqueeze(-1)], comm)
            lse = lse_BLH1.squeeze(-1).transpose(1, 2)
        return out, lse, (q_all, k_all, v_all, out_all, lse_all, k.shape[2])

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Any, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_all, k_all, v_all, out_all, lse_all, heads_kv = saved
        (dout_all,) = _to_heads([dout], comm)
        grads = op.backward(dout_all, q_all, k_all, v_all, out_all, lse_all, plan)
        dq, dk, dv = _to_tokens(list(grads), comm)
        return dq, _sum_replicas(dk, heads_kv), _sum_replicas(dv, heads_kv)


def _kv_head_of(heads_kv: int, size: int) -> list[int]:
    """Which key/value head stands at each place of the replicated head axis."""
    places = max(heads_kv, size)
    return [place * heads_kv // places for place in range(places)]


def _sum_replicas(grad: torch.Tensor, heads_kv: int) -> torch.Tensor:
    if grad.shape[2] == heads_kv:
        return grad
    total: torch.Tensor = grad.unflatten(2, (heads_kv, -1)).float().sum(3).to(grad.dtype)
    return total


def _to_heads(shards: list[torch.Tensor], comm: Comm) -> list[torch.Tensor]:
    """Token shards ``[B, L, P * h, D]`` to head shards ``[B, P * L, h, D]``, in one all-to-all.

    Tokens lead on the wire, so that what arrives needs no reordering: ``[B, …]`` is a view.
    """
    import torch

    by_rank = [x.unflatten(2, (comm.size, -1)).permute(2, 1, 0, 3, 4) for x in shards]
    wire = torch.cat(by_rank, dim=3).contiguous()
    arrived = torch.empty_like(wire)
    comm.all_to_all(arrived, wire).wait()
    heads = [x.shape[3] for x in by_rank]
    return list(arrived.flatten(0, 1).transpose(0, 1).split(heads, dim=2))


def _to_tokens(by_head: list[torch.Tensor], comm: Comm) -> list[torch.Tensor]:
    """The inverse of :func:`_to_heads`."""
    import torch

    heads = [x.shape[2] for x in by_head]
    wire = torch.cat([x.transpose(0, 1) for x in by_head], dim=2).contiguous()
    wire = wire.unflatten(0, (comm.size, -1))
    arrived = torch.empty_like(wire)
    comm.all_to_all(arrived, wire).wait()
    return [
        x.permute(2, 1, 0, 3, 4).flatten(2, 3).contiguous() for x in arrived.split(heads, dim=3)
    ]
