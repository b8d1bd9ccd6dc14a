"""Selector `dsa`: top-k single keys per query by a lightning indexer, shared by all heads.

Source: DeepSeek-V3.2-Exp (inference/model.py, Indexer): I[t, s] = sum over index heads of
w[t, h] relu(q[t, h] k[s]), and the top-k keys of each query.  The original learns index queries,
index keys and weights; this one uses the queries and keys themselves, or a random projection of
them, with equal weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selector
from cpbench.selectors.common.ranking import (
    check_minimum,
    largest,
    lower_bound,
    qk_scores,
    row_chunks,
    upcast,
)
from cpbench.selectors.selections import Tokens, dense_mask_rows, visible_end

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="dsa",
        summary="top-k single keys per query by a lightning indexer, shared by all heads",
        source="DeepSeek-V3.2-Exp",
        load="cpbench.selectors.dsa:Dsa",
        params=("top_k", "index_dim", "kernel"),
        external_lse=False,
        variants=("top_k=20", "top_k=20,index_dim=8"),
        selects=True,
        selects_from="keys",
        selects_for="all",
    ),
)


class Dsa(Selector):
    """Top-k keys per query; no key is forced, not even the query's own.

    Args:
        top_k: keys per query.
        index_dim: dimension of the index, reached by a seeded random orthonormal projection;
            0 uses the whole head dimension.
        kernel: see :class:`Selector`.
    """

    name = "dsa"
    branch_kinds = ("tokens",)

    def __init__(self, top_k: int = 2048, index_dim: int = 0, kernel: str = "") -> None:
        super().__init__(kernel)
        check_minimum(self.name, 1, top_k=top_k)
        check_minimum(self.name, 0, index_dim=index_dim)
        self.top_k, self.index_dim = top_k, index_dim

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        index_q, index_k = self._project(upcast(q)), self._project(upcast(k))
        b, s, h, _ = q.shape
        t = k.shape[1]
        max_keys = min(self.top_k, t)
        index = torch.full((b, 1, s, max_keys), -1, dtype=torch.int32, device=q.device)
        for begin, end in row_chunks(s, b * h * t, q.device):
            keys = visible_end(plan.mask, begin, end)
            scores = qk_scores(index_q[:, begin:end], index_k[:, :keys]).relu_().sum(1)
            visible = dense_mask_rows(plan.mask, begin, end, q.device)[:, :keys]
            hidden = visible.logical_not_()
            count = min(max_keys, keys)
            bound = lower_bound(scores.masked_fill_(hidden, -torch.inf), count)
            if bound is None or not (bound > 0).all():
                # Of many scores of 0 the first keys win, however many keys there are.
                scores -= (scores == 0) * torch.arange(1, keys + 1, device=q.device)
                bound = None
            values, indices = largest(scores, count, bound)
            indices.masked_fill_(values == -torch.inf, -1)
            index[:, 0, begin:end, : indices.shape[2]] = indices
        return (Branch(mask=Tokens(plan.mask, index, h)),)

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """Project the head dimension to ``index_dim`` dimensions."""
        import torch

        if not 0 < self.index_dim < x.shape[3]:
            return x
        generator = torch.Generator().manual_seed(0)
        square = torch.randn(x.shape[3], x.shape[3], generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(square).Q[:, : self.index_dim]
        projected: torch.Tensor = x @ basis.to(x)
        return projected
