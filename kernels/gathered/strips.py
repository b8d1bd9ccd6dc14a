"""The `gathered` operator for selections of kind ``"lines"``, and for dense ones of ``"blocks"``.

Adjacent blocks of queries that select nearly the same are one strip, as tall as pays off: its keys
are the blocks that any of them selects, in large products of adjacent keys, in which the blocks of
the others are hidden.  Columns outside of these blocks are gathered.

Legend: B batch, H query heads, D head dim; X blocks of m queries, Y blocks of w keys; n rows of a
strip, c keys of a chunk of it, p hidden blocks of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cpbench.kernels.gathered.blocks import hidden_table, partial_blocks, to_blocks
from cpbench.kernels.gathered.running_softmax import LOG2E, RunningSoftmax
from cpbench.selectors.common.selection import Blocks, Grid

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse

BoolArray = npt.NDArray[np.bool_]

MAX_SCORES = 1 << 18  # of a chunk, to stay in a cache
MAX_ROWS = 512  # of a strip
# Time per pair of a strip, over that of the tallest: 1 + ROW_COST / rows.
ROW_COST = 30
# Time per pair to hide what a strip computes for some of its blocks only.
HIDING_COST = 0.05
# Time per pair where the blocks of every block of queries are gathered.
GATHERING_COST = 1.4


class Chunk(NamedTuple):
    """Keys of a strip.

    Attributes:
        runs: first and end of each range of keys; empty for columns.
        columns: ``[c]`` keys; None for ranges.
        visible: ``[n / m, 1, c]`` booleans of selected keys, for each block of queries; None for
            all.
        row, slot, block: ``[p]``: blocks of the chunk that the mask cuts: of queries in the strip,
            of keys in the chunk, and of keys in the sequence.
    """

    runs: tuple[tuple[int, int], ...]
    columns: torch.Tensor | None
    visible: torch.Tensor | None
    row: torch.Tensor
    slot: torch.Tensor
    block: torch.Tensor


class Strip(NamedTuple):
    """Blocks of queries ``[x0, x1)`` and their keys."""

    x0: int
    x1: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """The strips of each batch and head, in the blocks of a grid."""

    scale: float
    grid: Grid
    strips: tuple[tuple[Strip, ...], ...]


def plan(selection: Blocks, scale: float, required: bool = True) -> Plan | None:
    """Divide the selection of every head into strips.

    Args:
        required: return a plan even if gathering the blocks of every block of queries is faster.
    """
    grid = selection.grid
    allowed = grid.allowed.cpu().numpy()
    full = allowed & ~partial_blocks(grid).cpu().numpy()  # and without padding
    heads = [
        _Head(kept & allowed, allowed, full, columns, grid.block_k)
        for kept, columns in zip(*_by_head(selection), strict=True)
    ]
    heights = [1 << i for i in range(max(MAX_ROWS // grid.block_q, 1).bit_length())]
    costs = {n: sum(head.cost(n, grid.block_q) for head in heads) for n in heights}
    blocks = min(costs, key=lambda n: costs[n])
    gathering = GATHERING_COST * sum(int(head.kept.sum()) for head in heads)
    if not required and (blocks == 1 or costs[blocks] > gathering):
        return None
    device = selection.kept.device
    max_blocks = max(1, MAX_SCORES // (blocks * grid.block_q * grid.block_k))
    strips = tuple(tuple(head.strips(blocks, max_blocks, device)) for head in heads)
    return Plan(scale, grid, strips)


def _by_head(selection: Blocks) -> tuple[BoolArray, BoolArray]:
    """Booleans of the selected blocks ``[B * H, X, Y]`` and columns ``[B * H, Y * w]``."""
    import torch

    kept = selection.kept.flatten(0, 1)
    padded = kept.shape[2] * selection.grid.block_k
    columns = torch.zeros((len(kept), padded), dtype=torch.bool)
    if selection.columns is not None:
        columns[:, : selection.seq_k] = selection.columns.flatten(0, 1)
    return kept.cpu().numpy(), columns.numpy()


@dataclass(frozen=True, eq=False)
class _Head:
    """The selection of a head: ``[X, Y]`` selected, allowed and entirely visible blocks, and
    ``[Y * w]`` columns, w keys of a block."""

    kept: BoolArray
    allowed: BoolArray
    full: BoolArray
    columns: BoolArray
    width: int

    def _blocks(self, n: int) -> tuple[BoolArray, BoolArray]:
        """For each strip of n blocks of queries: its blocks of keys, and those in which all of its
        queries see every key."""
        starts = np.arange(0, len(self.kept), n)
        full = np.logical_and.reduceat(self.full, starts)
        selected = np.logical_or.reduceat(self.kept, starts)
        with_columns = self.columns.reshape(-1, self.width).any(1)
        # Columns in blocks that the mask cuts need its hidden pairs.
        cut = with_columns & np.logical_or.reduceat(self.allowed, starts) & ~full
        return selected | cut, full

    def cost(self, n: int, block_q: int) -> float:
        """Time of strips of n blocks of queries, in products of a block."""
        blocks, full = self._blocks(n)
        computed = n * int(blocks.sum())
        hidden = computed - int((self.kept & self.full).sum())
        columns = self.columns.reshape(-1, self.width).sum(1)
        gathered = n * float(((full & ~blocks) * columns).sum()) / self.width
        return (1 + ROW_COST / (n * block_q)) * (computed + gathered) + HIDING_COST * hidden

    def strips(self, n: int, max_blocks: int, device: torch.device) -> Iterator[Strip]:
        """The strips of n blocks of queries, with at most ``max_blocks`` blocks in a chunk."""
        import torch

        for x0, blocks, full in zip(range(0, len(self.kept), n), *self._blocks(n), strict=True):
            rows = slice(x0, min(x0 + n, len(self.kept)))
            chunks = []
            numbers = np.flatnonzero(blocks)
            allowed, cut = self.allowed[rows], self.allowed[rows] & ~self.full[rows]
            columns = self.columns.reshape(-1, self.width)
            for begin in range(0, len(numbers), max_blocks):
                part = numbers[begin : begin + max_blocks]
                row, slot = np.nonzero(cut[:, part])
                hidden = (torch.as_tensor(x, device=device) for x in (row, slot, part[slot]))
                kept, visible = self.kept[rows][:, part], None
                if not kept.all():
                    of_columns = columns[part] & allowed[:, part, None]
                    selected = (kept[:, :, None] | of_columns).reshape(len(kept), 1, -1)
                    visible = torch.as_tensor(selected, device=device)
                chunks.append(Chunk(tuple(_runs(part, self.width)), None, visible, *hidden))
            outside = np.flatnonzero(self.columns & np.repeat(full & ~blocks, self.width))
            none = torch.empty(0, dtype=torch.int64, device=device)
            for begin in range(0, len(outside), max_blocks * self.width):
                keys = outside[begin : begin + max_blocks * self.width]
                columns_of_chunk = torch.as_tensor(keys, device=device)
                chunks.append(Chunk((), columns_of_chunk, None, none, none, none))
            yield Strip(rows.start, rows.stop, tuple(chunks))


def _runs(numbers: npt.NDArray[np.int64], width: int) -> Iterator[tuple[int, int]]:
    """Ranges of keys of ascending blocks."""
    last = np.flatnonzero(np.diff(numbers, append=numbers[-1] + 2) != 1)
    first = np.append(0, last[:-1] + 1)
    for a, b in zip(numbers[first].tolist(), numbers[last].tolist(), strict=True):
        yield a * width, (b + 1) * width


def _apply_mask(s_nc: torch.Tensor, grid: Grid, x0: int, chunk: Chunk) -> None:
    """Set the scores of hidden pairs to -inf."""
    import torch

    if chunk.visible is not None:
        bias = torch.zeros(chunk.visible.shape, dtype=s_nc.dtype, device=s_nc.device)
        bias.masked_fill_(~chunk.visible, -math.inf)
        s_nc.view(len(bias), -1, bias.shape[2]).add_(bias)
    if len(chunk.row):
        index, hidden_pairs = hidden_table(grid)
        by_block = s_nc.view(-1, grid.block_q, s_nc.shape[1]).unflatten(2, (-1, grid.block_k))
        by_block, place = by_block.transpose(1, 2), (chunk.row, chunk.slot)
        hidden = hidden_pairs[index[x0 + chunk.row, chunk.block]]
        by_block[place] = by_block[place].masked_fill_(hidden, -math.inf)


def _keys_of(x_TD: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """The keys of a chunk, ``[c, D]``: a view of a single range, a copy of others."""
    import torch

    if chunk.columns is not None:
        return x_TD.index_select(0, chunk.columns)
    ranges = [x_TD[a:b] for a, b in chunk.runs]
    return ranges[0] if len(ranges) == 1 else torch.cat(ranges)


def _add_to_keys(x_TD: torch.Tensor, chunk: Chunk, a_cn: torch.Tensor, b_nD: torch.Tensor) -> None:
    """Add ``a @ b`` to the keys of a chunk in place."""
    if chunk.columns is not None:
        x_TD.index_add_(0, chunk.columns, a_cn @ b_nD)
        return
    first = 0
    for begin, end in chunk.runs:
        x_TD[begin:end].addmm_(a_cn[first : first + end - begin], b_nD)
        first += end - begin


def _padded_queries(grid: Grid, x_SHD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[H, X * m, D]``: queries of one batch in whole blocks, padded with zeros."""
    import torch

    x = x_SHD.to(dtype).transpose(0, 1)
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % grid.block_q))


def _heads(plan: Plan, heads: int, group: int) -> Iterator[tuple[int, int, int, Sequence[Strip]]]:
    """Batch, query head, key/value head and strips of each head."""
    for i, strips in enumerate(plan.strips):
        b, h = divmod(i, heads)
        yield b, h, h // group, strips


def forward(qkv: QKV, plan: Plan) -> OutLse:
    """See ``cpbench.core.operator.Operator.forward``."""
    import torch

    q, k, v = qkv
    grid, dtype = plan.grid, torch.promote_types(q.dtype, torch.float32)
    (B, S, H, _), G = q.shape, k.shape[2]
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    lse = q.new_full((B, H, S), -math.inf, dtype=torch.float32)
    queries = [_padded_queries(grid, x, dtype).mul(plan.scale * LOG2E) for x in q]
    keys, values = (
        [to_blocks(x, b, grid.block_k, dtype).view(G, -1, x.shape[3]) for b in range(B)]
        for x in (k, v)
    )
    scores = torch.empty(MAX_SCORES, dtype=dtype, device=q.device)
    for b, h, g, strips in _heads(plan, H, H // G):
        for x0, x1, chunks in strips:
            rows = slice(x0 * grid.block_q, min(x1 * grid.block_q, S))
            q_nD = queries[b][h, x0 * grid.block_q : x1 * grid.block_q]
            softmax = RunningSoftmax()
            for chunk in chunks:
                k_cD, v_cD = _keys_of(keys[b][g], chunk), _keys_of(values[b][g], chunk)
                size = len(q_nD) * len(k_cD)
                s_nc = scores[:size].view(len(q_nD), -1) if size <= MAX_SCORES else None
                s_nc = torch.mm(q_nD, k_cD.mT, out=s_nc)
                _apply_mask(s_nc, grid, x0, chunk)
                softmax.add(s_nc[None], v_cD[None])
            if chunks:
                o_1nD, lse_1n = softmax.result()
                out[b, rows, h] = o_1nD[0, : rows.stop - rows.start].to(q.dtype)
                lse[b, h, rows] = lse_1n[0, : rows.stop - rows.start].float()
    return out, lse


def backward(x: BackwardInputs, plan: Plan) -> Gradients:
    """See ``cpbench.core.operator.Operator.backward``."""
    import torch

    dout, q, k, v, out, lse = x
    grid, dtype = plan.grid, torch.promote_types(q.dtype, torch.float32)
    (B, S, H, _), G, T = q.shape, k.shape[2], k.shape[1]
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    rows_of = [[_padded_queries(grid, y[b], dtype) for y in (q, dout, out)] for b in range(B)]
    keys, values = (
        [to_blocks(y, b, grid.block_k, dtype).view(G, -1, y.shape[3]) for b in range(B)]
        for y in (k, v)
    )
    sums = [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in zip(keys, values, strict=True)]
    # exp(score - inf) is 0: padding, and rows that see nothing, contribute nothing.
    lse_BHS = lse.to(dtype).mul(LOG2E).masked_fill_(lse == -math.inf, math.inf)
    lse_BHS = torch.nn.functional.pad(lse_BHS, (0, -S % grid.block_q), value=math.inf)
    for b, h, g, strips in _heads(plan, H, H // G):
        (dk_TD, dv_TD), (queries, douts, outs) = (x[g] for x in sums[b]), (y[h] for y in rows_of[b])
        for x0, x1, chunks in strips:
            block = slice(x0 * grid.block_q, x1 * grid.block_q)
            rows = slice(block.start, min(block.stop, S))
            q_nD, do_nD, lse_n1 = queries[block], douts[block], lse_BHS[b, h, block, None]
            delta_n1 = (do_nD * outs[block]).sum(-1, True)
            dq_nD = torch.zeros_like(q_nD)
            for chunk in chunks:
                k_cD, v_cD = _keys_of(keys[b][g], chunk), _keys_of(values[b][g], chunk)
                p_nc = torch.mm(q_nD, k_cD.mT).mul_(plan.scale * LOG2E)
                _apply_mask(p_nc, grid, x0, chunk)
                p_nc.sub_(lse_n1).exp2_()
                _add_to_keys(dv_TD, chunk, p_nc.mT, do_nD)
                ds_nc = torch.mm(do_nD, v_cD.mT).sub_(delta_n1).mul_(p_nc).mul_(plan.scale)
                _add_to_keys(dk_TD, chunk, ds_nc.mT, q_nD)
                dq_nD.addmm_(ds_nc, k_cD)
            dq[b, rows, h] = dq_nD[: rows.stop - rows.start].to(q.dtype)
    for b, sums_of_batch in enumerate(sums):
        for grad, total in zip((dk, dv), sums_of_batch, strict=True):
            grad[b] = total[:, :T].transpose(0, 1).to(grad.dtype)
    return dq, dk, dv
