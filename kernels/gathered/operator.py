"""Operator `gathered`: every query attends to keys of its own, in plain torch on any device.

It computes what selectors choose.  Where each query chooses blocks of keys it goes block by block
and gathers the queries that chose it, as a running softmax of two matrix products (the way of MoBA,
arXiv 2502.13189, without its sorting into variable-length calls).  Where queries list single keys
it gathers those, some queries at a time.  Blocks of queries are in ``gathered_blocks``.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, R query heads of each, D head
dim; N = R * S rows of a key/value head; Y blocks of w keys; n rows at work, or keys listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.gathered import blocks as gathered_blocks
from cpbench.kernels.gathered.blocks import FLOOR, LOG2E
from cpbench.selectors.common.selection import Blocks, Grid, Selection, Tokens

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem

OPERATORS = (
    OperatorInfo(
        name="gathered",
        summary="for selectors: gathers the blocks or the single keys that were chosen",
        source="MoBA, arXiv 2502.13189, as gathered rows; top-k gather as in DeepSeek sparse "
        "attention",
        load="cpbench.kernels.gathered.operator:Gathered",
        masks=("blocks", "rows", "tokens"),
        dtypes=("float64", "float32", "bfloat16", "float16"),
    ),
)

ROWS = 2048  # of a block of keys at once: scores stay in a cache
GATHERED = 1 << 21  # most elements of gathered keys at once


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows see which block, or the listed keys.

    Attributes:
        scale: of the scores.
        rows: of blocks: by batch and key/value head, then block, the rows (head-major) that see it.
        grid: of blocks.
        tokens: of listed keys.
    """

    scale: float
    rows: tuple[tuple[tuple[Rows, ...], ...], ...] = ()
    grid: Grid | None = None
    tokens: Tokens | None = None


class Gathered:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    def unsupported(self, problem: Problem, mask: object, device: str) -> str | None:
        if problem.deterministic and problem.backward and device.startswith("cuda"):
            return "gathered adds up gradients of keys in any order on cuda: not deterministic"
        return None  # whatever a selector chose

    def prepare(
        self, mask: Selection, problem: Problem, device: str
    ) -> Plan | gathered_blocks.Plan:
        if isinstance(mask, Blocks) and mask.kind == "blocks":
            return gathered_blocks.plan(mask, problem.softmax_scale)
        if isinstance(mask, Tokens):
            return Plan(problem.softmax_scale, tokens=mask)
        return Plan(problem.softmax_scale, _rows_of(mask, problem.heads_kv), mask.grid)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan | gathered_blocks.Plan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if isinstance(plan, gathered_blocks.Plan):
            return gathered_blocks.forward(q, k, v, plan)
        work = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        for b, g, heads in _groups(q, k):
            q_ND, k_TD, v_TD = _rows(q[b, :, heads], work), k[b, :, g].to(work), v[b, :, g].to(work)
            if plan.tokens is not None:
                found = _listed_forward(q_ND, k_TD, v_TD, plan, _index(plan.tokens, b, heads))
            else:
                lists = plan.rows[b * k.shape[2] + g]
                found = _blocks_forward(q_ND, k_TD, v_TD, plan, lists)
            out[b, :, heads] = _unrowed(found[0], q.shape[1])
            lse[b, heads] = found[1].view(-1, q.shape[1]).float()
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        plan: Plan | gathered_blocks.Plan,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        if isinstance(plan, gathered_blocks.Plan):
            return gathered_blocks.backward(dout, q, k, v, out, lse, plan)
        work = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for b, g, heads in _groups(q, k):
            of_queries = (_rows(x[b, :, heads], work) for x in (dout, q, out))
            do_ND, q_ND, out_ND = of_queries
            k_TD, v_TD = k[b, :, g].to(work), v[b, :, g].to(work)
            delta_N1 = (do_ND * out_ND).sum(-1, True)
            lse_N1 = lse[b, heads].to(work).reshape(-1, 1)
            lse_N1 = lse_N1.masked_fill(lse_N1 == -torch.inf, torch.inf)
            given = do_ND, q_ND, k_TD, v_TD, delta_N1, lse_N1, plan
            if plan.tokens is not None:
                grads = _listed_backward(*given, _index(plan.tokens, b, heads))
            else:
                grads = _blocks_backward(*given, plan.rows[b * k.shape[2] + g])
            dq[b, :, heads] = _unrowed(grads[0], q.shape[1])
            dk[b, :, g], dv[b, :, g] = grads[1], grads[2]
        return dq, dk, dv


def _groups(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[int, int, slice]]:
    """Batch, key/value head and its query heads."""
    each = q.shape[2] // k.shape[2]
    for b in range(len(q)):
        for g in range(k.shape[2]):
            yield b, g, slice(g * each, (g + 1) * each)


def _rows(x_SRD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[R * S, D]``."""
    return x_SRD.to(dtype).transpose(0, 1).reshape(-1, x_SRD.shape[2])


def _unrowed(x_ND: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[S, R, D]``."""
    return x_ND.view(-1, tokens, x_ND.shape[1]).transpose(0, 1)


# --- blocks -------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The rows that see a block of keys, or some of them.

    Attributes:
        rows: head-major.
        cut: which of these see a part of the block alone.
        hidden: ``[cut, w]`` booleans, what those do not see.
    """

    rows: torch.Tensor
    cut: torch.Tensor
    hidden: torch.Tensor


def _rows_of(chosen: Blocks, heads_kv: int) -> tuple[tuple[tuple[Rows, ...], ...], ...]:
    """The rows that see each block, some at a time, by batch and key/value head."""
    import torch

    grid, tokens = chosen.grid, chosen.seq_q
    number, hides = _partial(grid)
    columns = grid.areas.shape[1]
    kept = chosen.kept & grid.allowed
    by_block = kept.unflatten(1, (heads_kv, -1)).flatten(0, 1).permute(0, 3, 1, 2).flatten(2)
    widths = [min(grid.block_k, chosen.seq_k - y * grid.block_k) for y in range(columns)]
    found = []
    for one in by_block:  # [Y, N]
        block, row = torch.nonzero(one.contiguous()).unbind(1)
        which = number[row % tokens, block]
        cut = torch.nonzero(which >= 0)[:, 0]
        counts, cuts = (torch.bincount(x, minlength=columns) for x in (block, block[cut]))
        begins = counts.cumsum(0) - counts
        local, hidden = cut - begins[block[cut]], hides[which[cut]]
        lists = (x.split(n.tolist()) for x, n in ((row, counts), (local, cuts), (hidden, cuts)))
        parts = zip(*lists, widths, strict=True)
        found.append(tuple(tuple(_portions(a, b, c[:, :w])) for a, b, c, w in parts))
    return tuple(found)


def _portions(rows: torch.Tensor, cut: torch.Tensor, hidden: torch.Tensor) -> Iterator[Rows]:
    """The rows of a block, ``ROWS`` at a time."""
    if len(rows) <= ROWS:
        if len(rows):
            yield Rows(rows, cut, hidden)
        return
    for begin in range(0, len(rows), ROWS):
        here = (cut >= begin) & (cut < begin + ROWS)
        yield Rows(rows[begin : begin + ROWS], cut[here] - begin, hidden[here])


def _partial(grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """``[S, Y]`` int32, which of ``[p, w]`` booleans a query hides of a block that it sees a part
    of; -1 of others."""
    if "partial" not in grid.memo:
        grid.memo["partial"] = _made_partial(grid)
    found: tuple[torch.Tensor, torch.Tensor] = grid.memo["partial"]
    return found


def _made_partial(grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    partial = grid.allowed & ~grid.whole
    queries, blocks = torch.nonzero(partial).cpu().numpy().T
    number = torch.full(grid.areas.shape, -1, dtype=torch.int32, device=grid.areas.device)
    number[partial] = torch.arange(len(queries), dtype=torch.int32, device=number.device)
    hides = np.ones((len(queries), grid.block_k), dtype=np.bool_)
    order = np.argsort(blocks, kind="stable")
    ends = np.searchsorted(blocks[order], np.arange(grid.areas.shape[1] + 1))
    turned = grid.mask.transpose()
    for y in range(grid.areas.shape[1]):
        these = order[ends[y] : ends[y + 1]]
        if len(these):
            mine = queries[these]
            k0, k1 = y * grid.block_k, min((y + 1) * grid.block_k, grid.mask.seq_k)
            first, last = int(mine[0]), int(mine[-1]) + 1
            dense = turned.crop(k0, k1, first, last).to_dense().T
            hides[these, : k1 - k0] = ~dense[mine - first]
    return number, torch.as_tensor(hides, device=number.device)


def _hide(s_nw: torch.Tensor, some: Rows) -> None:
    """Set to -inf what rows that see a part of a block do not see of it."""
    if len(some.cut):
        s_nw[some.cut] = s_nw[some.cut].masked_fill_(some.hidden, -math.inf)


def _work(lists: tuple[tuple[Rows, ...], ...], grid: Grid) -> Iterator[tuple[slice, Rows]]:
    """The keys of each block, and some of the rows that see it."""
    for y, parts in enumerate(lists):
        keys = slice(y * grid.block_k, (y + 1) * grid.block_k)
        for some in parts:
            yield keys, some


def _blocks_forward(
    q_ND: torch.Tensor,
    k_TD: torch.Tensor,
    v_TD: torch.Tensor,
    plan: Plan,
    lists: tuple[tuple[Rows, ...], ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    assert plan.grid is not None
    out_ND, sum_N1 = torch.zeros_like(q_ND), q_ND.new_zeros((len(q_ND), 1))
    max_N1 = torch.full_like(sum_N1, FLOOR)
    for keys, some in _work(lists, plan.grid):
        rows = some.rows
        s_nw = (q_ND[rows] @ k_TD[keys].T).mul_(plan.scale * LOG2E)
        _hide(s_nw, some)
        old_n1 = max_N1[rows]
        new_n1 = torch.maximum(old_n1, s_nw.amax(1, True))
        s_nw.sub_(new_n1).exp2_()
        shrink_n1 = old_n1.sub_(new_n1).exp2_()
        sum_N1[rows] = sum_N1[rows].mul_(shrink_n1).add_(s_nw.sum(1, True))
        out_ND[rows] = out_ND[rows].mul_(shrink_n1).addmm_(s_nw, v_TD[keys])
        max_N1[rows] = new_n1
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
    lists: tuple[tuple[Rows, ...], ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    assert plan.grid is not None
    dq_ND, dk_TD, dv_TD = (torch.zeros_like(x) for x in (q_ND, k_TD, v_TD))
    for keys, some in _work(lists, plan.grid):
        rows = some.rows
        q_nD, do_nD, k_wD = q_ND[rows], do_ND[rows], k_TD[keys]
        s_nw = (q_nD @ k_wD.T).mul_(plan.scale)
        _hide(s_nw, some)
        p_nw = s_nw.sub_(lse_N1[rows]).exp_()
        dv_TD[keys].addmm_(p_nw.T, do_nD)
        ds_nw = (do_nD @ v_TD[keys].T).sub_(delta_N1[rows]).mul_(p_nw).mul_(plan.scale)
        dk_TD[keys].addmm_(ds_nw.T, q_nD)
        dq_ND.index_add_(0, rows, ds_nw @ k_wD)
    return dq_ND, dk_TD, dv_TD


# --- listed keys --------------------------------------------------------------------------------


def _index(tokens: Tokens, b: int, heads: slice) -> torch.Tensor:
    """``[R or 1, S, n]``: the keys of some heads."""
    index = tokens.index[b]
    return index if len(index) == 1 else index[heads]


def _spans(index: torch.Tensor, dim: int) -> Iterator[slice]:
    """Some queries at a time."""
    step = max(1, GATHERED // (max(index.shape[2], 1) * dim))
    for begin in range(0, index.shape[1], step):
        yield slice(begin, min(begin + step, index.shape[1]))


def _sets(index_: torch.Tensor, q_ND: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Query heads that share lists, and those lists ``[S, n]``."""
    heads = len(q_ND) // index_.shape[1]
    if len(index_) == 1:
        yield slice(0, heads), index_[0]
        return
    for h in range(heads):
        yield slice(h, h + 1), index_[h]


def _scores(
    q_sRD: torch.Tensor, k_snD: torch.Tensor, index_sn: torch.Tensor, scale: float
) -> torch.Tensor:
    """``[s, R, n]``, -inf where no key is listed."""
    import torch

    s_sRn = torch.bmm(q_sRD, k_snD.transpose(1, 2)).mul_(scale)
    return s_sRn.masked_fill_((index_sn < 0)[:, None], -torch.inf)


def _listed_forward(
    q_ND: torch.Tensor, k_TD: torch.Tensor, v_TD: torch.Tensor, plan: Plan, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    tokens = index.shape[1]
    q_RSD, out_RSD = q_ND.view(-1, tokens, q_ND.shape[1]), torch.empty_like(q_ND)
    lse_RS = q_ND.new_empty((len(q_RSD), tokens))
    for heads, index_Sn in _sets(index, q_ND):
        for span in _spans(index, q_ND.shape[1]):
            listed = index_Sn[span]
            at = listed.clamp(min=0).long()
            s_sRn = _scores(q_RSD[heads, span].transpose(0, 1), k_TD[at], listed, plan.scale)
            lse_sR = torch.logsumexp(s_sRn, -1)
            safe = lse_sR.masked_fill(lse_sR == -torch.inf, 0.0)
            p_sRn = s_sRn.sub_(safe[..., None]).exp_()
            into = out_RSD.view(q_RSD.shape)
            into[heads, span] = torch.bmm(p_sRn, v_TD[at]).transpose(0, 1)
            lse_RS[heads, span] = lse_sR.T
    return out_RSD, lse_RS


def _listed_backward(
    do_ND: torch.Tensor,
    q_ND: torch.Tensor,
    k_TD: torch.Tensor,
    v_TD: torch.Tensor,
    delta_N1: torch.Tensor,
    lse_N1: torch.Tensor,
    plan: Plan,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    tokens = index.shape[1]
    dq_ND, dk_TD, dv_TD = (torch.zeros_like(x) for x in (q_ND, k_TD, v_TD))
    q, do, delta, lse, dq = (
        x.view(-1, tokens, x.shape[1]) for x in (q_ND, do_ND, delta_N1, lse_N1, dq_ND)
    )
    for heads, index_Sn in _sets(index, q_ND):
        for span in _spans(index, q_ND.shape[1]):
            listed = index_Sn[span]
            at = listed.clamp(min=0).long()
            k_snD, v_snD = k_TD[at], v_TD[at]
            q_sRD, do_sRD = (x[heads, span].transpose(0, 1) for x in (q, do))
            s_sRn = _scores(q_sRD, k_snD, listed, plan.scale)
            p_sRn = s_sRn.sub_(lse[heads, span].transpose(0, 1)).exp_()
            ds_sRn = torch.bmm(do_sRD, v_snD.transpose(1, 2))
            ds_sRn.sub_(delta[heads, span].transpose(0, 1)).mul_(p_sRn).mul_(plan.scale)
            dq[heads, span] = torch.bmm(ds_sRn, k_snD).transpose(0, 1)
            flat = at.flatten()
            dk_TD.index_add_(0, flat, torch.bmm(ds_sRn.transpose(1, 2), q_sRD).flatten(0, 1))
            dv_TD.index_add_(0, flat, torch.bmm(p_sRn.transpose(1, 2), do_sRD).flatten(0, 1))
    return dq_ND, dk_TD, dv_TD
