"""Attention to single keys per query, which are gathered for a chunk of queries at a time.

A chunk is so small that its keys and values stay in a cache, and is gathered into memory that all
chunks share: a CPU copies a row there in a tenth of the time that advanced indexing takes.

Legend: S queries, T keys, R query heads of a key/value head, D head dim; N = R * S rows; s queries
of a chunk, n keys of a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from cpbench.kernels.gathered.running_softmax import LOG2E, RunningSoftmax
from cpbench.selectors.selections import Tokens

if TYPE_CHECKING:
    import torch

# Elements of gathered keys of a chunk of queries; few launches on a GPU.
MAX_GATHERED_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


class _Chunk(NamedTuple):
    """Some queries of the heads that list the same keys, and those keys.

    Attributes:
        heads, queries: of the rows.
        keys: ``[s * n]``, 0 where none is listed.
        unlisted: ``[s, 1, n]`` booleans, where none is listed.
        k_snD, v_snD: the keys and their values; overwritten by the next chunk.
    """

    heads: slice
    queries: slice
    keys: torch.Tensor
    unlisted: torch.Tensor
    k_snD: torch.Tensor
    v_snD: torch.Tensor

    def of(self, x_RSD: torch.Tensor) -> torch.Tensor:
        """Its rows of all, ``[s, R, D]``."""
        return x_RSD[self.heads, self.queries].transpose(0, 1).contiguous()

    def scores(self, q_RSD: torch.Tensor) -> torch.Tensor:
        """Unscaled scores ``[s, R, n]``, -inf where no key is listed."""
        import torch

        s_sRn = torch.bmm(self.of(q_RSD), self.k_snD.mT)
        return s_sRn.masked_fill_(self.unlisted, -torch.inf)


def head_index(tokens: Tokens, b: int, heads: slice) -> torch.Tensor:
    """The listed keys of some heads, ``[R or 1, S, n]``."""
    index = tokens.index[b]
    return index if len(index) == 1 else index[heads]


def _chunks(
    index: torch.Tensor, heads: int, k_TD: torch.Tensor, v_TD: torch.Tensor
) -> Iterator[_Chunk]:
    import torch

    _, queries, n = index.shape
    if not n:
        return
    max_elements = MAX_GATHERED_ELEMENTS.get(index.device.type, MAX_GATHERED_ELEMENTS["cpu"])
    step = max(1, min(queries, max_elements // max(n * k_TD.shape[1], 1)))
    gathered = [(x_TD, x_TD.new_empty((step * n, x_TD.shape[1]))) for x_TD in (k_TD, v_TD)]
    own = [slice(0, heads)] if len(index) == 1 else [slice(h, h + 1) for h in range(heads)]
    for of_heads, index_Sn in zip(own, index, strict=True):
        for begin in range(0, queries, step):
            rows = slice(begin, min(begin + step, queries))
            index_sn = index_Sn[rows]
            keys = index_sn.clamp(min=0).flatten().long()
            k_snD, v_snD = (
                torch.index_select(x_TD.detach(), 0, keys, out=into[: len(keys)]).view(
                    *index_sn.shape, x_TD.shape[1]
                )
                for x_TD, into in gathered
            )
            yield _Chunk(of_heads, rows, keys, (index_sn < 0)[:, None], k_snD, v_snD)


def forward(
    q_ND: torch.Tensor, k_TD: torch.Tensor, v_TD: torch.Tensor, scale: float, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[N, D]`` and lse ``[R, S]`` of the listed keys ``[R or 1, S, n]``."""
    import torch

    tokens = index.shape[1]
    q_RSD, out_ND = q_ND.view(-1, tokens, q_ND.shape[1]), torch.zeros_like(q_ND)
    out_RSD, lse_RS = out_ND.view(q_RSD.shape), q_ND.new_full((len(q_RSD), tokens), -torch.inf)
    scaled_q = q_RSD * (scale * LOG2E)
    for chunk in _chunks(index, len(q_RSD), k_TD, v_TD):
        softmax = RunningSoftmax()
        softmax.add(chunk.scores(scaled_q), chunk.v_snD)
        out_sRD, lse_sR = softmax.result()
        out_RSD[chunk.heads, chunk.queries] = out_sRD.transpose(0, 1)
        lse_RS[chunk.heads, chunk.queries] = lse_sR.T
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
    for chunk in _chunks(index, len(q), k_TD, v_TD):
        q_sRD, do_sRD, k_snD, v_snD = chunk.of(q), chunk.of(do), chunk.k_snD, chunk.v_snD
        p_sRn = chunk.scores(q).mul_(scale).sub_(chunk.of(lse)).exp_()
        ds_sRn = torch.bmm(do_sRD, v_snD.mT)
        ds_sRn.sub_(chunk.of(delta)).mul_(p_sRn).mul_(scale)
        dq[chunk.heads, chunk.queries] = torch.bmm(ds_sRn, k_snD).transpose(0, 1)
        # The gathered keys and values have been used: their gradients take their place.
        torch.bmm(ds_sRn.mT, q_sRD, out=k_snD)
        torch.bmm(p_sRn.mT, do_sRD, out=v_snD)
        dk_TD.index_add_(0, chunk.keys, k_snD.flatten(0, 1))
        dv_TD.index_add_(0, chunk.keys, v_snD.flatten(0, 1))
    return dq_ND, dk_TD, dv_TD
