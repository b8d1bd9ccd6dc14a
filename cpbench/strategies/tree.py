"""Tree attention: keys stay on their rank, which computes all queries against them.

Partial results are combined by an all-reduce of the maximum log-sum-exp and a reduction of
numerator and denominator, of depth logarithmic in the number of ranks.  Traffic grows with the
queries and not with the keys: for few queries on long keys (decoding, chunked prefill).  Fewer
queries than half the ranks are not padded to one for each: they and their results are all-reduced.

Source: Tree Attention (arXiv 2408.04093).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV
from cpbench.core.registry import StrategyInfo
from cpbench.parallel import layout as layouts
from cpbench.parallel.partial_results.accumulators import row_delta
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common.collectives import (
    all_gather_tokens,
    reduce_scatter_tokens,
    to_token_major,
)

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="tree",
    summary="all-gather of queries, keys stay, results are reduced: for few queries on long keys",
    source="Tree Attention, arXiv 2408.04093",
    load="cpbench.strategies.tree:Tree",
    value_dims=True,
    merges=True,
)


@dataclass(frozen=True)
class Plan:
    """The operator's plan, for all queries and the local keys; and how many queries there are, if
    they are few, else 0."""

    op: Any
    few: int

    def own(self, rank: int, tokens: int) -> slice:
        """Where the local queries are among all, without padding if these are few."""
        first, last = rank * tokens, (rank + 1) * tokens
        return slice(min(first, self.few), min(last, self.few)) if self.few else slice(first, last)


class Tree:
    """The strategy."""

    def unsupported(self, world: World) -> str | None:
        return None

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        few = world.queries.seq_len if _are_few(world) else 0
        if few:
            world = replace(world, queries=layouts.build("contiguous", few, 1))
        return Plan(op.prepare(world.subproblem(range(world.queries.world_size), [rank])), few)

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        import torch

        q, k, v = qkv
        own = plan.own(comm.rank, q.shape[1])
        if plan.few:
            q_all = q.new_zeros((plan.few, len(q), *q.shape[2:]))
            q_all[own] = q.transpose(0, 1)[: own.stop - own.start]
            comm.all_reduce(q_all).wait()
        else:
            (q_all,) = all_gather_tokens([to_token_major(q)], comm).wait()
        partial_BSHD, partial_lse = op.forward(QKV(q_all.transpose(0, 1), k, v), plan.op)
        assert partial_lse is not None
        lse_SBH = partial_lse.permute(2, 0, 1).contiguous()
        largest = lse_SBH.clone()
        comm.all_reduce(largest, largest=True).wait()
        weight = torch.exp(lse_SBH - largest).nan_to_num_(0.0)  # 0 where nothing is visible
        sums = torch.cat(
            [partial_BSHD.transpose(0, 1) * weight.unsqueeze(-1), weight.unsqueeze(-1)], -1
        )
        # Numerator and denominator, [L, B, H, Dv + 1].
        if plan.few:
            comm.all_reduce(sums).wait()
            local, local_largest = (_padded(x[own], q.shape[1]) for x in (sums, largest))
        else:
            (local,) = reduce_scatter_tokens([sums], comm).wait()
            local_largest = largest[own]
        denominator = local[..., -1:]
        out = (local[..., :-1] / denominator).masked_fill_(denominator == 0, 0.0)
        lse = (local_largest + denominator.squeeze(-1).log()).permute(1, 2, 0).contiguous()
        out = out.transpose(0, 1).to(q.dtype).contiguous()
        return out, lse, Saved(q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        import torch

        q, k, v, out, lse, _ = saved
        per_query = [row_delta(dout, out), lse.transpose(1, 2)]
        local = [to_token_major(x) for x in (q, dout, *per_query)]
        q_all, dout_all, delta_all, lse_all = (
            x.transpose(0, 1) for x in all_gather_tokens(local, comm).wait()
        )
        lse_BHS = lse_all.transpose(1, 2).contiguous()
        accumulator = op.backward_accumulator_from_delta(dout_all, q_all, delta_all, lse_BHS)
        dk, dv = accumulator.add(k, v, plan.op)
        (dq,) = reduce_scatter_tokens(
            [to_token_major(accumulator.finish(torch.float32))], comm
        ).wait()
        return dq.transpose(0, 1).to(q.dtype), dk, dv


def _are_few(world: World) -> bool:
    """Whether an all-reduce of the queries sends less than a reduce-scatter of one a rank."""
    queries = world.queries
    contiguous = queries.name == "contiguous"
    return contiguous and 2 * queries.seq_len < queries.padded_len and not world.problem.backward


def _padded(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[n, …]`` with zeros up to ``tokens``."""
    padded = x.new_zeros((tokens, *x.shape[1:]))
    padded[: x.shape[0]] = x
    return padded
