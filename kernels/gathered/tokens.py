"""Attention to single keys per query, which are gathered for a chunk of queries at a time.

Legend: S queries, T keys, R query heads of a key/value head, D head dim; N = R * S rows; s queries
of a chunk, n keys of a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cpbench.selectors.selections import Tokens

if TYPE_CHECKING:
    import torch

MAX_GATHERED_ELEMENTS = 1 << 21  # elements of gathered keys of a chunk of queries


def head_index(tokens: Tokens, b: int, heads: slice) -> torch.Tensor:
    """The listed keys of some heads, ``[R or 1, S, n]``."""
    index = tokens.index[b]
    return index if len(index) == 1 else index[heads]


def _query_chunks(index: torch.Tensor, dim: int) -> Iterator[slice]:
    """Split the queries into chunks of at most ``MAX_GATHERED_ELEMENTS`` elements of keys."""
    step = max(1, MAX_GATHERED_ELEMENTS // (max(index.shape[2], 1) * dim))
    for begin in range(0, index.shape[1], step):
        yield slice(begin, min(begin + step, index.shape[1]))


def _index_by_heads(index: torch.Tensor, heads: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Query heads that share their listed keys, with those keys ``[S, n]``."""
    if len(index) == 1:
        yield slice(0, heads), index[0]
        return
    for h in range(heads):
        yield slice(h, h + 1), index[h]


def _masked_scores(
    q_sRD: torch.Tensor, k_snD: torch.Tensor, index_sn: torch.Tensor, scale: float
) -> torch.Tensor:
    """Scores ``[s, R, n]``, -inf where no key is listed."""
    import torch

    s_sRn = torch.bmm(q_sRD, k_snD.transpose(1, 2)).mul_(scale)
    return s_sRn.masked_fill_((index_sn < 0)[:, None], -torch.inf)


def forward(
    q_ND: torch.Tensor, k_TD: torch.Tensor, v_TD: torch.Tensor, scale: float, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[N, D]`` and lse ``[R, S]`` of the listed keys ``[R or 1, S, n]``."""
    import torch

    tokens = index.shape[1]
    q_RSD, out_ND = q_ND.view(-1, tokens, q_ND.shape[1]), torch.empty_like(q_ND)
    out_RSD, lse_RS = out_ND.view(q_RSD.shape), q_ND.new_empty((len(q_RSD), tokens))
    for heads, index_Sn in _index_by_heads(index, len(q_ND) // tokens):
        for chunk in _query_chunks(index, q_ND.shape[1]):
            index_sn = index_Sn[chunk]
            keys = index_sn.clamp(min=0).long()
            q_sRD = q_RSD[heads, chunk].transpose(0, 1)
            s_sRn = _masked_scores(q_sRD, k_TD[keys], index_sn, scale)
            lse_sR = torch.logsumexp(s_sRn, -1)
            finite_lse = lse_sR.masked_fill(lse_sR == -torch.inf, 0.0)
            p_sRn = s_sRn.sub_(finite_lse[..., None]).exp_()
            out_RSD[heads, chunk] = torch.bmm(p_sRn, v_TD[keys]).transpose(0, 1)
            lse_RS[heads, chunk] = lse_sR.T
    return out_ND, lse_RS


def backward(
    do_ND: torch.Tensor,
    q_ND: torch.Tensor,
    k_TD: torch.Tensor,
    v_TD: torch.Tensor,
    delta_N1: torch.Tensor,
    lse_N1: torch.Tensor,
    scale: float,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq ``[N, D]``, dk and dv ``[T, D]``, given delta and lse of all rows."""
    import torch

    tokens = index.shape[1]
    dq_ND, dk_TD, dv_TD = (torch.zeros_like(x) for x in (q_ND, k_TD, v_TD))
    q, do, delta, lse, dq = (
        x.view(-1, tokens, x.shape[1]) for x in (q_ND, do_ND, delta_N1, lse_N1, dq_ND)
    )
    for heads, index_Sn in _index_by_heads(index, len(q_ND) // tokens):
        for chunk in _query_chunks(index, q_ND.shape[1]):
            index_sn = index_Sn[chunk]
            keys = index_sn.clamp(min=0).long()
            k_snD, v_snD = k_TD[keys], v_TD[keys]
            q_sRD, do_sRD = (x[heads, chunk].transpose(0, 1) for x in (q, do))
            s_sRn = _masked_scores(q_sRD, k_snD, index_sn, scale)
            p_sRn = s_sRn.sub_(lse[heads, chunk].transpose(0, 1)).exp_()
            ds_sRn = torch.bmm(do_sRD, v_snD.transpose(1, 2))
            ds_sRn.sub_(delta[heads, chunk].transpose(0, 1)).mul_(p_sRn).mul_(scale)
            dq[heads, chunk] = torch.bmm(ds_sRn, k_snD).transpose(0, 1)
            keys = keys.flatten()
            dk_TD.index_add_(0, keys, torch.bmm(ds_sRn.transpose(1, 2), q_sRD).flatten(0, 1))
            dv_TD.index_add_(0, keys, torch.bmm(p_sRn.transpose(1, 2), do_sRD).flatten(0, 1))
    return dq_ND, dk_TD, dv_TD
