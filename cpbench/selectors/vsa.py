"""Selector `vsa`: attention between means of blocks, and the blocks that it favours.

Source: Video Sparse Attention, arXiv 2505.13389 (video_sparse_attn): means of blocks attend to
means of blocks, which gives a coarse output to every token of a block; the top-k blocks by the same
scores are attended to in full.  Its blocks are cubes of a video; here they are runs of tokens, as
after its reordering.  Its gate is learned, here a constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.masks.patterns import full
from cpbench.selectors.common.base import Branch, Plan, Selecting
from cpbench.selectors.common.pooling import Pool
from cpbench.selectors.common.ranking import (
    at_least,
    block_means,
    budget,
    counts,
    products,
    top,
)
from cpbench.selectors.common.selection import Blocks

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="vsa",
        summary="means of blocks as a coarse output, and the top-k blocks by their scores",
        source="Video Sparse Attention, arXiv 2505.13389",
        load="cpbench.selectors.vsa:Vsa",
        masks=("full",),
        params=("block_size", "top_k", "keep", "gate", "kernel"),
        external_lse=False,
        mergeable=False,
        lse_on=(),
        variants=("block_size=16,keep=0.2", "block_size=16,keep=0.2,gate=0.0"),
        selects=True,
        looks_ahead="sequence",
    ),
)


class Vsa(Selecting):
    """For full masks: the mean of a block knows the future of its first token.

    Args:
        block_size: tokens of a block, of queries and keys.
        keep: share of the blocks to keep; 0 keeps ``top_k``.
        top_k: blocks to keep, where ``keep`` is 0.
        gate: of the coarse output; 0 leaves it out.
        kernel: see :class:`Selecting`.
    """

    name = "vsa"
    forms = ("blocks", "mask")

    def __init__(
        self,
        block_size: int = 64,
        top_k: int = 32,
        keep: float = 0.1,
        gate: float = 1.0,
        kernel: str = "",
    ) -> None:
        super().__init__(kernel)
        at_least(self.name, 1, block_size=block_size)
        budget(self.name, top_k, keep)
        self.block_size, self.top_k, self.keep, self.gate = block_size, top_k, keep, float(gate)

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        block = self.block_size
        cells = plan.cells(block, block)
        scores = products(block_means(q, block), block_means(k, block))
        kept = top(scores, counts(cells.visible, self.top_k, self.keep), cells)
        found = [Branch(seen=Blocks(cells, kept))]
        if self.gate:
            pool = Pool(block, block, partial=True)
            seen = full(pool.count(plan.mask.seq_k), seq_q=pool.count(plan.mask.seq_q))
            found.append(Branch(seen=seen, gate=self.gate, pool_q=pool, pool_k=pool))
        return tuple(found)
