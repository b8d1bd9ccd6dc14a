"""Selector `flexprefill`: per head, columns and diagonals of blocks, and blocks by pooled scores.

Source: FlexPrefill, arXiv 2502.20766, and its code (get_active_blocks).  The last block of queries
decides: if the pooled attention of its mean query over mean keys is close to its true attention
summed over blocks (square root of the Jensen-Shannon divergence below tau), the head is query-aware
and also takes blocks by pooled attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selector
from cpbench.selectors.common.ranking import (
    block_means,
    check_minimum,
    qk_scores,
    split_into_blocks,
    top_k_mask,
)
from cpbench.selectors.minference import last_query_probs, sum_by_distance
from cpbench.selectors.selections import Blocks, Grid

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="flexprefill",
        summary="per head, columns and diagonals of blocks, and blocks by pooled attention",
        source="FlexPrefill, arXiv 2502.20766",
        load="cpbench.selectors.flexprefill:FlexPrefill",
        masks=("causal",),
        params=("block_size", "gamma", "tau", "min_budget", "kernel"),
        external_lse=False,
        variants=("block_size=16,min_budget=32", "block_size=16,min_budget=32,tau=1.0,gamma=0.4"),
        selects=True,
        selects_for="head",
        looks_ahead="sequence",
    ),
)


class FlexPrefill(Selector):
    """Columns and diagonals of blocks for every head: the fewest tokens that hold a share gamma of
    the last queries' attention, or ``min_budget`` of them in query-aware heads.  Query-aware heads
    also take the blocks with the highest pooled attention, over all rows together, up to a share
    gamma of it.  (The original computes sequences of one or two blocks in full.)

    Args:
        block_size: tokens per block, of queries and keys.
        gamma: share of the attention to cover.
        tau: distance below which a head is query-aware; 0 is never.
        min_budget: minimum tokens of columns, and of diagonals.
        kernel: see :class:`Selector`.
    """

    name = "flexprefill"

    def __init__(
        self,
        block_size: int = 128,
        gamma: float = 0.9,
        tau: float = 0.1,
        min_budget: int = 1024,
        kernel: str = "",
    ) -> None:
        super().__init__(kernel)
        check_minimum(self.name, 1, block_size=block_size, min_budget=min_budget)
        for key, value in (("gamma", gamma), ("tau", tau)):
            if not 0 <= value <= 1:
                raise ValueError(f"flexprefill: {key} = {value} must be from 0 to 1")
        self.block_size, self.gamma, self.tau, self.min_budget = block_size, gamma, tau, min_budget

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        block, n, scale = self.block_size, k.shape[1], plan.problem.softmax_scale
        grid = plan.grid(block, block)
        last = min(block, n)
        probs = last_query_probs(q, k, last, scale)
        key_mass, distance_mass = probs.mean(2), sum_by_distance(probs) / last
        column_mass, diagonal_mass = (
            split_into_blocks(mass, block, 2).sum(3) for mass in (key_mass, distance_mass)
        )

        mean_k = block_means(k, block)
        last_mean_q = block_means(q[:, -last:], last)
        pooled_probs = torch.softmax(qk_scores(last_mean_q, mean_k)[:, :, 0] * scale, -1)
        distance = _js_divergence(pooled_probs, column_mass).sqrt()
        query_aware = distance < self.tau  # [B, H]

        min_count = min(-(-self.min_budget // block), column_mass.shape[2])
        counts = []
        for mass in (key_mass, distance_mass):
            count = _top_p_count(mass, self.gamma) // block + 1
            count = count.clamp(min=min_count, max=column_mass.shape[2])
            counts.append(torch.where(query_aware, min_count, count))
        column_mass[..., 0], diagonal_mass[..., 0] = torch.inf, torch.inf
        columns = top_k_mask(column_mass, counts[0])[:, :, None]
        position = torch.arange(len(grid.areas), device=q.device)
        block_distance = (position[:, None] - position).clamp(min=0)
        kept = columns | top_k_mask(diagonal_mass, counts[1])[:, :, block_distance]
        if bool(query_aware.any()):
            scores = qk_scores(block_means(q, block), mean_k) * scale
            kept |= _top_pooled_blocks(scores, grid, self.gamma) & query_aware[:, :, None, None]
        return (Branch(mask=Blocks(grid, kept & grid.allowed)),)


def _js_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence along the last axis, natural logarithm; 0 log 0 is 0."""
    import torch

    mean = (p + q) / 2
    first, second = (torch.special.xlogy(x, x) - torch.special.xlogy(x, mean) for x in (p, q))
    divergence: torch.Tensor = (first + second).sum(-1) / 2
    return divergence.clamp(min=0)


def _top_p_count(mass: torch.Tensor, share: float) -> torch.Tensor:
    """``[B, H]``: how many of the largest values sum to more than a share."""
    cumulative = mass.sort(dim=-1, descending=True).values.cumsum(-1)
    return (cumulative <= share).sum(-1) + 1


def _top_pooled_blocks(scores: torch.Tensor, grid: Grid, share: float) -> torch.Tensor:
    """The blocks with the highest pooled attention, ranked over all rows of a head together."""
    import torch

    probs = torch.softmax(scores.masked_fill(~grid.allowed, -torch.inf), -1)
    flat = probs.flatten(2)
    ranked = flat.sort(dim=-1, descending=True, stable=True)
    in_top = ranked.values.cumsum(-1) <= share * len(grid.areas)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(2, ranked.indices, in_top)
    return kept.view(probs.shape)
