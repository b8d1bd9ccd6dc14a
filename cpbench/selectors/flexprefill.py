"""Selector `flexprefill`: for each head, whether pooled blocks tell enough, or lines must.

Source: FlexPrefill, arXiv 2502.20766, and its code (get_active_blocks).  The last block of queries
is the judge: where the attention that mean keys predict for its mean query is close (square root of
the Jensen-Shannon divergence below tau) to what it truly gives each block, the head is query-aware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selecting
from cpbench.selectors.common.ranking import at_least, block_means, highest, in_blocks, products
from cpbench.selectors.common.selection import Blocks, Grid
from cpbench.selectors.minference import by_distance, last_probs

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="flexprefill",
        summary="per head, blocks by pooled attention or columns and diagonals of blocks",
        source="FlexPrefill, arXiv 2502.20766",
        load="cpbench.selectors.flexprefill:FlexPrefill",
        masks=("causal",),
        params=("block_size", "gamma", "tau", "min_budget", "kernel"),
        external_lse=False,
        variants=("block_size=16,min_budget=32", "block_size=16,min_budget=32,tau=1.0,gamma=0.4"),
        selects=True,
        looks_ahead="sequence",
    ),
)


class FlexPrefill(Selecting):
    """Columns and diagonals of blocks for every head: the fewest tokens that hold gamma of the last
    queries' attention, or ``min_budget`` of them in heads that are query-aware.  Those also take,
    over all their rows together, the blocks with the highest pooled attention, up to gamma of it.
    (The original computes sequences of a block or two in full.)

    Args:
        block_size: tokens of a block, of queries and keys.
        gamma: share of the attention to cover.
        tau: largest distance at which a head is query-aware; 0 is never.
        min_budget: least tokens of columns, and of diagonals.
        kernel: see :class:`Selecting`.
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
        at_least(self.name, 1, block_size=block_size, min_budget=min_budget)
        for key, value in (("gamma", gamma), ("tau", tau)):
            if not 0 <= value <= 1:
                raise ValueError(f"flexprefill: {key} = {value} must be from 0 to 1")
        self.block_size, self.gamma, self.tau, self.min_budget = block_size, gamma, tau, min_budget

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        block, n, scale = self.block_size, k.shape[1], plan.problem.softmax_scale
        cells = plan.cells(block, block)
        last = min(block, n)
        probs = last_probs(q, k, last, scale)
        columns, diagonals = probs.mean(2), by_distance(probs) / last
        of_columns, of_diagonals = (in_blocks(x, block, 2).sum(3) for x in (columns, diagonals))

        keys = block_means(k, block)
        judge = block_means(q[:, -last:], last)
        pooled = torch.softmax(products(judge, keys)[:, :, 0] * scale, -1)
        aware = _divergence(pooled, of_columns).sqrt() < self.tau  # [B, H]

        least = min(-(-self.min_budget // block), of_columns.shape[2])
        counts = []
        for mass in (columns, diagonals):
            wanted = _cover(mass, self.gamma) // block + 1
            wanted = wanted.clamp(min=least, max=of_columns.shape[2])
            counts.append(torch.where(aware, least, wanted))
        of_columns[..., 0], of_diagonals[..., 0] = torch.inf, torch.inf
        lines = highest(of_columns, counts[0])[:, :, None]
        offset = torch.arange(len(cells.areas), device=q.device)
        away = (offset[:, None] - offset).clamp(min=0)
        kept = lines | highest(of_diagonals, counts[1])[:, :, away]
        if bool(aware.any()):
            scores = products(block_means(q, block), keys) * scale
            kept |= _by_pooled(scores, cells, self.gamma) & aware[:, :, None, None]
        return (Branch(seen=Blocks(cells, kept & cells.allowed)),)


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon, natural logarithm; 0 log 0 is 0."""
    import torch

    mean = (p + q) / 2
    first, second = (torch.special.xlogy(x, x) - torch.special.xlogy(x, mean) for x in (p, q))
    found: torch.Tensor = (first + second).sum(-1) / 2
    return found.clamp(min=0)


def _cover(mass: torch.Tensor, share: float) -> torch.Tensor:
    """``[B, H]``: how many of the largest hold more than a share."""
    ordered = mass.sort(dim=-1, descending=True).values.cumsum(-1)
    return (ordered <= share).sum(-1) + 1


def _by_pooled(scores: torch.Tensor, cells: Grid, share: float) -> torch.Tensor:
    """Over all rows of a head together, the blocks of highest pooled attention."""
    import torch

    probs = torch.softmax(scores.masked_fill(~cells.allowed, -torch.inf), -1)
    flat = probs.flatten(2)
    ordered = flat.sort(dim=-1, descending=True, stable=True)
    taken = ordered.values.cumsum(-1) <= share * len(cells.areas)
    found = torch.zeros_like(flat, dtype=torch.bool).scatter_(2, ordered.indices, taken)
    return found.view(probs.shape)
