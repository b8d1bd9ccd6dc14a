"""The `gathered` operator for selections of kind ``"blocks"``: blocks of keys per block of queries.

For each block of queries the selected keys are gathered with one copy, for as many heads at once as
fit a cache; then come two matrix products.  The plan is small and independent of the number of
selected blocks.

Legend: B batch, H query heads, G key/value heads, D head dim; X blocks of m queries, Y blocks of w
keys; h heads of a work item, n blocks of keys of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.kernels.gathered.running_softmax import LOG2E, RunningSoftmax
from cpbench.selectors.selections import Blocks, Grid, slices_by_block

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse

MAX_KEYS = 2048  # keys per head in a work item
MAX_SCORES = 1 << 19  # scores of all heads in a work item, to stay in a cache


@dataclass(frozen=True, eq=False)
class Plan:
    """The selected blocks of each block of queries.

    Attributes:
        scale: factor of the scores.
        grid: the blocks.
        index: ``[B, H, X, n]`` selected blocks of keys, ascending, followed by padding.
        counts: ``[B, H, X]``, the number of selected blocks.
        max_counts: for each X, the maximum of ``counts``.
    """

    scale: float
    grid: Grid
    index: torch.Tensor
    counts: torch.Tensor
    max_counts: list[int]


def plan(selection: Blocks, scale: float) -> Plan:
    """Plan from booleans on the device; one synchronisation, for the number of selected blocks."""
    kept = selection.kept & selection.grid.allowed
    counts = kept.sum(-1)
    max_counts = counts.amax((0, 1)).tolist()
    index = kept.to(dtype=counts.dtype).argsort(dim=-1, descending=True, stable=True)
    index = index[..., : max(max_counts, default=0)]
    return Plan(scale, selection.grid, index, counts, max_counts)


def partial_blocks(grid: Grid) -> torch.Tensor:
    """``[X, Y]``: allowed blocks with hidden pairs; padding of a short last block is hidden too."""
    return grid.allowed & (grid.areas < grid.block_lengths[0][:, None] * grid.block_k)


def hidden_table(grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden pairs of each block, computed once per grid.

    Returns:
        ``[X, Y]``, for each block an index into the second; ``[p + 2, m, w]`` booleans of hidden
        pairs: those of the p partial blocks, then none, then all.
    """
    if "hidden_pairs" not in grid.cache:
        grid.cache["hidden_pairs"] = _build_hidden_table(grid)
    table: tuple[torch.Tensor, torch.Tensor] = grid.cache["hidden_pairs"]
    return table


def _build_hidden_table(grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    import numpy as np
    import torch

    slices, block = slices_by_block(grid.mask, grid.block_q, grid.block_k)
    columns = grid.areas.shape[1]
    partial = np.flatnonzero(partial_blocks(grid).cpu().numpy().reshape(-1))
    hidden = np.ones((len(partial) + 2, grid.block_q, grid.block_k), dtype=np.bool_)
    hidden[-2] = False
    position = np.searchsorted(partial, block)
    position = np.minimum(position, max(len(partial) - 1, 0))
    for i in np.flatnonzero(partial[position] == block) if len(partial) else ():
        q0, q1, k0, k1, lo, hi = slices[i].tolist()
        x, y = divmod(int(block[i]), columns)
        offset = np.arange(k0, k1) - np.arange(q0, q1)[:, None]
        q0, q1 = q0 - x * grid.block_q, q1 - x * grid.block_q
        k0, k1 = k0 - y * grid.block_k, k1 - y * grid.block_k
        hidden[position[i], q0:q1, k0:k1] &= (offset < lo) | (offset > hi)
    hidden_index = np.full(grid.areas.numel(), len(partial))
    hidden_index[partial] = np.arange(len(partial))
    hidden_index = hidden_index.reshape(grid.areas.shape)
    device = grid.areas.device
    return torch.as_tensor(hidden_index, device=device), torch.as_tensor(hidden, device=device)


@dataclass(frozen=True, eq=False)
class _WorkItem:
    """Consecutive heads of a block of queries, and consecutive selected blocks of keys of each.

    Attributes:
        rows: the queries.
        heads: the query heads.
        kv_blocks: ``[h, n]`` blocks of keys, as indices into those of all key/value heads.
        first, last: whether these are the first, or the last, of the selected blocks.
        hidden: head, block and ``[m, w]`` booleans of each block with hidden pairs; None without.
    """

    rows: slice
    heads: slice
    kv_blocks: torch.Tensor
    first: bool
    last: bool
    hidden: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


def _work_items(plan: Plan, b: int, heads: int, group: int) -> Iterator[_WorkItem]:
    """The work items of one batch."""
    import torch

    grid = plan.grid
    hidden_index, hidden_pairs = hidden_table(grid)
    hides_nothing, hides_all = len(hidden_pairs) - 2, len(hidden_pairs) - 1
    columns, max_blocks = grid.areas.shape[1], max(1, MAX_KEYS // grid.block_k)
    for x, max_count in enumerate(plan.max_counts):
        rows = _block_rows(grid, x)
        width = min(max(max_count, 1), max_blocks)
        max_heads = max(1, MAX_SCORES // (grid.block_q * width * grid.block_k))
        for h0 in range(0, heads, max_heads):
            h1 = min(h0 + max_heads, heads)
            counts = plan.counts[b, h0:h1, x]
            first_block = torch.arange(h0, h1, device=counts.device)[:, None] // group * columns
            for n0 in range(0, max_count, max_blocks):
                n1 = min(n0 + max_blocks, max_count)
                blocks = plan.index[b, h0:h1, x, n0:n1]
                padding = torch.arange(n0, n1, device=blocks.device) >= counts[:, None]
                entry = hidden_index[x][blocks].masked_fill(padding, hides_all)
                masked = torch.nonzero(entry != hides_nothing)
                hidden = None
                if len(masked):
                    head, slot = masked.unbind(1)
                    hidden = head, slot, hidden_pairs[entry[head, slot], : rows.stop - rows.start]
                yield _WorkItem(
                    rows, slice(h0, h1), first_block + blocks, n0 == 0, n1 == max_count, hidden
                )


def _block_rows(grid: Grid, x: int) -> slice:
    """The queries of a block."""
    return slice(x * grid.block_q, min((x + 1) * grid.block_q, grid.mask.seq_q))


def _empty_blocks(plan: Plan) -> Iterator[slice]:
    """Queries of the blocks for which no head selected anything; nothing is computed for them."""
    return (_block_rows(plan.grid, x) for x, count in enumerate(plan.max_counts) if not count)


def _apply_mask(s_hmn: torch.Tensor, item: _WorkItem, width: int) -> None:
    """Set the scores of hidden pairs and of padding blocks to -inf."""
    if item.hidden is None:
        return
    head, slot, hidden = item.hidden
    by_block = s_hmn.unflatten(2, (-1, width)).transpose(1, 2)
    by_block[head, slot] = by_block[head, slot].masked_fill_(hidden, -math.inf)


def to_blocks(x_BTGD: torch.Tensor, b: int, block: int, dtype: torch.dtype) -> torch.Tensor:
    """Split keys of one batch into blocks, ``[G * Y, w, D]``; the last is padded with zeros."""
    import torch

    x = x_BTGD[b].to(dtype).transpose(0, 1)
    missing = -x.shape[1] % block
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.reshape(-1, block, x.shape[2])


def forward(qkv: QKV, plan: Plan) -> OutLse:
    """See ``cpbench.core.operator.Operator.forward``."""
    import torch

    q, k, v = qkv
    dtype, width = torch.promote_types(q.dtype, torch.float32), plan.grid.block_k
    (B, S, H, _), group = q.shape, q.shape[2] // k.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((B, H, S), dtype=torch.float32)
    for rows in _empty_blocks(plan):
        out[:, rows], lse[:, :, rows] = 0.0, -math.inf
    for b in range(B):
        q_HSD = q[b].to(dtype).transpose(0, 1)
        k_, v_ = to_blocks(k, b, width, dtype), to_blocks(v, b, width, dtype)
        softmax = RunningSoftmax()
        for item in _work_items(plan, b, H, group):
            q_hmD = q_HSD[item.heads, item.rows]
            k_hnD, v_hnD = (_gather_blocks(x, item.kv_blocks) for x in (k_, v_))
            s_hmn = torch.bmm(q_hmD, k_hnD.mT).mul_(plan.scale * LOG2E)
            _apply_mask(s_hmn, item, width)
            if item.first:
                softmax = RunningSoftmax()
            softmax.add(s_hmn, v_hnD)
            if item.last:
                o_hmD, lse_hm = softmax.result()
                lse[b, item.heads, item.rows] = lse_hm.float()
                out[b, item.rows, item.heads] = o_hmD.transpose(0, 1).to(q.dtype)
    return out, lse


def backward(x: BackwardInputs, plan: Plan) -> Gradients:
    """See ``cpbench.core.operator.Operator.backward``."""
    import torch

    dout, q, k, v, out, lse = x
    dtype, width = torch.promote_types(q.dtype, torch.float32), plan.grid.block_k
    heads, (T, G) = q.shape[2], k.shape[1:3]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows in _empty_blocks(plan):
        dq[:, rows] = 0.0
    for b in range(len(q)):
        q_HSD, do_HSD, out_HSD = (x[b].to(dtype).transpose(0, 1) for x in (q, dout, out))
        k_, v_ = to_blocks(k, b, width, dtype), to_blocks(v, b, width, dtype)
        dk_, dv_ = torch.zeros_like(k_), torch.zeros_like(v_)
        delta_HS1 = (do_HSD * out_HSD).sum(-1, True)
        lse_HS1 = lse[b].to(dtype).mul(LOG2E).masked_fill_(lse[b] == -math.inf, math.inf)[..., None]
        dq_hmD = torch.empty(0)
        for item in _work_items(plan, b, heads, heads // G):
            index = item.heads, item.rows
            q_hmD, do_hmD = q_HSD[index], do_HSD[index]
            k_hnD, v_hnD = (_gather_blocks(x, item.kv_blocks) for x in (k_, v_))
            s_hmn = torch.bmm(q_hmD, k_hnD.mT).mul_(plan.scale * LOG2E)
            _apply_mask(s_hmn, item, width)
            p_hmn = s_hmn.sub_(lse_HS1[index]).exp2_()
            kv_blocks = item.kv_blocks.flatten()
            _add_to_blocks(dv_, kv_blocks, torch.bmm(p_hmn.mT, do_hmD))
            ds_hmn = torch.bmm(do_hmD, v_hnD.mT).sub_(delta_HS1[index]).mul_(p_hmn).mul_(plan.scale)
            _add_to_blocks(dk_, kv_blocks, torch.bmm(ds_hmn.mT, q_hmD))
            partial_dq = torch.bmm(ds_hmn, k_hnD)
            dq_hmD = partial_dq if item.first else dq_hmD.add_(partial_dq)
            if item.last:
                dq[b, item.rows, item.heads] = dq_hmD.transpose(0, 1).to(q.dtype)
        for grad, grad_blocks in ((dk, dk_), (dv, dv_)):
            grad_GTD = grad_blocks.view(G, -1, grad.shape[3])[:, :T]
            grad[b] = grad_GTD.transpose(0, 1).to(grad.dtype)
    return dq, dk, dv


def _gather_blocks(x: torch.Tensor, blocks_hn: torch.Tensor) -> torch.Tensor:
    """Concatenate the blocks of each head, ``[h, n * w, D]``."""
    rows = x.flatten(1).index_select(0, blocks_hn.flatten())
    return rows.view(len(blocks_hn), -1, x.shape[2])


def _add_to_blocks(x: torch.Tensor, blocks: torch.Tensor, values_hnD: torch.Tensor) -> None:
    """Add to blocks of keys in place; several query heads may add to one block."""
    x.flatten(1).index_add_(0, blocks, values_hnD.reshape(len(blocks), -1))
