"""Selector `vsa`: coarse attention between block means, plus attention to the top-k blocks.

Source: Video Sparse Attention, arXiv 2505.13389 (video_sparse_attn): block means attend to block
means, which gives every token of a block the same coarse output; the top-k blocks by the same
scores are attended to in full.  The original blocks are cubes of a video; these are ranges of
tokens, as after its reordering.  The original learns the gate, here a constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.masks.patterns import full
from cpbench.selectors.common.base import Branch, Plan
from cpbench.selectors.common.pooled_keys import PooledKeySelector
from cpbench.selectors.common.pooling import Pool
from cpbench.selectors.common.ranking import (
    block_means,
    qk_scores,
    top_blocks,
)
from cpbench.selectors.selections import Blocks

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="vsa",
        summary="coarse attention between block means, and the top-k blocks by its scores",
        source="Video Sparse Attention, arXiv 2505.13389",
        load="cpbench.selectors.vsa:Vsa",
        masks=("full",),
        params=("block_size", "top_k", "keep", "gate", "kernel"),
        external_lse=False,
        mergeable=False,
        lse_on=(),
        variants=("block_size=16,keep=0.2", "block_size=16,keep=0.2,gate=0.0"),
        selects=True,
        selects_from="pooled_keys",
        selects_for="head",
        looks_ahead="sequence",
    ),
)


class Vsa(PooledKeySelector):
    """For full masks only: the mean of a block includes later tokens than its first.

    Args:
        block_size: tokens per block, of queries and keys.
        keep: share of the blocks to keep; 0 uses ``top_k``.
        top_k: blocks per row, if ``keep`` is 0.
        gate: factor of the coarse output; 0 omits it.
        kernel: see :class:`Selector`.
    """

    name = "vsa"
    branch_kinds = ("blocks", "mask")

    def __init__(
        self,
        block_size: int = 64,
        top_k: int = 32,
        keep: float = 0.1,
        gate: float = 1.0,
        kernel: str = "",
    ) -> None:
        super().__init__(block_size, top_k, keep, kernel)
        self.gate, self.query_block = float(gate), block_size

    def pool_keys(self, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (block_means(k, self.block_size),)

    def needs_all_keys(self) -> str | None:
        if not self.gate:
            return None
        return f"its coarse branch (gate = {self.gate:g}) attends to the means of all values"

    def select_by(
        self, q: torch.Tensor, pooled: tuple[torch.Tensor, ...], plan: Plan
    ) -> tuple[Branch, ...]:
        block = self.block_size
        grid = plan.grid(block, block)
        scores = qk_scores(block_means(q, block), *pooled)
        kept = top_blocks(scores, self.budget(grid), grid)
        branches = [Branch(mask=Blocks(grid, kept))]
        if self.gate:
            pool = Pool(block, block, partial=True)
            coarse = full(
                pool.num_windows(plan.mask.seq_k), seq_q=pool.num_windows(plan.mask.seq_q)
            )
            branches.append(Branch(mask=coarse, gate=self.gate, pool_q=pool, pool_k=pool))
        return tuple(branches)
