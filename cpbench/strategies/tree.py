"""Tree attention: keys stay at home, every rank attends to its own keys with all queries.

The partial results meet in an all-reduce of the largest log-sum-exp and one reduction of
numerator and denominator, whose depth is logarithmic in the ranks.  What moves grows with the
queries and not with the keys: for few queries on long keys (decoding, chunks of a prefill).

Source: Tree Attention (arXiv 2408.04093).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.merge import row_delta
from cpbench.registry import StrategyInfo

if TYPE_CHECKING:
    import torch

    from cpbench.comm import Comm
    from cpbench.merge import BoundOperator
    from cpbench.world import World

STRATEGY = StrategyInfo(
    name="tree",
    summary="all queries to all ranks, keys stay; results reduced: for few queries, long keys",
    source="Tree Attention, arXiv 2408.04093",
    load="cpbench.strategies.tree:Tree",
    merges=True,
)


class Tree:
    def unsupported(self, world: World) -> str | None:
        return None

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Any:
        return op.prepare(world.part(range(world.size), [rank]))

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
        import torch

        (q_all,) = _gathered([q], comm)
        part_BSHD, part_lse = op.forward(q_all, k, v, plan)
        assert part_lse is not None
        lse_SBH = part_lse.permute(2, 0, 1).contiguous()
        largest = lse_SBH.clone()
        comm.all_reduce(largest, largest=True).wait()
        weight = torch.exp(lse_SBH - largest).nan_to_num_(0.0)  # 0 where nobody sees anything
        sums = torch.cat(
            [part_BSHD.transpose(0, 1) * weight.unsqueeze(-1), weight.unsqueeze(-1)], -1
        )
        mine = _reduced(sums, comm)  # numerator and denominator, [L, B, H, D + 1]
        denominator = mine[..., -1:]
        out = (mine[..., :-1] / denominator).masked_fill_(denominator == 0, 0.0)
        here = largest.unflatten(0, (comm.size, -1))[comm.rank]
        lse = (here + denominator.squeeze(-1).log()).permute(1, 2, 0).contiguous()
        out = out.transpose(0, 1).to(q.dtype).contiguous()
        return out, lse, (q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Any, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, lse = saved
        import torch

        per_row = [row_delta(dout, out), lse.transpose(1, 2)]
        q_all, dout_all, delta_all, lse_all = _gathered([q, dout, *per_row], comm)
        lse_BHS = lse_all.transpose(1, 2).contiguous()
        parts = op.lent_parts(dout_all, q_all, delta_all, lse_BHS)
        dk, dv = parts.add(k, v, plan)
        dq = _reduced(parts.finish(torch.float32).transpose(0, 1), comm).transpose(0, 1)
        return dq.to(q.dtype), dk, dv


def _gathered(shards: list[torch.Tensor], comm: Comm) -> list[torch.Tensor]:
    """``[B, P * L, …]`` in rank-major order; tokens lead on the wire."""
    wire = [x.transpose(0, 1).contiguous() for x in shards]
    everyone = [x.new_empty((comm.size, *x.shape)) for x in wire]
    handles = [comm.all_gather(out, x) for out, x in zip(everyone, wire, strict=True)]
    for handle in handles:
        handle.wait()
    return [x.flatten(0, 1).transpose(0, 1) for x in everyone]


def _reduced(x_SB: torch.Tensor, comm: Comm) -> torch.Tensor:
    """The local tokens of the sum over ranks."""
    wire = x_SB.contiguous().unflatten(0, (comm.size, -1))
    local: torch.Tensor = wire.new_empty(wire.shape[1:])
    comm.reduce_scatter(local, wire).wait()
    return local
