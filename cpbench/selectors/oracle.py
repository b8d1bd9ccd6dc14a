"""Selector `oracle`: the blocks that hold the most attention, which only full attention tells.

Nothing that keeps as many blocks of the same size recovers more: it is what others are held
against, not a method.  It computes all scores, so it saves no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selecting
from cpbench.selectors.common.ranking import (
    at_least,
    block_sums,
    budget,
    counts,
    probabilities,
    spans,
    top,
)
from cpbench.selectors.common.selection import Blocks, Grid, visible

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="oracle",
        summary="blocks with the most true attention mass: the bound for every selector",
        source="attention mass of blocks, from the definition",
        load="cpbench.selectors.oracle:Oracle",
        params=("block_size", "top_k", "keep", "kernel"),
        external_lse=False,
        variants=("block_size=16,keep=0.3",),
        selects=True,
        looks_ahead="block",
    ),
)


class Oracle(Selecting):
    """Each block of queries keeps the blocks of keys with the largest sums of probabilities.

    Args:
        block_size: tokens of a block, of queries and keys.
        keep: share of the visible blocks of each row to keep; 0 keeps ``top_k``.
        top_k: blocks to keep, where ``keep`` is 0.
        kernel: see :class:`Selecting`.
    """

    name = "oracle"

    def __init__(
        self, block_size: int = 64, top_k: int = 16, keep: float = 0.1, kernel: str = ""
    ) -> None:
        super().__init__(kernel)
        at_least(self.name, 1, block_size=block_size)
        budget(self.name, top_k, keep)
        self.block_size, self.top_k, self.keep = block_size, top_k, keep

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        cells = plan.cells(self.block_size, self.block_size)
        mass = block_mass(q, k, cells, plan.problem.softmax_scale)
        kept = top(mass, counts(cells.visible, self.top_k, self.keep), cells)
        return (Branch(seen=Blocks(cells, kept)),)


def block_mass(q: torch.Tensor, k: torch.Tensor, cells: Grid, scale: float) -> torch.Tensor:
    """``[B, H, X, Y]``: probabilities of full attention within the mask, summed over blocks."""
    import torch

    mask, (b, s, h, _), t = cells.mask, q.shape, k.shape[1]
    found = []
    for begin, end in spans(s, b * h * t, q.device, cells.block_q):
        seen = visible(mask, begin, end, q.device)
        probs = probabilities(q[:, begin:end], k, seen, scale)
        found.append(block_sums(probs, cells.block_q, cells.block_k))
    return torch.cat(found, 2)
