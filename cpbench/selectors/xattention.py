"""Selector `xattention`: blocks by antidiagonal scores, up to a share of the estimated mass.

Source: XAttention, arXiv 2503.16428 (its xattn_estimate and find_blocks_chunked).  With stride s,
a group of s queries and a group of s keys have one score, the sum of the products along the
antidiagonal of their s x s square; softmax over a row of groups; sums over blocks; then the fewest
blocks that hold the share (top-p), with the first and the diagonal block forced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selector
from cpbench.selectors.common.ranking import (
    block_sums,
    check_minimum,
    first_blocks,
    probabilities,
    row_chunks,
    split_into_blocks,
    top_p_blocks,
    upcast,
)
from cpbench.selectors.selections import Blocks, visible_end

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="xattention",
        summary="blocks by antidiagonal scores, up to a share of the estimated mass (top-p)",
        source="XAttention, arXiv 2503.16428",
        load="cpbench.selectors.xattention:XAttention",
        params=("block_size", "stride", "threshold", "kernel"),
        external_lse=False,
        variants=("block_size=16,stride=4,threshold=0.6",),
        selects=True,
        selects_from="keys",
        selects_for="head",
        looks_ahead="block",
    ),
)


CHUNKS = 8  # of rows, at least


class XAttention(Selector):
    """Top-p blocks by antidiagonal scores.  Pairs of groups without a visible pair have no score;
    those cut by the mask, such as the diagonal one, are scored whole.

    Args:
        block_size: tokens per block, of queries and keys.
        stride: s, which divides ``block_size``.
        threshold: share of the estimated mass that the kept blocks of a row hold.
        kernel: see :class:`Selector`.
    """

    name = "xattention"

    def __init__(
        self, block_size: int = 128, stride: int = 8, threshold: float = 0.9, kernel: str = ""
    ) -> None:
        super().__init__(kernel)
        check_minimum(self.name, 1, block_size=block_size, stride=stride)
        if block_size % stride:
            raise ValueError(f"xattention: stride = {stride} must divide block_size = {block_size}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"xattention: threshold = {threshold} is a share, from 0 to 1")
        self.block_size, self.stride, self.threshold = block_size, stride, threshold
        self.query_block = block_size

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        grid = plan.grid(self.block_size, self.block_size)
        group_allowed = plan.grid(self.stride, self.stride).allowed
        # Queries of a group times its keys in reverse are the products on the antidiagonal.
        groups_q = split_into_blocks(upcast(q), self.stride, 1).transpose(2, 3).flatten(3)
        groups_k = split_into_blocks(upcast(k), self.stride, 1).flip(2).transpose(2, 3).flatten(3)
        scale = plan.problem.softmax_scale / self.stride
        groups_per_block = self.block_size // self.stride
        shape = (len(q), q.shape[2], *grid.areas.shape)
        mass = torch.zeros(shape, dtype=groups_q.dtype, device=q.device)
        rows, width = groups_q.shape[1], len(q) * q.shape[2] * groups_k.shape[1]
        # Few rows at once see fewer of the keys, unless all see all.
        chunks = 1 if plan.mask.kind == "full" else CHUNKS
        for begin, end in row_chunks(rows, width, q.device, groups_per_block, chunks):
            last = min(end * self.stride, plan.mask.seq_q)
            blocks = -(-visible_end(plan.mask, begin * self.stride, last) // self.block_size)
            keys = slice(0, blocks * groups_per_block)
            allowed = group_allowed[begin:end, keys]
            probs = probabilities(groups_q[:, begin:end], groups_k[:, keys], allowed, scale)
            x0 = begin // groups_per_block
            sums = block_sums(probs, groups_per_block, groups_per_block)
            mass[:, :, x0 : x0 + sums.shape[2], :blocks] = sums
        forced = None if plan.mask.kind == "full" else first_blocks(grid) | grid.diagonal
        kept = top_p_blocks(mass, self.threshold, grid, forced)
        return (Branch(mask=Blocks(grid, kept)),)
