"""Attention as calls of a fused kernel, whose partial results are merged by their lse.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim; blocks of m
queries and of w keys; n rows of a call, c keys of it, p blocks of it that the mask cuts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cpbench.kernels.gathered.blocks import hidden_table, to_blocks
from cpbench.kernels.gathered.fused import NO_LSE, attend, attend_backward
from cpbench.selectors.common.selection import Grid

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse


class Bias(NamedTuple):
    """What a call hides.

    Attributes:
        visible: ``[n / m, 1, c]`` booleans of selected keys, for each block of queries.
        row, slot, block: ``[p]``: blocks that the mask cuts: of queries in the call, of keys in the
            call, and of keys in the sequence.
    """

    visible: torch.Tensor
    row: torch.Tensor
    slot: torch.Tensor
    block: torch.Tensor


class Call(NamedTuple):
    """A call of the fused kernel.

    Attributes:
        x0, x1: its blocks of queries.
        keys: a range of keys, or numbers of units ``[c / width]``.
        width: keys of a unit.
        causal: query i sees the first i + 1 keys only.
        bias: what it hides; None for nothing.
    """

    x0: int
    x1: int
    keys: slice | torch.Tensor
    width: int
    causal: bool = False
    bias: Bias | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """The calls of each batch and head, in the blocks of a grid."""

    scale: float
    grid: Grid
    calls: tuple[tuple[Call, ...], ...]


def _bias(call: Call, grid: Grid, like: torch.Tensor) -> torch.Tensor | None:
    """``[n, c]``, 0 or -inf."""
    import torch

    if call.bias is None:
        return None
    visible, row, slot, block = call.bias
    bias_xc = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    bias_xc.masked_fill_(~visible, -math.inf)
    bias_xmc = bias_xc.expand(-1, grid.block_q, -1)
    if len(row):
        index, hidden_pairs = hidden_table(grid)
        bias_xmc = bias_xmc.contiguous()
        by_block, place = bias_xmc.unflatten(2, (-1, grid.block_k)).transpose(1, 2), (row, slot)
        hidden = hidden_pairs[index[call.x0 + row, block]]
        by_block[place] = by_block[place].masked_fill_(hidden, -math.inf)
    return bias_xmc.reshape(-1, visible.shape[2])[: len(like)]


def _take(x_TD: torch.Tensor, call: Call, buffer_TD: torch.Tensor) -> torch.Tensor:
    """The keys of a call, ``[c, D]``: a view of a range, a copy of others in the buffer (new memory
    costs more than the copy)."""
    import torch

    if isinstance(call.keys, slice):
        return x_TD[call.keys]
    shape = -1, call.width * x_TD.shape[1]
    copy = buffer_TD.view(shape)[: len(call.keys)]
    torch.index_select(x_TD.view(shape), 0, call.keys, out=copy)
    return copy.view(-1, x_TD.shape[1])


def _add(x_TD: torch.Tensor, call: Call, values_cD: torch.Tensor) -> None:
    """Add to the keys of a call in place."""
    if isinstance(call.keys, slice):
        x_TD[call.keys].add_(values_cD)
        return
    units = x_TD.view(-1, call.width * x_TD.shape[1])
    units.index_add_(0, call.keys, values_cD.reshape(len(call.keys), -1))


def _calls(plan: Plan, b: int, h: int, heads: int) -> Iterator[tuple[slice, Call]]:
    """The queries of each call of a head, with the call."""
    m, end = plan.grid.block_q, plan.grid.mask.seq_q
    for call in plan.calls[b * heads + h]:
        yield slice(call.x0 * m, min(call.x1 * m, end)), call


def forward(qkv: QKV, plan: Plan) -> OutLse:
    """See ``cpbench.core.operator.Operator.forward``."""
    import torch

    q, k, v = qkv
    grid, dtype = plan.grid, torch.promote_types(q.dtype, torch.float32)
    (B, S, H, _), G = q.shape, k.shape[2]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((B, H, S), dtype=torch.float32)
    for b in range(B):
        keys, values = (
            to_blocks(x, b, grid.block_k, dtype).view(G, -1, x.shape[3]) for x in (k, v)
        )
        buffers = torch.empty_like(keys[0]), torch.empty_like(values[0])
        for h in range(H):
            g = h // (H // G)
            # The output is a view in float32; strided queries cost a fifth of the speed.
            q_SD, o_SD = q[b, :, h].to(dtype).contiguous(), out[b, :, h].to(dtype)
            lse_S = q_SD.new_full((S,), NO_LSE)
            end = 0  # of the queries that have a partial result
            for rows, call in _calls(plan, b, h, H):
                k_cD, v_cD = (
                    _take(x[g], call, y) for x, y in zip((keys, values), buffers, strict=True)
                )
                bias = _bias(call, grid, q_SD[rows])
                o_nD, lse_n = attend(q_SD[rows], k_cD, v_cD, plan.scale, call.causal, bias)
                total_nD, total_n = o_SD[rows], lse_S[rows]
                if rows.start >= end:
                    total_nD.copy_(o_nD)
                    total_n.copy_(lse_n)
                    end = rows.stop
                else:  # the weights sum to 1 for any lse
                    total_nD.lerp_(o_nD, (lse_n - total_n).sigmoid_()[:, None])
                    torch.logaddexp(total_n, lse_n, out=total_n)
            if o_SD.dtype != out.dtype:
                out[b, :, h] = o_SD
            lse[b, h] = lse_S.masked_fill_(lse_S <= NO_LSE / 2, -math.inf)
    return out, lse


def backward(x: BackwardInputs, plan: Plan) -> Gradients:
    """See ``cpbench.core.operator.Operator.backward``."""
    import torch

    dout, q, k, v, out, lse = x
    grid, dtype = plan.grid, torch.promote_types(q.dtype, torch.float32)
    (B, _, H, _), (T, G) = q.shape, k.shape[1:3]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for b in range(B):
        rows_HSD = [y[b].to(dtype).transpose(0, 1).contiguous() for y in (dout, q, out)]
        keys, values = (
            to_blocks(y, b, grid.block_k, dtype).view(G, -1, y.shape[3]) for y in (k, v)
        )
        buffers = torch.empty_like(keys[0]), torch.empty_like(values[0])
        dk_GTD, dv_GTD = torch.zeros_like(keys), torch.zeros_like(values)
        # exp(score - inf) is 0: rows that see nothing contribute nothing.
        lse_HS = lse[b].to(dtype).masked_fill(lse[b] == -math.inf, math.inf)
        for h in range(H):
            g, dq_SD = h // (H // G), torch.zeros_like(rows_HSD[1][h])
            for rows, call in _calls(plan, b, h, H):
                do_nD, q_nD, o_nD = (y[h, rows] for y in rows_HSD)
                k_cD, v_cD = (
                    _take(y[g], call, z) for y, z in zip((keys, values), buffers, strict=True)
                )
                inputs, bias = (do_nD, q_nD, k_cD, v_cD, o_nD), _bias(call, grid, q_nD)
                grads = attend_backward(*inputs, lse_HS[h, rows], plan.scale, call.causal, bias)
                dq_SD[rows].add_(grads[0])
                _add(dk_GTD[g], call, grads[1])
                _add(dv_GTD[g], call, grads[2])
            dq[b, :, h] = dq_SD
        for grad, sum_GTD in ((dk, dk_GTD), (dv, dv_GTD)):
            grad[b] = sum_GTD[:, :T].transpose(0, 1)
    return dq, dk, dv
