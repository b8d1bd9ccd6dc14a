"""The `gathered` operator where blocks of queries chose blocks of keys.

A block of queries takes its keys in one copy, for as many heads at once as a cache holds: two
matrix products each, whatever was chosen, and next to no plan.

Legend: B batch, H query heads, G key/value heads, D head dim; X blocks of m queries, Y blocks of w
keys; h heads at work, n blocks of keys of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.selectors.common.selection import Blocks, Grid, cells_of

if TYPE_CHECKING:
    import torch

LOG2E = math.log2(math.e)
FLOOR = -1e30  # a finite row maximum where nothing is visible yet
KEYS = 2048  # of a head at once
SCORES = 1 << 19  # of all heads at once: they stay in a cache


@dataclass(frozen=True, eq=False)
class Plan:
    """The chosen blocks of each block of queries.

    Attributes:
        scale: of the scores.
        grid: of blocks.
        listed: ``[B, H, X, most]`` blocks of keys, ascending, then anything.
        counts: by X, ``[B, H]``: how many of those count; ``most`` by X the largest.
        most: see above.
    """

    scale: float
    grid: Grid
    listed: torch.Tensor
    counts: torch.Tensor
    most: list[int]


def plan(chosen: Blocks, scale: float) -> Plan:
    """From booleans on the device; one wait for it, to learn how much was chosen."""
    kept = chosen.kept & chosen.grid.allowed
    counts = kept.sum(-1)
    most = counts.amax((0, 1)).tolist()
    listed = kept.to(dtype=counts.dtype).argsort(dim=-1, descending=True, stable=True)
    return Plan(scale, chosen.grid, listed[..., : max(most, default=0)], counts, most)


def _partial(grid: Grid) -> torch.Tensor:
    """``[X, Y]``: blocks that hide something, a short last block of keys its missing ones."""
    return grid.allowed & (grid.areas < grid.extents[0][:, None] * grid.block_k)


def _hidden(grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """``[X, Y]`` which of ``[p + 2, m, w]`` booleans a block hides: the last hides all, the one
    before nothing."""
    if "hidden" not in grid.memo:
        grid.memo["hidden"] = _made_hidden(grid)
    found: tuple[torch.Tensor, torch.Tensor] = grid.memo["hidden"]
    return found


def _made_hidden(grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    import numpy as np
    import torch

    slices, cells = cells_of(grid.mask, grid.block_q, grid.block_k)
    columns = grid.areas.shape[1]
    partial = np.flatnonzero(_partial(grid).cpu().numpy().reshape(-1))
    hides = np.ones((len(partial) + 2, grid.block_q, grid.block_k), dtype=np.bool_)
    hides[-2] = False
    place = np.searchsorted(partial, cells)
    place = np.minimum(place, max(len(partial) - 1, 0))
    for one in np.flatnonzero(partial[place] == cells) if len(partial) else ():
        q0, q1, k0, k1, lo, hi = slices[one].tolist()
        x, y = divmod(int(cells[one]), columns)
        offset = np.arange(k0, k1) - np.arange(q0, q1)[:, None]
        q0, q1, k0, k1 = (
            a - b * c
            for a, b, c in zip(
                (q0, q1, k0, k1), (x, x, y, y), (*[grid.block_q] * 2, *[grid.block_k] * 2),
                strict=True,
            )
        )  # fmt: skip
        hides[place[one], q0:q1, k0:k1] &= (offset < lo) | (offset > hi)
    number = np.full(grid.areas.numel(), len(partial))
    number[partial] = np.arange(len(partial))
    device = grid.areas.device
    which = torch.as_tensor(number.reshape(grid.areas.shape), device=device)
    return which, torch.as_tensor(hides, device=device)


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some heads of a block of queries, and some of their blocks of keys.

    Attributes:
        rows: of the queries; ``heads`` of them.
        blocks: ``[h, n]`` blocks of keys; ``places`` ``[h, n]`` the same among those of all heads.
        first, last: whether these are the first, or the last, of the heads' blocks.
    """

    rows: slice
    heads: slice
    blocks: torch.Tensor
    places: torch.Tensor
    first: bool
    last: bool
    hide: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


def _pieces(plan: Plan, b: int, heads: int, group: int) -> Iterator[_Piece]:
    """The work of one batch."""
    import torch

    grid = plan.grid
    which, hides = _hidden(grid)
    columns, most_blocks = grid.areas.shape[1], max(1, KEYS // grid.block_k)
    for x, most in enumerate(plan.most):
        rows = _rows_of(grid, x)
        width = min(max(most, 1), most_blocks)
        at_once = max(1, SCORES // (grid.block_q * width * grid.block_k))
        for h0 in range(0, heads, at_once):
            h1 = min(h0 + at_once, heads)
            counts = plan.counts[b, h0:h1, x]
            of_kv = torch.arange(h0, h1, device=counts.device)[:, None] // group * columns
            for n0 in range(0, most, most_blocks):
                n1 = min(n0 + most_blocks, most)
                blocks = plan.listed[b, h0:h1, x, n0:n1]
                number = which[x][blocks]
                missing = torch.arange(n0, n1, device=blocks.device) >= counts[:, None]
                number = number.masked_fill(missing, len(hides) - 1)
                some = torch.nonzero(number != len(hides) - 2)
                hide = None
                if len(some):
                    head, slot = some.unbind(1)
                    hide = head, slot, hides[number[head, slot], : rows.stop - rows.start]
                yield _Piece(rows, slice(h0, h1), blocks, of_kv + blocks, n0 == 0, n1 == most, hide)


def _rows_of(grid: Grid, x: int) -> slice:
    return slice(x * grid.block_q, min((x + 1) * grid.block_q, grid.mask.seq_q))


def _blind(plan: Plan) -> Iterator[slice]:
    """Queries of blocks for which no head chose anything: nothing is computed for them."""
    return (_rows_of(plan.grid, x) for x, most in enumerate(plan.most) if not most)


def _hide(s_hmn: torch.Tensor, piece: _Piece, width: int) -> None:
    """Set to -inf what is not visible of partly visible blocks, and what was not chosen."""
    if piece.hide is None:
        return
    head, slot, hides = piece.hide
    by_block = s_hmn.unflatten(2, (-1, width)).transpose(1, 2)
    by_block[head, slot] = by_block[head, slot].masked_fill_(hides, -math.inf)


def _blocked(x_BTGD: torch.Tensor, b: int, block: int, dtype: torch.dtype) -> torch.Tensor:
    """``[G * Y, w, D]``: the blocks of keys of one batch, the last filled with zeros."""
    import torch

    x = x_BTGD[b].to(dtype).transpose(0, 1)
    missing = -x.shape[1] % block
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.reshape(-1, block, x.shape[2])


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``cpbench.core.operator.Operator.forward``."""
    import torch

    dtype, width = torch.promote_types(q.dtype, torch.float32), plan.grid.block_k
    (B, S, H, _), group = q.shape, q.shape[2] // k.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((B, H, S), dtype=torch.float32)
    for rows in _blind(plan):
        out[:, rows], lse[:, :, rows] = 0.0, -math.inf
    for b in range(B):
        q_HSD = q[b].to(dtype).transpose(0, 1)
        k_, v_ = _blocked(k, b, width, dtype), _blocked(v, b, width, dtype)
        o_hmD = sum_hm1 = max_hm1 = torch.empty(0)
        for piece in _pieces(plan, b, H, group):
            q_hmD = q_HSD[piece.heads, piece.rows]
            k_hnD, v_hnD = (_taken(x, piece.places) for x in (k_, v_))
            s_hmn = torch.bmm(q_hmD, k_hnD.mT).mul_(plan.scale * LOG2E)
            _hide(s_hmn, piece, width)
            new_hm1 = s_hmn.amax(-1, True).clamp_(min=FLOOR)
            if piece.first:
                max_hm1 = new_hm1
                s_hmn.sub_(max_hm1).exp2_()
                o_hmD, sum_hm1 = torch.bmm(s_hmn, v_hnD), s_hmn.sum(-1, True)
            else:
                new_hm1 = torch.maximum(new_hm1, max_hm1)
                shrink = (max_hm1 - new_hm1).exp2_()
                s_hmn.sub_(new_hm1).exp2_()
                o_hmD = o_hmD.mul_(shrink).baddbmm_(s_hmn, v_hnD)
                sum_hm1 = sum_hm1.mul_(shrink).add_(s_hmn.sum(-1, True))
                max_hm1 = new_hm1
            if piece.last:
                found = (sum_hm1.log2() + max_hm1).mul_(1 / LOG2E)
                lse[b, piece.heads, piece.rows] = found.squeeze(-1).float()
                done = o_hmD.div_(sum_hm1.masked_fill(sum_hm1 == 0, 1.0))
                out[b, piece.rows, piece.heads] = done.transpose(0, 1).to(q.dtype)
    return out, lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``cpbench.core.operator.Operator.backward``."""
    import torch

    dtype, width = torch.promote_types(q.dtype, torch.float32), plan.grid.block_k
    heads, (T, G) = q.shape[2], k.shape[1:3]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows in _blind(plan):
        dq[:, rows] = 0.0
    for b in range(len(q)):
        q_HSD, do_HSD, out_HSD = (x[b].to(dtype).transpose(0, 1) for x in (q, dout, out))
        k_, v_ = _blocked(k, b, width, dtype), _blocked(v, b, width, dtype)
        dk_, dv_ = torch.zeros_like(k_), torch.zeros_like(v_)
        delta_HS1 = (do_HSD * out_HSD).sum(-1, True)
        lse_HS1 = lse[b].to(dtype).mul(LOG2E).masked_fill_(lse[b] == -math.inf, math.inf)[..., None]
        dq_hmD = torch.empty(0)
        for piece in _pieces(plan, b, heads, heads // G):
            at = piece.heads, piece.rows
            q_hmD, do_hmD = q_HSD[at], do_HSD[at]
            k_hnD, v_hnD = (_taken(x, piece.places) for x in (k_, v_))
            s_hmn = torch.bmm(q_hmD, k_hnD.mT).mul_(plan.scale * LOG2E)
            _hide(s_hmn, piece, width)
            p_hmn = s_hmn.sub_(lse_HS1[at]).exp2_()
            places = piece.places.flatten()
            _add_blocks(dv_, places, torch.bmm(p_hmn.mT, do_hmD))
            ds_hmn = torch.bmm(do_hmD, v_hnD.mT).sub_(delta_HS1[at]).mul_(p_hmn).mul_(plan.scale)
            _add_blocks(dk_, places, torch.bmm(ds_hmn.mT, q_hmD))
            part = torch.bmm(ds_hmn, k_hnD)
            dq_hmD = part if piece.first else dq_hmD.add_(part)
            if piece.last:
                dq[b, piece.rows, piece.heads] = dq_hmD.transpose(0, 1).to(q.dtype)
        for into, of_blocks in ((dk, dk_), (dv, dv_)):
            whole = of_blocks.view(G, -1, into.shape[3])[:, :T]
            into[b] = whole.transpose(0, 1).to(into.dtype)
    return dq, dk, dv


def _taken(x: torch.Tensor, places_hn: torch.Tensor) -> torch.Tensor:
    """``[h, n * w, D]``: blocks one after another, copied row by row."""
    rows = x.flatten(1).index_select(0, places_hn.flatten())
    return rows.view(len(places_hn), -1, x.shape[2])


def _add_blocks(into: torch.Tensor, blocks: torch.Tensor, x_hnD: torch.Tensor) -> None:
    """Add to blocks of keys; several query heads may add to one."""
    into.flatten(1).index_add_(0, blocks, x_hnD.reshape(len(blocks), -1))
