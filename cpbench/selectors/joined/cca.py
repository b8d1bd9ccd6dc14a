"""Selector `cca`: one softmax over core tokens, which stand for groups, and a window.

Source: Core Context Aware attention, arXiv 2412.12465: the core of a group of tokens is the sum of
its keys, and of its values, with the weights softmax(q K^T / sqrt(D)) of the last query of the
group, of each query head.  A query sees the cores of all groups before its window, each of which is
complete.  Keys are pooled as they are given: after RoPE, if the inputs have had it, which gives
other cores than RoPE after pooling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.operator import QKV, state_dtype
from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selector
from cpbench.selectors.common.joining import KeyPool
from cpbench.selectors.common.ranking import check_minimum
from cpbench.selectors.common.windows import interval_mask, window_begins, window_mask

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients

OPERATORS = (
    OperatorInfo(
        name="cca",
        summary="core tokens, weighted means of groups by their last query, and a window",
        source="Core Context Aware attention, arXiv 2412.12465",
        load="cpbench.selectors.joined.cca:Cca",
        masks=("causal",),
        params=("group_size", "window", "kernel"),
        external_lse=False,
        rounds_scores=True,  # pooled keys are in the dtype of k
        variants=("group_size=8,window=20",),
        selects=True,
        selects_for="head",
    ),
)


class Cca(Selector):
    """Cores of the groups before a window, and the window; independent of the inputs but for the
    weights within groups.

    Args:
        group_size: tokens per group.
        window: least number of keys in the window, which begins with a group.
        kernel: see :class:`Selector`.
    """

    name = "cca"
    branch_kinds = ("mask",)
    joined = True

    def __init__(self, group_size: int = 16, window: int = 1024, kernel: str = "") -> None:
        super().__init__(kernel)
        check_minimum(self.name, 1, group_size=group_size, window=window)
        self.group_size, self.window = group_size, window

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        tokens, size = plan.mask.seq_k, self.group_size
        begins = window_begins(tokens, self.window, size)
        branches = [Branch(mask=window_mask(begins))]
        if begins[-1] > 0:
            pool = CorePool(size, plan.problem.softmax_scale)
            cores = interval_mask(np.zeros_like(begins), begins // size, pool.num_keys(tokens))
            branches.append(Branch(mask=cores, derived=pool))
        return tuple(branches)


@dataclass(frozen=True)
class CorePool(KeyPool):
    """Weighted means of groups of ``size`` tokens, by the scores of their last query.

    Legend, beside that of ``joining``: R query heads of a key/value head; w tokens of a group.

    Attributes:
        scale: factor of the scores.
    """

    size: int
    scale: float

    def num_heads(self, heads_q: int, heads_kv: int) -> int:
        return heads_q

    def derive(self, qkv: QKV) -> tuple[torch.Tensor, torch.Tensor]:
        _, k, v, weights = self._groups(qkv)
        cores = (_weighted_sums(weights, x) for x in (k, v))
        core_k, core_v = (x.to(qkv.k.dtype) for x in cores)
        return core_k, core_v

    def derive_backward(self, dk: torch.Tensor, dv: torch.Tensor, qkv: QKV) -> Gradients:
        import torch

        last_q, k, v, weights = self._groups(qkv)
        groups, heads = last_q.shape[2:4]
        dcore_k, dcore_v = (x.to(k.dtype).unflatten(2, (groups, heads)) for x in (dk, dv))
        dweights = torch.einsum("bngrd,bnwgd->bngrw", dcore_k, k)
        dweights += torch.einsum("bngrd,bnwgd->bngrw", dcore_v, v)
        dscores = weights * (dweights - (weights * dweights).sum(-1, True)) * self.scale
        dq = torch.zeros_like(qkv.q, dtype=k.dtype)
        dlast_q = torch.einsum("bngrw,bnwgd->bngrd", dscores, k).flatten(2, 3)
        dq[:, self.size - 1 :: self.size] = dlast_q
        group_dk = torch.einsum("bngrw,bngrd->bnwgd", weights, dcore_k)
        group_dk += torch.einsum("bngrw,bngrd->bnwgd", dscores, last_q)
        group_dv = torch.einsum("bngrw,bngrd->bnwgd", weights, dcore_v)
        token_dk, token_dv = (
            torch.nn.functional.pad(x.flatten(1, 2), (0, 0, 0, 0, 0, qkv.k.shape[1] % self.size))
            for x in (group_dk, group_dv)
        )
        return dq, token_dk, token_dv

    def _groups(self, qkv: QKV) -> tuple[torch.Tensor, ...]:
        """The last query of each group ``[B, n, G, R, D]``, its keys and values ``[B, n, w, G, D]``
        and its weights ``[B, n, G, R, w]``, at least in float32."""
        import torch

        n, dtype = self.num_keys(qkv.k.shape[1]), state_dtype(qkv.q)
        last_q = qkv.q[:, self.size - 1 :: self.size].to(dtype)
        last_q = last_q.unflatten(2, (qkv.k.shape[2], -1))
        k, v = (x[:, : n * self.size].to(dtype).unflatten(1, (n, self.size)) for x in qkv[1:])
        scores = torch.einsum("bngrd,bnwgd->bngrw", last_q, k).mul_(self.scale)
        return last_q, k, v, torch.softmax(scores, -1)


def _weighted_sums(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``[B, n, H, D]`` from weights ``[B, n, G, R, w]`` and values ``[B, n, w, G, D]``."""
    import torch

    return torch.einsum("bngrw,bnwgd->bngrd", weights, x).flatten(2, 3)
