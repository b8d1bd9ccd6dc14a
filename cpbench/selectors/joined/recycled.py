"""Selector `recycled`: full attention at every few steps of decoding; between, the keys that it
attended to most.

Source: Recycled Attention, arXiv 2411.05787: the queries are steps of decoding, one after another.
Every ``stride`` steps, from the first query on, one attends to all keys; the others attend to the
``top_k`` keys that the last full step gave most attention to, head by head, and to the tokens
since; of both to those that they see.  The original keeps the attention weights of the full step;
kernels here return none, so the selection computes its scores once more, which the time includes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selector, rows_of
from cpbench.selectors.common.ranking import check_minimum, largest, qk_scores, row_chunks, upcast
from cpbench.selectors.common.windows import keys_from
from cpbench.selectors.selections import Tokens, dense_mask_rows

if TYPE_CHECKING:
    import torch

    from cpbench.masks.attn_mask import AttnMask

OPERATORS = (
    OperatorInfo(
        name="recycled",
        summary="all keys at every few queries, between them its top-k keys and those since",
        source="Recycled Attention, arXiv 2411.05787",
        load="cpbench.selectors.joined.recycled:Recycled",
        params=("stride", "top_k", "kernel"),
        external_lse=False,
        variants=("stride=8,top_k=16",),
        selects=True,
        selects_from="sequence",
        selects_for="head",
    ),
)


class Recycled(Selector):
    """The first branch is all keys of full steps, and of the others the tokens since; the second is
    the recycled keys.

    Args:
        stride: queries from one full step to the next.
        top_k: recycled keys per query.
        kernel: see :class:`Selector`.
    """

    name = "recycled"
    branch_kinds = ("mask", "tokens")
    joined = True

    def __init__(self, stride: int = 16, top_k: int = 512, kernel: str = "") -> None:
        super().__init__(kernel)
        check_minimum(self.name, 2, stride=stride)
        check_minimum(self.name, 1, top_k=top_k)
        self.stride, self.top_k = stride, top_k

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        steps = np.arange(q.shape[1])
        last_full = steps - steps % self.stride
        near = keys_from(plan.mask, np.where(steps == last_full, 0, plan.positions[last_full] + 1))
        top = self._top(q[:, :: self.stride], k, plan)
        index = top[:, :, torch.as_tensor(steps // self.stride, device=q.device)]
        index[:, :, :: self.stride] = -1
        if not _only_grows(plan.mask):
            for begin, end in row_chunks(len(steps), k.shape[1], q.device):
                visible = dense_mask_rows(plan.mask, begin, end, q.device)
                part = index[:, :, begin:end]
                seen = visible.expand(*part.shape[:2], -1, -1).gather(3, part.long().clamp(min=0))
                part.masked_fill_(~seen, -1)
        return Branch(mask=near), Branch(mask=Tokens(plan.mask, index, q.shape[2]))

    def _top(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> torch.Tensor:
        """``[B, H, n, top_k]`` int32: the keys with the highest scores of n full steps, up to their
        own positions, -1 for none."""
        import torch

        positions = torch.as_tensor(plan.positions[:: self.stride], device=q.device)
        mask = rows_of(plan.mask, np.arange(plan.mask.seq_q)[:: self.stride])
        (b, n, h, _), t = q.shape, k.shape[1]
        found = torch.full((b, h, n, min(self.top_k, t)), -1, dtype=torch.int32, device=q.device)
        for begin, end in row_chunks(n, b * h * t, q.device):
            scores = qk_scores(upcast(q[:, begin:end]), upcast(k))
            seen = dense_mask_rows(mask, begin, end, q.device)
            seen &= torch.arange(t, device=q.device) <= positions[begin:end, None]
            values, keys = largest(scores.masked_fill_(~seen, -torch.inf), found.shape[3])
            found[:, :, begin:end] = keys.masked_fill_(values == -torch.inf, -1)
        return found


def _only_grows(mask: AttnMask) -> bool:
    """Whether every query certainly sees what the one before it sees."""
    if len(mask.slices) != 1:
        return False
    _, q1, k0, _, low, _ = mask.slices[0].tolist()
    return bool(q1 == mask.seq_q and low <= k0 - q1 + 1)
