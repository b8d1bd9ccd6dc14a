"""Selector `pyramid`: means of keys at several scales, the nearest keys at the finest.

Source: multi-scale attention, as in H-Transformer-1D, arXiv 2107.11906: attention to far keys is to
their means, over the longer runs the farther they are; a mean counts as often as it has tokens.
Here each scale begins where the one before ends, so that a query sees every past key once, alone or
in one mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.masks.slices import IntArray
from cpbench.selectors.common.base import Branch, Plan, Selector
from cpbench.selectors.common.pooling import Pool
from cpbench.selectors.common.ranking import check_minimum
from cpbench.selectors.common.windows import interval_mask, window_begins, window_mask

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="pyramid",
        summary="means of keys at several scales in one softmax, the nearest keys at the finest",
        source="multi-scale attention, as in H-Transformer-1D, arXiv 2107.11906",
        load="cpbench.selectors.joined.pyramid:Pyramid",
        masks=("causal",),
        params=("window", "ratio", "scales", "kernel"),
        external_lse=False,
        rounds_scores=True,  # pooled keys are in the dtype of k
        variants=("window=12,ratio=4,scales=3", "window=12,ratio=4,scales=1"),
        selects=True,
        selects_from="keys",
        selects_for="head",
    ),
)


class Pyramid(Selector):
    """A window of keys, then ``window`` means of ``ratio`` keys, then as many of ``ratio`` squared,
    and so on; the last scale goes back to the start.  Independent of the inputs.

    Args:
        window: least number of keys, or means, per scale.
        ratio: keys per mean of the first scale, and means of one scale per mean of the next.
        scales: number of scales of means.
        kernel: see :class:`Selector`.
    """

    name = "pyramid"
    branch_kinds = ("mask",)
    joined = True

    def __init__(
        self, window: int = 256, ratio: int = 16, scales: int = 2, kernel: str = ""
    ) -> None:
        super().__init__(kernel)
        check_minimum(self.name, 1, window=window, scales=scales)
        check_minimum(self.name, 2, ratio=ratio)
        self.window, self.ratio, self.scales = window, ratio, scales

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        tokens = plan.mask.seq_k
        ends = self.scale_begins(tokens, 0)
        branches = [Branch(mask=plan.of_queries(window_mask(ends)))]
        for scale in range(1, self.scales + 1):
            if not ends[-1]:
                break
            begins, size = self.scale_begins(tokens, scale), self.ratio**scale
            pool = Pool(size, size)
            mask = interval_mask(begins // size, ends // size, pool.num_windows(tokens))
            mask = plan.of_queries(mask)
            branches.append(Branch(mask=mask, pool_k=pool, key_weight=size))
            ends = begins
        return tuple(branches)

    def scale_begins(self, tokens: int, scale: int) -> IntArray:
        """``[T]``: the first token of a scale for each query, a multiple of the runs of the next;
        scale 0 is the window of single keys."""
        begins = window_begins(tokens, self.window, self.ratio)
        for number in range(1, scale + 1):
            size = self.ratio**number
            before = begins - self.window * size
            begins = np.maximum(before // (size * self.ratio) * size * self.ratio, 0)
        return begins if scale < self.scales else np.zeros_like(begins)
