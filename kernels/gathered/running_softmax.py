"""Softmax over keys that come in chunks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LOG2E = math.log2(math.e)
MIN_ROW_MAX = -1e30  # lower bound of row maxima: finite, so that -inf - MIN_ROW_MAX is -inf


class RunningSoftmax:
    """Weighted sums of values with a running maximum and sum of each row (Dao et al. 2022).

    Legend: h heads, m rows, n keys of a chunk, D head dim.
    """

    def __init__(self) -> None:
        self._state: tuple[torch.Tensor, ...] = ()  # output, row sum and row maximum

    def add(self, s_hmn: torch.Tensor, v_hnD: torch.Tensor) -> None:
        """Add keys by their scores in base 2, which are overwritten, and their values."""
        import torch

        max_hm1 = s_hmn.amax(-1, True).clamp_(min=MIN_ROW_MAX)
        if not self._state:
            s_hmn.sub_(max_hm1).exp2_()
            self._state = torch.bmm(s_hmn, v_hnD), s_hmn.sum(-1, True), max_hm1
            return
        o_hmD, sum_hm1, old_max = self._state
        torch.maximum(max_hm1, old_max, out=max_hm1)
        rescale = old_max.sub_(max_hm1).exp2_()
        s_hmn.sub_(max_hm1).exp2_()
        o_hmD.mul_(rescale).baddbmm_(s_hmn, v_hnD)
        sum_hm1.mul_(rescale).add_(s_hmn.sum(-1, True))
        self._state = o_hmD, sum_hm1, max_hm1

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out ``[h, m, D]`` and lse ``[h, m]`` to base e; 0 and -inf for rows that see nothing."""
        o_hmD, sum_hm1, max_hm1 = self._state
        lse_hm1 = (sum_hm1.log2() + max_hm1).mul_(1 / LOG2E)
        return o_hmD.div_(sum_hm1.masked_fill(sum_hm1 == 0, 1.0)), lse_hm1.squeeze(-1)
