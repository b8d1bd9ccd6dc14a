"""Selector `lm_infinite`: sinks and a window, with no distance above that of the window.

Source: LM-Infinite, arXiv 2308.16137: a query sees the first keys and the latest ones (the mask
``streaming``), by RoPE of the distance ``min(i - j, window)``.  Keys in the window are at their
positions; the first keys before it are all at position 0, seen from position ``window``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan
from cpbench.selectors.common.ranking import check_minimum
from cpbench.selectors.common.rotating import ROPE_PARAMS, RotatingSelector
from cpbench.selectors.common.windows import interval_mask, window_begins, window_mask

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="lm_infinite",
        summary="sinks and a window, with RoPE of distances up to that of the window",
        source="LM-Infinite, arXiv 2308.16137",
        load="cpbench.selectors.joined.lm_infinite:LmInfinite",
        masks=("causal",),
        params=("num_sinks", "window", *ROPE_PARAMS, "kernel"),
        external_lse=False,
        rounds_scores=True,  # what is turned is in the dtype of q and k
        variants=("num_sinks=4,window=20",),
        selects=True,
        selects_from="keys",
        selects_for="head",
        rotates=True,
    ),
)


class LmInfinite(RotatingSelector):
    """The first keys and a window of keys; independent of the inputs.

    Args:
        num_sinks: first keys, visible to every query.
        window: largest distance of the window, and of all pairs; it has a key more.
        kernel: see :class:`Selector`.
        rope: of the RoPE that it applies, see :class:`RotatingSelector`.
    """

    name = "lm_infinite"
    branch_kinds = ("mask",)

    def __init__(
        self, num_sinks: int = 4, window: int = 1024, kernel: str = "", **rope: Any
    ) -> None:
        super().__init__(kernel, **rope)
        check_minimum(self.name, 0, num_sinks=num_sinks)
        check_minimum(self.name, 1, window=window)
        self.num_sinks, self.window = num_sinks, window

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        tokens = k.shape[1]
        begins = window_begins(tokens, self.window + 1, 1)
        near = Branch(
            mask=plan.of_queries(window_mask(begins)),
            turn_q=self.turn(plan.positions, plan),
            turn_k=self.turn(np.arange(tokens), plan),
        )
        if not begins[-1] or not self.num_sinks:
            return (near,)
        first = interval_mask(np.zeros_like(begins), begins.clip(max=self.num_sinks), tokens)
        far = Branch(
            mask=plan.of_queries(first),
            turn_q=self.turn(np.full(len(plan.positions), self.window), plan),
            turn_k=self.turn(np.zeros(tokens, np.int64), plan),
        )
        return near, far
