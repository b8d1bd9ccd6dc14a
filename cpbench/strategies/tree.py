"""Tree attention: keys stay at home, every rank attends to its own keys with all queries.

The partial results meet in an all-reduce of the largest log-sum-exp and one reduction of
numerator and denominator, whose depth is logarithmic in the ranks.  What moves grows with the
queries and not with the keys: for few queries on long keys (decoding, chunks of a prefill).

Source: Tree Attention (arXiv 2408.04093).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.bound_operator import row_delta
from cpbench.strategies.common.collectives import gather, reduce, tokens_first

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

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

        (q_all,) = gather([tokens_first(q)], comm).wait()
        part_BSHD, part_lse = op.forward(q_all.transpose(0, 1), k, v, plan)
        assert part_lse is not None
        lse_SBH = part_lse.permute(2, 0, 1).contiguous()
        largest = lse_SBH.clone()
        comm.all_reduce(largest, largest=True).wait()
        weight = torch.exp(lse_SBH - largest).nan_to_num_(0.0)  # 0 where nobody sees anything
        sums = torch.cat(
            [part_BSHD.transpose(0, 1) * weight.unsqueeze(-1), weight.unsqueeze(-1)], -1
        )
        (mine,) = reduce([sums], comm).wait()  # numerator and denominator, [L, B, H, D + 1]
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
        wire = [tokens_first(x) for x in (q, dout, *per_row)]
        q_all, dout_all, delta_all, lse_all = (x.transpose(0, 1) for x in gather(wire, comm).wait())
        lse_BHS = lse_all.transpose(1, 2).contiguous()
        parts = op.lent_parts(dout_all, q_all, delta_all, lse_BHS)
        dk, dv = parts.add(k, v, plan)
        (dq,) = reduce([tokens_first(parts.finish(torch.float32))], comm).wait()
        return dq.transpose(0, 1).to(q.dtype), dk, dv
