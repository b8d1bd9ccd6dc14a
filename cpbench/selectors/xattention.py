"""Selector `xattention`: blocks by sums over antidiagonals, as many as hold a share of the mass.

Source: XAttention, arXiv 2503.16428 (its xattn_estimate and find_blocks_chunked).  With stride s,
groups of s queries meet groups of s keys in one score, the sum of the products along the
antidiagonal of their s x s square; softmax over a row of groups; sums over blocks; then the fewest
blocks that hold the wanted share, the first and the diagonal one always among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selecting
from cpbench.selectors.common.ranking import (
    at_least,
    block_sums,
    covering,
    first,
    probabilities,
    spans,
    working,
)
from cpbench.selectors.common.selection import Blocks

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="xattention",
        summary="blocks by antidiagonal sums, up to a share of the mass",
        source="XAttention, arXiv 2503.16428",
        load="cpbench.selectors.xattention:XAttention",
        params=("block_size", "stride", "threshold", "kernel"),
        external_lse=False,
        variants=("block_size=16,stride=4,threshold=0.6",),
        selects=True,
        looks_ahead="block",
    ),
)


class XAttention(Selecting):
    """Groups with nothing to see in them have no score; the diagonal one is scored whole.

    Args:
        block_size: tokens of a block, of queries and keys.
        stride: s, which divides ``block_size``.
        threshold: share of the estimated mass that the kept blocks of a row hold.
        kernel: see :class:`Selecting`.
    """

    name = "xattention"

    def __init__(
        self, block_size: int = 128, stride: int = 8, threshold: float = 0.9, kernel: str = ""
    ) -> None:
        super().__init__(kernel)
        at_least(self.name, 1, block_size=block_size, stride=stride)
        if block_size % stride:
            raise ValueError(f"xattention: stride = {stride} must divide block_size = {block_size}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"xattention: threshold = {threshold} is a share, from 0 to 1")
        self.block_size, self.stride, self.threshold = block_size, stride, threshold

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        cells = plan.cells(self.block_size, self.block_size)
        seen = plan.cells(self.stride, self.stride).allowed
        # Queries of a group in reverse beside keys in order: their products lie across.
        groups_q = self._grouped(q.flip(1), turned=True).flip(1)
        groups_k = self._grouped(k, turned=False)
        scale = plan.problem.softmax_scale / self.stride
        per = self.block_size // self.stride
        found = []
        width = len(q) * q.shape[2] * groups_k.shape[1]
        for begin, end in spans(groups_q.shape[1], width, q.device, per):
            probs = probabilities(groups_q[:, begin:end], groups_k, seen[begin:end], scale)
            found.append(block_sums(probs, per, per))
        always = None if plan.mask.kind == "full" else first(cells) | cells.own
        kept = covering(torch.cat(found, 2), self.threshold, cells, always)
        return (Branch(seen=Blocks(cells, kept)),)

    def _grouped(self, x_BTHD: torch.Tensor, turned: bool) -> torch.Tensor:
        """``[B, groups, H, s * D]``; a short last group (or, with its order turned, first one) is
        filled with zeros."""
        import torch

        missing = -x_BTHD.shape[1] % self.stride
        if missing:
            sides = (missing, 0) if turned else (0, missing)
            x_BTHD = torch.nn.functional.pad(x_BTHD, (0, 0, 0, 0, *sides))
        groups: torch.Tensor = working(x_BTHD).unflatten(1, (-1, self.stride))
        return groups.transpose(2, 3).flatten(3)
