"""Selector `longheads`: chunks by their representatives, per head and token, at near positions.

Source: LongHeads, arXiv 2402.10685, and its code.  The representative of a chunk b is its attention
to itself, not causal: ``SDPA(mean_t SDPA(Q_b, K_b, V_b)_t, K_b, K_b)``, with RoPE at the positions
within the chunk.  A query, before RoPE, ranks the past chunks by its product with theirs, and takes
one softmax over the first, the nearest and the highest ones, which have contiguous positions: no
distance is above that of ``top_k`` chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan
from cpbench.selectors.common.ranking import check_minimum, qk_scores, row_chunks, upcast
from cpbench.selectors.common.rotating import ROPE_PARAMS, RotatingSelector, Turn
from cpbench.selectors.common.windows import window_mask
from cpbench.selectors.selections import one_block_each

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV

OPERATORS = (
    OperatorInfo(
        name="longheads",
        summary="top-k chunks per head by attention within them, at contiguous positions",
        source="LongHeads, arXiv 2402.10685",
        load="cpbench.selectors.joined.longheads:LongHeads",
        masks=("causal",),
        params=("chunk", "top_k", "nearest", *ROPE_PARAMS, "kernel"),
        external_lse=False,
        rounds_scores=True,  # what is turned is in the dtype of q and k
        variants=("chunk=16,top_k=4",),
        selects=True,
        selects_from="sequence",  # representatives are made from queries too
        selects_for="head",
        selects_by_values=True,
        rotates=True,
    ),
)


class LongHeads(RotatingSelector):
    """The query's own chunk, the first, those before its own, and the ones that score highest.

    Args:
        chunk: tokens per chunk.
        top_k: chunks per query, including the forced ones; at least ``nearest + 1``.
        nearest: forced chunks that end with the query's own.
        kernel: see :class:`Selector`.
        rope: of the RoPE that it applies, see :class:`RotatingSelector`.
    """

    name = "longheads"
    branch_kinds = ("mask", "rows")

    def __init__(
        self, chunk: int = 256, top_k: int = 16, nearest: int = 2, kernel: str = "", **rope: Any
    ) -> None:
        super().__init__(kernel, **rope)
        check_minimum(self.name, 1, chunk=chunk, nearest=nearest)
        check_minimum(self.name, nearest + 1, top_k=top_k)
        self.chunk, self.top_k, self.nearest = chunk, top_k, nearest

    def select_from(self, qkv: QKV, plan: Plan) -> tuple[Branch, ...]:
        tokens, size = qkv.k.shape[1], self.chunk
        within = plan.positions % size
        turn_k = self.turn(np.arange(tokens) % size, plan)
        own = plan.of_queries(window_mask(np.arange(tokens) // size * size))
        branches = [Branch(mask=own, turn_q=self.turn(within, plan), turn_k=turn_k)]
        most = min(self.top_k - 1, (tokens - 1) // size)
        if most:
            grid, chosen = plan.grid(1, size), self._chosen(qkv, turn_k, most, plan)
            for rank in range(most):
                mask = one_block_each(grid, chosen[..., rank])
                turn_q = self.turn(within + (rank + 1) * size, plan)
                branches.append(Branch(mask=mask, turn_q=turn_q, turn_k=turn_k))
        return tuple(branches)

    def _chosen(self, qkv: QKV, turn: Turn, most: int, plan: Plan) -> torch.Tensor:
        """The past chunks of each query, from the nearest to the first, ``[B, H, S, most]``; -1 for
        none.

        Args:
            turn: RoPE within chunks.
        """
        import torch

        q = upcast(qkv.q)
        b, s, h, _ = q.shape
        own = torch.as_tensor(plan.positions, device=q.device)[:, None] // self.chunk
        means = self._representatives(qkv, turn, plan.problem.softmax_scale)
        count = means.shape[1]
        chunk, rank = (torch.arange(n, device=q.device) for n in (count, most))
        chosen = torch.empty((b, h, s, most), dtype=torch.int64, device=q.device)
        for begin, end in row_chunks(s, b * h * count, q.device):
            own_rows = own[begin:end]
            scores = qk_scores(q[:, begin:end], means)
            scores.masked_fill_((chunk == 0) | (chunk > own_rows - self.nearest), torch.inf)
            scores.masked_fill_(chunk >= own_rows, -torch.inf)
            ranked = scores.topk(most, dim=-1).indices.masked_fill_(rank >= own_rows, -1)
            chosen[:, :, begin:end] = ranked.sort(dim=-1, descending=True).values
        return chosen

    def _representatives(self, qkv: QKV, turn: Turn, scale: float) -> torch.Tensor:
        """``[B, n, H, D]`` of the chunks that are past for some query, float32."""
        import torch

        tokens, size = qkv.k.shape[1], self.chunk
        count, heads = (tokens - 1) // size, qkv.q.shape[2]
        group = heads // qkv.k.shape[2]
        q, k, v = (
            upcast(x)[:, : count * size].unflatten(1, (count, size)).transpose(2, 3)
            for x in (turn.apply(qkv.q), turn.apply(qkv.k), qkv.v)
        )  # [B, n, heads, w, D]
        parts = []
        for begin, end in row_chunks(count, len(q) * heads * size * size, q.device):
            own_k, own_v = (x[:, begin:end].repeat_interleave(group, 2) for x in (k, v))
            probs = torch.softmax(q[:, begin:end] @ own_k.transpose(3, 4) * scale, -1)
            mean = probs.mean(3, keepdim=True) @ own_v
            parts.append(torch.softmax(mean @ own_k.transpose(3, 4) * scale, -1) @ own_k)
        return torch.cat(parts, 1)[:, :, :, 0]
