"""The `gathered` operator for blocks of keys per query: kinds ``"rows"`` and ``"landmarks"``.

It goes from one block of keys to the next and gathers the queries that selected it, as an online
softmax of two matrix products (as in MoBA, arXiv 2502.13189, without its sorting into
variable-length calls).

Legend: T keys, D head dim; N rows of a key/value head, of all its query heads; Y blocks of w keys;
n rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cpbench.kernels.gathered.running_softmax import LOG2E, MIN_ROW_MAX
from cpbench.selectors.common.hidden_keys import hidden_key_table
from cpbench.selectors.selections import Blocks, Grid, LandmarkBlocks

if TYPE_CHECKING:
    import torch

MAX_ROWS = 2048  # rows of a chunk of a block of keys, so that scores stay in a cache


class BlockRows(NamedTuple):
    """A chunk of the rows that attend to a block of keys.

    Attributes:
        rows: ``[n]`` row numbers, head-major.
        partial: positions in ``rows`` of those that see only a part of the block.
        hidden: ``[partial, w]`` booleans, keys of the block that those do not see.
    """

    rows: torch.Tensor
    partial: torch.Tensor
    hidden: torch.Tensor


RowsByBlock = tuple[tuple[BlockRows, ...], ...]  # chunks of each block


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows that attend to each block.

    Attributes:
        scale: factor of the scores.
        grid: the blocks.
        rows: by batch and key/value head, then by block, the rows that attend to it, in chunks.
        landmarks: whether their landmarks weight the blocks.
    """

    scale: float
    grid: Grid
    rows: tuple[RowsByBlock, ...]
    landmarks: bool


def plan(selection: Blocks, heads_kv: int, scale: float) -> Plan:
    """Plan for blocks of one query."""
    landmarks = isinstance(selection, LandmarkBlocks)
    return Plan(scale, selection.grid, _rows_by_block(selection, heads_kv), landmarks)


def _rows_by_block(selection: Blocks, heads_kv: int) -> tuple[RowsByBlock, ...]:
    """The rows that attend to each block, in chunks, by batch and key/value head."""
    import torch

    grid, tokens = selection.grid, selection.seq_q
    columns = grid.areas.shape[1]
    kept = selection.kept & grid.allowed
    by_block = kept.unflatten(1, (heads_kv, -1)).flatten(0, 1).permute(0, 3, 1, 2).flatten(2)
    widths = [min(grid.block_k, selection.seq_k - y * grid.block_k) for y in range(columns)]
    rows_by_head = []
    for kept_YN in by_block:
        block, row = torch.nonzero(kept_YN.contiguous()).unbind(1)
        partial, hidden = _partial_rows(selection, row % tokens, block)
        counts, partials = (torch.bincount(x, minlength=columns) for x in (block, block[partial]))
        begins = counts.cumsum(0) - counts
        position = partial - begins[block[partial]]
        sections = ((row, counts), (position, partials), (hidden, partials))
        split = (tensor.split(lengths.tolist()) for tensor, lengths in sections)
        blocks = [
            BlockRows(rows, partial, hidden[:, :width])
            for rows, partial, hidden, width in zip(*split, widths, strict=True)
        ]
        rows_by_head.append(tuple(tuple(_row_chunks(rows)) for rows in blocks))
    return tuple(rows_by_head)


def _partial_rows(
    selection: Blocks, query: torch.Tensor, block: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the selected blocks that their queries see only in part, and ``[partial, w]``
    booleans, the keys that those do not see."""
    import torch

    if isinstance(selection, LandmarkBlocks):  # whole blocks, with their landmarks
        nothing = torch.empty((0, selection.grid.block_k), dtype=torch.bool, device=query.device)
        return query[:0], nothing
    hidden_index, hidden_keys = hidden_key_table(selection.grid)
    entry = hidden_index[query, block]
    partial = torch.nonzero(entry >= 0)[:, 0]
    return partial, hidden_keys[entry[partial]]


def _row_chunks(block: BlockRows) -> Iterator[BlockRows]:
    """Split the rows of a block into chunks of ``MAX_ROWS``."""
    rows, partial, hidden = block
    if 0 < len(rows) <= MAX_ROWS:
        yield block
        return
    for begin in range(0, len(rows), MAX_ROWS):
        in_chunk = (partial >= begin) & (partial < begin + MAX_ROWS)
        yield BlockRows(rows[begin : begin + MAX_ROWS], partial[in_chunk] - begin, hidden[in_chunk])


def _apply_mask(s_nw: torch.Tensor, chunk: BlockRows) -> None:
    """Set the scores of hidden keys to -inf."""
    if len(chunk.partial):
        s_nw[chunk.partial] = s_nw[chunk.partial].masked_fill_(chunk.hidden, -math.inf)


def _key_row_chunks(rows_by_block: RowsByBlock, grid: Grid) -> Iterator[tuple[slice, BlockRows]]:
    """The keys of each block, with each chunk of the rows that attend to it."""
    for y, chunks in enumerate(rows_by_block):
        keys = slice(y * grid.block_k, (y + 1) * grid.block_k)
        for chunk in chunks:
            yield keys, chunk


def forward(
    q_ND: torch.Tensor, k_TD: torch.Tensor, v_TD: torch.Tensor, plan: Plan, head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[N, D]`` and lse ``[N, 1]`` of a batch's key/value head, by its number among all."""
    import torch

    out_ND, sum_N1 = torch.zeros_like(q_ND), q_ND.new_zeros((len(q_ND), 1))
    max_N1 = torch.full_like(sum_N1, MIN_ROW_MAX)
    for keys, chunk in _key_row_chunks(plan.rows[head], plan.grid):
        rows = chunk.rows
        s_nw = _scores(q_ND.index_select(0, rows), k_TD[keys], plan, chunk).mul_(LOG2E)
        old_n1 = max_N1.index_select(0, rows)
        new_n1 = torch.maximum(old_n1, s_nw.amax(1, True))
        s_nw.sub_(new_n1).exp2_()
        rescale_n1 = old_n1.sub_(new_n1).exp2_()
        sum_n1 = sum_N1.index_select(0, rows).mul_(rescale_n1).add_(s_nw.sum(1, True))
        out_nD = out_ND.index_select(0, rows).mul_(rescale_n1).addmm_(s_nw, v_TD[keys])
        for all_rows, some in ((sum_N1, sum_n1), (out_ND, out_nD), (max_N1, new_n1)):
            all_rows.index_copy_(0, rows, some)
    lse_N1 = sum_N1.log2().add_(max_N1).mul_(1 / LOG2E)
    return out_ND.div_(sum_N1.masked_fill(sum_N1 == 0, 1.0)), lse_N1


def backward(
    do_ND: torch.Tensor,
    q_ND: torch.Tensor,
    k_TD: torch.Tensor,
    v_TD: torch.Tensor,
    delta_N1: torch.Tensor,
    lse_N1: torch.Tensor,
    plan: Plan,
    head: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq ``[N, D]``, dk and dv ``[T, D]``, given delta and lse of all rows."""
    import torch

    dq_ND, dk_TD, dv_TD = (torch.zeros_like(x) for x in (q_ND, k_TD, v_TD))
    for keys, chunk in _key_row_chunks(plan.rows[head], plan.grid):
        rows, k_wD = chunk.rows, k_TD[keys]
        q_nD, do_nD, lse_n1, delta_n1 = (
            x.index_select(0, rows) for x in (q_ND, do_ND, lse_N1, delta_N1)
        )
        p_nw = _scores(q_nD, k_wD, plan, chunk).sub_(lse_n1).exp_()
        dv_TD[keys].addmm_(p_nw.T, do_nD)
        ds_nw = (do_nD @ v_TD[keys].T).sub_(delta_n1).mul_(p_nw).mul_(plan.scale)
        if plan.landmarks:
            ds_nw = _score_gradients(ds_nw, p_nw)
        dk_TD[keys].addmm_(ds_nw.T, q_nD)
        dq_ND.index_add_(0, rows, ds_nw @ k_wD)
    return dq_ND, dk_TD, dv_TD


def _scores(q_nD: torch.Tensor, k_wD: torch.Tensor, plan: Plan, chunk: BlockRows) -> torch.Tensor:
    """Scores ``[n, w]`` of the rows of a chunk, -inf for hidden keys."""
    s_nw = (q_nD @ k_wD.T).mul_(plan.scale)
    _apply_mask(s_nw, chunk)
    return _weighted_scores(s_nw) if plan.landmarks else s_nw


def _weighted_scores(s_nw: torch.Tensor) -> torch.Tensor:
    """Scores ``[n, w]`` of a block that its landmark, the last key, weights, as those of one
    softmax over all blocks: the score of the landmark minus the lse of the others is added to
    theirs, and its own is -inf.  Overwrites them."""
    import torch

    landmark_n1 = s_nw[:, -1:].clone()
    s_nw[:, -1] = -torch.inf
    return s_nw.add_(landmark_n1.sub_(torch.logsumexp(s_nw, 1, True)))


def _score_gradients(ds_nw: torch.Tensor, p_nw: torch.Tensor) -> torch.Tensor:
    """Gradients of scores, that of the landmark included, from those of the weighted scores, which
    are overwritten, and probabilities ``[n, w]``."""
    import torch

    total_n1 = ds_nw.sum(1, True)
    within_nw = p_nw / p_nw.sum(1, True).clamp_(min=torch.finfo(p_nw.dtype).tiny)
    ds_nw.sub_(within_nw.mul_(total_n1))
    ds_nw[:, -1] = total_n1[:, 0]
    return ds_nw
