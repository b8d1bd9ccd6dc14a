"""Selector `dsa`: single keys by a lightning indexer, shared by all heads.

Source: DeepSeek-V3.2-Exp (inference/model.py, Indexer): I[t, s] = sum over index heads of
w[t, h] relu(q[t, h] k[s]), and the top-k keys of each query.  Its index queries, keys and weights
are learned; here they are the queries and keys themselves, or a random projection of them, with
equal weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selecting
from cpbench.selectors.common.ranking import at_least, products, spans, working
from cpbench.selectors.common.selection import Tokens, visible

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="dsa",
        summary="every query its top-k single keys by a lightning indexer, alike for all heads",
        source="DeepSeek-V3.2-Exp",
        load="cpbench.selectors.dsa:Dsa",
        params=("top_k", "index_dim", "kernel"),
        external_lse=False,
        variants=("top_k=20", "top_k=20,index_dim=8"),
        selects=True,
    ),
)


class Dsa(Selecting):
    """No key is always taken, not even the query's own.

    Args:
        top_k: keys of each query.
        index_dim: lanes that a seeded random orthonormal projection leaves to the index; 0 is all.
        kernel: see :class:`Selecting`.
    """

    name = "dsa"
    forms = ("tokens",)

    def __init__(self, top_k: int = 2048, index_dim: int = 0, kernel: str = "") -> None:
        super().__init__(kernel)
        at_least(self.name, 1, top_k=top_k)
        at_least(self.name, 0, index_dim=index_dim)
        self.top_k, self.index_dim = top_k, index_dim

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        index_q, index_k = self._projected(working(q)), self._projected(working(k))
        b, s, h, _ = q.shape
        t = k.shape[1]
        most = min(self.top_k, t)
        found = torch.empty((b, 1, s, most), dtype=torch.int32, device=q.device)
        for begin, end in spans(s, b * h * t, q.device):
            scores = products(index_q[:, begin:end], index_k).relu_().sum(1)
            seen = visible(plan.mask, begin, end, q.device)
            best = scores.masked_fill_(~seen, -torch.inf).topk(most, dim=-1)
            found[:, 0, begin:end] = best.indices.masked_fill_(best.values == -torch.inf, -1)
        return (Branch(seen=Tokens(plan.mask, found, h)),)

    def _projected(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        if not 0 < self.index_dim < x.shape[3]:
            return x
        chance = torch.Generator().manual_seed(0)
        square = torch.randn(x.shape[3], x.shape[3], generator=chance, dtype=torch.float64)
        lanes = torch.linalg.qr(square).Q[:, : self.index_dim]
        projected: torch.Tensor = x @ lanes.to(x)
        return projected
