"""Attention as calls of a fused kernel, whose partial results are merged by their lse.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim; blocks of m
queries and of w keys; h parts of a call, n queries and c keys of each, p blocks that the mask cuts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cpbench.kernels.gathered.blocks import hidden_table, to_blocks
from cpbench.kernels.gathered.fused import NO_LSE, attend, attend_backward
from cpbench.selectors.selections import Grid

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse

MAX_SQUARE_TOKENS = 1 << 13  # queries of the squares of a call


class Units(NamedTuple):
    """Runs of ``width`` tokens: their numbers; or those in a range of tokens."""

    numbers: slice | torch.Tensor
    width: int = 1


def units(numbers: npt.NDArray[np.int64], width: int, device: torch.device) -> Units:
    """Units by their numbers; a range if they follow one another."""
    import torch

    first, last = int(numbers[0]), int(numbers[-1])
    if last - first == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        return Units(slice(first * width, (last + 1) * width))
    return Units(torch.as_tensor(numbers, device=device), width)


class Bias(NamedTuple):
    """What a call hides.

    Attributes:
        visible: ``[n / m, 1, c]`` booleans of selected keys, for each block of queries.
        row, slot: ``[p]``: blocks that the mask cuts: of queries in the call, of keys in the call.
        x, y: ``[p]``: the same in the sequence.
    """

    visible: torch.Tensor
    row: torch.Tensor
    slot: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor


class Call(NamedTuple):
    """A call of the fused kernel.

    Attributes:
        queries: ``h * n``.
        keys: ``h * c``.
        parts: h equal parts of the queries, each of which sees one of as many parts of the keys.
        causal: query i of a part sees the first i + 1 of its keys only.
        bias: what it hides; None for nothing.
    """

    queries: Units
    keys: Units
    parts: int = 1
    causal: bool = False
    bias: Bias | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """The calls of each batch and head, in the blocks of a grid."""

    scale: float
    grid: Grid
    calls: tuple[tuple[Call, ...], ...]


def join_squares(calls: Iterable[Call], device: torch.device) -> tuple[Call, ...]:
    """Causal squares of one size that begin at multiples of it become parts of a call, the last."""
    others, squares = [], defaultdict(list)
    for call in calls:
        if call.causal:
            (q0, q1), (k0, k1) = (_range(x) for x in (call.queries, call.keys))
            rows = q1 - q0
            if k1 - k0 == rows and not q0 % rows and not k0 % rows:
                squares[rows].append((q0 // rows, k0 // rows))
                continue
        others.append(call)
    for rows, places in squares.items():
        step = max(1, MAX_SQUARE_TOKENS // rows)
        for part in (places[i : i + step] for i in range(0, len(places), step)):
            queries, keys = (units(numbers, rows, device) for numbers in np.array(part).T)
            others.append(Call(queries, keys, len(part), causal=True))
    return tuple(others)


def _range(x: Units) -> tuple[int, int]:
    assert isinstance(x.numbers, slice)
    return x.numbers.start, x.numbers.stop


def _bias(bias: Bias | None, grid: Grid, q_hnD: torch.Tensor) -> torch.Tensor | None:
    """``[n, c]``, 0 or -inf."""
    import torch

    if bias is None:
        return None
    bias_xc = torch.zeros(bias.visible.shape, dtype=q_hnD.dtype, device=q_hnD.device)
    bias_xc.masked_fill_(~bias.visible, -math.inf)
    bias_xmc = bias_xc.expand(-1, grid.block_q, -1)
    if len(bias.row):
        index, hidden_pairs = hidden_table(grid)
        bias_xmc = bias_xmc.contiguous()
        by_block = bias_xmc.unflatten(2, (-1, grid.block_k)).transpose(1, 2)
        place = bias.row, bias.slot
        by_block[place] = by_block[place].masked_fill_(
            hidden_pairs[index[bias.x, bias.y]], -math.inf
        )
    return bias_xmc.reshape(-1, bias.visible.shape[2])[: q_hnD.shape[1]]


def _take(
    x_TD: torch.Tensor, tokens: Units, parts: int, buffer_TD: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens ``[h, c, D]``: a view of a range, a copy of others, in the buffer if there is one (new
    memory costs more than the copy)."""
    import torch

    numbers, width = tokens
    if isinstance(numbers, slice):
        taken = x_TD[numbers]
    else:
        runs = _runs(x_TD, width)
        copy = None
        if buffer_TD is not None and len(numbers) <= len(runs):  # units may be taken twice
            copy = _runs(buffer_TD, width)[: len(numbers)]
        taken = torch.index_select(runs, 0, numbers, out=copy)
    return taken.view(parts, -1, x_TD.shape[1])


def _runs(x_TD: torch.Tensor, width: int) -> torch.Tensor:
    """A view of the whole units, ``[units, width * D]``."""
    return x_TD[: len(x_TD) // width * width].view(-1, width * x_TD.shape[1])


def _add(x_TD: torch.Tensor, tokens: Units, values_hcD: torch.Tensor) -> None:
    """Add to tokens in place."""
    numbers, width = tokens
    if isinstance(numbers, slice):
        x_TD[numbers].add_(values_hcD.reshape(-1, x_TD.shape[1]))
    else:
        _runs(x_TD, width).index_add_(0, numbers, values_hcD.reshape(len(numbers), -1))


def _merge(
    total: tuple[torch.Tensor, torch.Tensor],
    call: Call,
    partial: tuple[torch.Tensor, torch.Tensor],
    first: bool,
) -> None:
    """Merge out ``[S, D]`` and lse ``[S, 1]`` with those of a call in place."""
    import torch

    out, lse = (_take(x, call.queries, call.parts) for x in total)
    call_out, call_lse = partial[0], partial[1][..., None]
    if first:
        out.copy_(call_out)
        lse.copy_(call_lse)
        return
    out.lerp_(call_out, (call_lse - lse).sigmoid_())  # the weights sum to 1 for any lse
    torch.logaddexp(lse, call_lse, out=lse)
    numbers, width = call.queries
    if not isinstance(numbers, slice):
        for x, merged in zip(total, (out, lse), strict=True):
            _runs(x, width).index_copy_(0, numbers, merged.view(len(numbers), -1))


def forward(qkv: QKV, plan: Plan) -> OutLse:
    """See ``cpbench.core.operator.Operator.forward``."""
    import torch

    q, k, v = qkv
    grid, dtype = plan.grid, torch.promote_types(q.dtype, torch.float32)
    (B, S, H, D), G = q.shape, k.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((B, H, S), dtype=torch.float32)
    o_SD, lse_S1 = (q.new_empty((S, width), dtype=dtype) for width in (D, 1))
    for b in range(B):
        keys, values = (
            to_blocks(x, b, grid.block_k, dtype).view(G, -1, x.shape[3]) for x in (k, v)
        )
        buffers = torch.empty_like(keys[0]), torch.empty_like(values[0])
        for h in range(H):
            g = h // (H // G)
            # Strided queries cost a fifth of the speed.
            q_SD = q[b, :, h].to(dtype).contiguous()
            o_SD.zero_()
            lse_S1.fill_(NO_LSE)
            end = 0  # of the queries that have a partial result
            for call in plan.calls[b * H + h]:
                q_hnD = _take(q_SD, call.queries, call.parts)
                k_hcD = _take(keys[g], call.keys, call.parts, buffers[0])
                v_hcD = _take(values[g], call.keys, call.parts, buffers[1])
                bias = _bias(call.bias, grid, q_hnD)
                partial = attend(q_hnD, k_hcD, v_hcD, plan.scale, call.causal, bias)
                rows = call.queries.numbers
                first = isinstance(rows, slice) and rows.start >= end  # nothing to merge with
                _merge((o_SD, lse_S1), call, partial, first)
                if isinstance(rows, slice):
                    end = max(end, rows.stop)
            out[b, :, h] = o_SD
            lse[b, h] = lse_S1[:, 0].masked_fill_(lse_S1[:, 0] <= NO_LSE / 2, -math.inf)
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
        lse_HS1 = lse[b].to(dtype).masked_fill(lse[b] == -math.inf, math.inf)[..., None]
        for h in range(H):
            g, dq_SD = h // (H // G), torch.zeros_like(rows_HSD[1][h])
            for call in plan.calls[b * H + h]:
                do_hnD, q_hnD, o_hnD, lse_hn1 = (
                    _take(y[h], call.queries, call.parts) for y in (*rows_HSD, lse_HS1)
                )
                k_hcD = _take(keys[g], call.keys, call.parts, buffers[0])
                v_hcD = _take(values[g], call.keys, call.parts, buffers[1])
                bias = _bias(call.bias, grid, q_hnD)
                inputs = do_hnD, q_hnD, k_hcD, v_hcD, o_hnD, lse_hn1[..., 0]
                grads = attend_backward(*inputs, plan.scale, call.causal, bias)
                _add(dq_SD, call.queries, grads[0])
                _add(dk_GTD[g], call.keys, grads[1])
                _add(dv_GTD[g], call.keys, grads[2])
            dq[b, :, h] = dq_SD
        for grad, sum_GTD in ((dk, dk_GTD), (dv, dv_GTD)):
            grad[b] = sum_GTD[:, :T].transpose(0, 1)
    return dq, dk, dv
