"""Operator `gathered`: attention to the selections of selectors, in plain torch on any device.

For selections of kind ``"rows"`` (blocks of keys per query) it goes from one block of keys to the
next and gathers the queries that selected it, as an online softmax of two matrix products (as in
MoBA, arXiv 2502.13189, without its sorting into variable-length calls).  For kind ``"tokens"``
(single keys per query) it gathers the keys of a chunk of queries.  Kind ``"blocks"`` is in
``cpbench.kernels.gathered.blocks``; kind ``"lines"`` (columns and diagonals), and on CPUs blocks
for which that is faster, as calls of torch's fused kernel (``cpbench.kernels.gathered.tree``).

Legend: B batch, S queries, T keys, H query heads, G key/value heads, R query heads of each, D head
dim; N = R * S rows of a key/value head; Y blocks of w keys; n rows of a chunk, or keys of a query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.gathered import blocks as gathered_blocks
from cpbench.kernels.gathered import calls, tree
from cpbench.kernels.gathered import tokens as gathered_tokens
from cpbench.kernels.gathered.running_softmax import LOG2E, MIN_ROW_MAX
from cpbench.selectors.common.hidden_keys import hidden_key_table
from cpbench.selectors.selections import Blocks, Grid, Lines, Selection, Tokens

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.core.problem import Problem

OPERATORS = (
    OperatorInfo(
        name="gathered",
        summary="for selectors: gathers the selected blocks or single keys",
        source="MoBA, arXiv 2502.13189, as gathered rows; top-k gather as in DeepSeek sparse "
        "attention",
        load="cpbench.kernels.gathered.operator:Gathered",
        masks=("blocks", "lines", "rows", "tokens"),
        dtypes=("float64", "float32", "bfloat16", "float16"),
    ),
)

MAX_ROWS = 2048  # rows of a chunk of a block of keys, so that scores stay in a cache


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows that attend to each block, or the listed keys.

    Attributes:
        scale: factor of the scores.
        rows: for kind ``"rows"``: by batch and key/value head, then by block, the rows that attend
            to it, in chunks.
        grid: for kind ``"rows"``: the blocks.
        tokens: for kind ``"tokens"``: the selection.
    """

    scale: float
    rows: tuple[RowsByBlock, ...] = ()
    grid: Grid | None = None
    tokens: Tokens | None = None


class Gathered:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    def unsupported(self, problem: Problem, mask: object, device: str) -> str | None:
        if problem.deterministic and not self.is_deterministic(problem, device):
            return "gathered sums gradients of keys in any order on cuda: not deterministic"
        return None

    def is_deterministic(self, problem: Problem, device: str) -> bool:
        """See ``cpbench.core.operator.is_deterministic``."""
        return not (problem.backward and device.startswith("cuda"))

    def prepare(
        self, mask: Selection, problem: Problem, device: str
    ) -> Plan | gathered_blocks.Plan | calls.Plan:
        if isinstance(mask, Lines):
            return tree.plan(mask, problem.softmax_scale)
        if isinstance(mask, Blocks) and mask.kind == "blocks":
            in_calls = None
            if device == "cpu":
                in_calls = tree.plan_if_faster(mask, problem.softmax_scale)
            return in_calls or gathered_blocks.plan(mask, problem.softmax_scale)
        if isinstance(mask, Tokens):
            return Plan(problem.softmax_scale, tokens=mask)
        return Plan(problem.softmax_scale, _rows_by_block(mask, problem.heads_kv), mask.grid)

    def forward(self, qkv: QKV, plan: Plan | gathered_blocks.Plan | calls.Plan) -> OutLse:
        import torch

        if isinstance(plan, gathered_blocks.Plan):
            return gathered_blocks.forward(qkv, plan)
        if isinstance(plan, calls.Plan):
            return calls.forward(qkv, plan)
        q, k, v = qkv
        work = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        for b, g, heads in _groups(q, k):
            q_ND, k_TD, v_TD = (
                _to_rows(q[b, :, heads], work),
                k[b, :, g].to(work),
                v[b, :, g].to(work),
            )
            if plan.tokens is not None:
                index = gathered_tokens.head_index(plan.tokens, b, heads)
                out_ND, lse_N = gathered_tokens.forward(q_ND, k_TD, v_TD, plan.scale, index)
            else:
                rows = plan.rows[b * k.shape[2] + g]
                out_ND, lse_N = _blocks_forward(q_ND, k_TD, v_TD, plan, rows)
            out[b, :, heads] = _from_rows(out_ND, q.shape[1])
            lse[b, heads] = lse_N.view(-1, q.shape[1]).float()
        return out, lse

    def backward(
        self, x: BackwardInputs, plan: Plan | gathered_blocks.Plan | calls.Plan
    ) -> Gradients:
        import torch

        if isinstance(plan, gathered_blocks.Plan):
            return gathered_blocks.backward(x, plan)
        if isinstance(plan, calls.Plan):
            return calls.backward(x, plan)
        dout, q, k, v, out, lse = x
        work = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for b, g, heads in _groups(q, k):
            do_ND, q_ND, out_ND = (_to_rows(x[b, :, heads], work) for x in (dout, q, out))
            k_TD, v_TD = k[b, :, g].to(work), v[b, :, g].to(work)
            delta_N1 = (do_ND * out_ND).sum(-1, True)
            lse_N1 = lse[b, heads].to(work).reshape(-1, 1)
            lse_N1 = lse_N1.masked_fill(lse_N1 == -torch.inf, torch.inf)
            arguments = do_ND, q_ND, k_TD, v_TD, delta_N1, lse_N1
            if plan.tokens is not None:
                index = gathered_tokens.head_index(plan.tokens, b, heads)
                grads = gathered_tokens.backward(*arguments, plan.scale, index)
            else:
                grads = _blocks_backward(*arguments, plan, plan.rows[b * k.shape[2] + g])
            dq[b, :, heads] = _from_rows(grads[0], q.shape[1])
            dk[b, :, g], dv[b, :, g] = grads[1], grads[2]
        return dq, dk, dv


def _groups(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[int, int, slice]]:
    """Each batch index and key/value head, with its query heads."""
    group = q.shape[2] // k.shape[2]
    for b in range(len(q)):
        for g in range(k.shape[2]):
            yield b, g, slice(g * group, (g + 1) * group)


def _to_rows(x_SRD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[R * S, D]``, head-major."""
    return x_SRD.to(dtype).transpose(0, 1).reshape(-1, x_SRD.shape[2])


def _from_rows(x_ND: torch.Tensor, tokens: int) -> torch.Tensor:
    """The inverse of :func:`_to_rows`: ``[S, R, D]``."""
    return x_ND.view(-1, tokens, x_ND.shape[1]).transpose(0, 1)


# --- blocks of keys per query -------------------------------------------------------------------


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


def _rows_by_block(selection: Blocks, heads_kv: int) -> tuple[RowsByBlock, ...]:
    """The rows that attend to each block, in chunks, by batch and key/value head."""
    import torch

    grid, tokens = selection.grid, selection.seq_q
    hidden_index, hidden_keys = hidden_key_table(grid)
    columns = grid.areas.shape[1]
    kept = selection.kept & grid.allowed
    by_block = kept.unflatten(1, (heads_kv, -1)).flatten(0, 1).permute(0, 3, 1, 2).flatten(2)
    widths = [min(grid.block_k, selection.seq_k - y * grid.block_k) for y in range(columns)]
    rows_by_head = []
    for kept_YN in by_block:
        block, row = torch.nonzero(kept_YN.contiguous()).unbind(1)
        entry = hidden_index[row % tokens, block]
        partial = torch.nonzero(entry >= 0)[:, 0]
        counts, partials = (torch.bincount(x, minlength=columns) for x in (block, block[partial]))
        begins = counts.cumsum(0) - counts
        position, hidden = partial - begins[block[partial]], hidden_keys[entry[partial]]
        sections = ((row, counts), (position, partials), (hidden, partials))
        split = (tensor.split(lengths.tolist()) for tensor, lengths in sections)
        blocks = [
            BlockRows(rows, partial, hidden[:, :width])
            for rows, partial, hidden, width in zip(*split, widths, strict=True)
        ]
        rows_by_head.append(tuple(tuple(_row_chunks(rows)) for rows in blocks))
    return tuple(rows_by_head)


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


def _blocks_forward(
    q_ND: torch.Tensor,
    k_TD: torch.Tensor,
    v_TD: torch.Tensor,
    plan: Plan,
    rows_by_block: RowsByBlock,
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    assert plan.grid is not None
    out_ND, sum_N1 = torch.zeros_like(q_ND), q_ND.new_zeros((len(q_ND), 1))
    max_N1 = torch.full_like(sum_N1, MIN_ROW_MAX)
    for keys, chunk in _key_row_chunks(rows_by_block, plan.grid):
        rows = chunk.rows
        s_nw = q_ND.index_select(0, rows) @ k_TD[keys].T
        s_nw.mul_(plan.scale * LOG2E)
        _apply_mask(s_nw, chunk)
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


def _blocks_backward(
    do_ND: torch.Tensor,
    q_ND: torch.Tensor,
    k_TD: torch.Tensor,
    v_TD: torch.Tensor,
    delta_N1: torch.Tensor,
    lse_N1: torch.Tensor,
    plan: Plan,
    rows_by_block: RowsByBlock,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    assert plan.grid is not None
    dq_ND, dk_TD, dv_TD = (torch.zeros_like(x) for x in (q_ND, k_TD, v_TD))
    for keys, chunk in _key_row_chunks(rows_by_block, plan.grid):
        rows = chunk.rows
        q_nD, do_nD, lse_n1, delta_n1 = (
            x.index_select(0, rows) for x in (q_ND, do_ND, lse_N1, delta_N1)
        )
        k_wD = k_TD[keys]
        s_nw = (q_nD @ k_wD.T).mul_(plan.scale)
        _apply_mask(s_nw, chunk)
        p_nw = s_nw.sub_(lse_n1).exp_()
        dv_TD[keys].addmm_(p_nw.T, do_nD)
        ds_nw = (do_nD @ v_TD[keys].T).sub_(delta_n1).mul_(p_nw).mul_(plan.scale)
        dk_TD[keys].addmm_(ds_nw.T, q_nD)
        dq_ND.index_add_(0, rows, ds_nw @ k_wD)
    return dq_ND, dk_TD, dv_TD
