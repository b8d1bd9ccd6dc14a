"""Operator `reference`: attention in float64, in blocks of query rows.

A small problem is one block, that is the textbook formula with materialised scores; the blocks of a
large one stay within a fixed amount of memory.  All other operators are compared with this one.

NaN and infinities reach exactly what depends on them: a pair that is not visible counts for
nothing, not for 0 times a NaN.

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim
(values may have another), R query heads that share a key/value head (H = G * R).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.problem import Problem
from cpbench.core.registry import ANY_MASK, OperatorInfo
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import Mask
from cpbench.selectors.selections import (
    SELECTIONS,
    Blocks,
    LandmarkBlocks,
    Lines,
    Selection,
    Tokens,
)

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse

OPERATORS = (
    OperatorInfo(
        name="reference",
        summary="float64 textbook attention, materialised or in blocks depending on size",
        source="softmax(Q K^T) V in double precision",
        load="cpbench.kernels.reference:Reference",
        masks=(*ANY_MASK, "heads", "dilated", *SELECTIONS),
        dtypes=("float64", "float32", "bfloat16", "float16"),
        max_head_dim=4096,
        value_dims=True,
    ),
)

BLOCK_SCORES = 1 << 24  # scores in memory at once (128 MiB in float64)


@dataclass(frozen=True)
class Plan:
    """The plan: the mask and the scale of the scores."""

    mask: Mask | Selection
    scale: float


class Reference:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    def unsupported(self, problem: Problem, mask: Mask | Selection, device: str) -> str | None:
        return None

    def prepare(self, mask: Mask | Selection, problem: Problem, device: str) -> Plan:
        return Plan(mask, problem.softmax_scale)

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        out, lse = forward64(qkv, plan.mask, plan.scale)
        return out.to(qkv.q.dtype), lse.float()

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        dq, dk, dv = backward64(x, plan.mask, plan.scale)
        return dq.to(x.q.dtype), dk.to(x.k.dtype), dv.to(x.v.dtype)


def forward64(qkv: QKV, mask: Mask | Selection, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out ``[B, S, H, Dv]`` and lse ``[B, H, S]``, both float64."""
    import torch

    q, k, v = qkv
    b, s, h, _ = q.shape
    out = torch.zeros((b, s, h, v.shape[3]), dtype=torch.float64, device=q.device)
    lse = torch.full((b, h, s), -torch.inf, dtype=torch.float64, device=q.device)
    if k.shape[1] == 0:
        return out, lse
    q_BGRSD, k_BGTD, v_BGTD = _grouped(q, k.shape[2]), _heads_first(k), _heads_first(v)
    for rows, bias_ST, scored_ST in _row_blocks(mask, k.shape[2], b * h, q.device):
        scores = _scores(q_BGRSD[:, :, :, rows], k_BGTD, scale, scored_ST)
        if isinstance(mask, LandmarkBlocks):
            scores = by_block(grouped_scores, mask.grid.block_k, scores)
        lse_rows = torch.logsumexp(scores, dim=-1)
        probs = _probabilities(scores, lse_rows, bias_ST)
        out_rows = _product(probs, v_BGTD.unsqueeze(2), bias_ST)
        out[:, rows] = out_rows.permute(0, 3, 1, 2, 4).flatten(2, 3)
        lse[:, :, rows] = lse_rows.flatten(1, 2)
    return out, lse


def backward64(x: BackwardInputs, mask: Mask | Selection, scale: float) -> Gradients:
    """Return dq, dk, dv in float64; out and lse may be the global ones."""
    import torch

    dout, q, k, v, out, lse = x
    b, _s, h, _ = q.shape
    g = k.shape[2]
    q_BGRSD, dout_BGRSD = _grouped(q, g), _grouped(dout, g)
    k_BGTD, v_BGTD = _heads_first(k), _heads_first(v)
    delta = (dout_BGRSD * _grouped(out, g)).sum(-1)
    lse_BGRS = lse.double().unflatten(1, (g, h // g))
    dq = torch.zeros_like(q_BGRSD)
    dk, dv = torch.zeros_like(k_BGTD), torch.zeros_like(v_BGTD)
    if k.shape[1] == 0:
        return dq.permute(0, 3, 1, 2, 4).flatten(2, 3), dk.transpose(1, 2), dv.transpose(1, 2)
    for rows, bias_ST, scored_ST in _row_blocks(mask, k.shape[2], b * h, q.device):
        q_rows, dout_rows = q_BGRSD[:, :, :, rows], dout_BGRSD[:, :, :, rows]
        own_scores = scores = _scores(q_rows, k_BGTD, scale, scored_ST)
        if isinstance(mask, LandmarkBlocks):
            scores = by_block(grouped_scores, mask.grid.block_k, scores)
        probs = _probabilities(scores, lse_BGRS[:, :, :, rows], bias_ST)
        dv += _product(probs.mT, dout_rows, bias_ST.mT).sum(2)
        dscores = torch.einsum("bgrsd,bgtd->bgrst", dout_rows, v_BGTD)
        dscores.sub_(delta[:, :, :, rows].unsqueeze(-1)).mul_(probs).mul_(scale)
        if not _is_finite(dscores):
            dscores.masked_fill_(bias_ST == -torch.inf, 0.0)
        if isinstance(mask, LandmarkBlocks):
            dscores = by_block(grouped_gradients, mask.grid.block_k, own_scores, dscores)
        dq[:, :, :, rows] = _product(dscores, k_BGTD.unsqueeze(2), scored_ST)
        dk += _product(dscores.mT, q_rows, scored_ST.mT).sum(2)
    return dq.permute(0, 3, 1, 2, 4).flatten(2, 3), dk.transpose(1, 2), dv.transpose(1, 2)


def _scores(
    q_BGRSD: torch.Tensor, k_BGTD: torch.Tensor, scale: float, bias_ST: torch.Tensor
) -> torch.Tensor:
    """Scores ``[B, G, R, S, T]`` with their bias, -inf where a pair is not visible."""
    import torch

    scores = torch.einsum("bgrsd,bgtd->bgrst", q_BGRSD, k_BGTD).mul_(scale)
    if not _is_finite(scores):
        scores.masked_fill_(bias_ST == -torch.inf, 0.0)
    return scores.add_(bias_ST)


def grouped_scores(scores_w: torch.Tensor) -> torch.Tensor:
    """Scores of one softmax in which each of the keys of a block ``[…, w]`` has its share, by a
    softmax within the block, of the probability of the last one, the landmark; which has none."""
    import torch

    shares = torch.log_softmax(scores_w[..., :-1], -1)
    shares = shares.masked_fill(scores_w[..., :-1] == -torch.inf, -torch.inf)
    landmark = scores_w[..., -1:]
    return torch.cat([landmark + shares, torch.full_like(landmark, -torch.inf)], -1)


def grouped_gradients(scores_w: torch.Tensor, dgrouped_w: torch.Tensor) -> torch.Tensor:
    """The gradients of scores, from those of :func:`grouped_scores`."""
    import torch

    shares = scores_w[..., :-1].softmax(-1).nan_to_num(0.0)  # of blocks that are not selected
    own = dgrouped_w[..., :-1]
    total = own.sum(-1, True)
    gradients: torch.Tensor = torch.cat([own - shares * total, total], -1)
    return gradients


def by_block(
    function: Callable[..., torch.Tensor], width: int, *xs_T: torch.Tensor
) -> torch.Tensor:
    """A function of ``[…, w]`` for each whole block of keys; keys of a last one that is shorter are
    in no selection that landmarks weight, and stay as in the last argument."""
    import torch

    end = xs_T[0].shape[-1] // width * width
    blocks = function(*(x[..., :end].unflatten(-1, (-1, width)) for x in xs_T))
    return torch.cat([blocks.flatten(-2), xs_T[-1][..., end:]], -1)


def _probabilities(
    scores: torch.Tensor, lse_BGRS: torch.Tensor, bias_ST: torch.Tensor
) -> torch.Tensor:
    """exp(scores - lse), in place of the scores; 0 for queries that see nothing, NaN for all that a
    query sees where one of its scores is infinite."""
    import torch

    lse = lse_BGRS.masked_fill(lse_BGRS == torch.inf, torch.nan)
    lse = lse.masked_fill_(lse == -torch.inf, torch.inf)
    probs = scores.sub_(lse.unsqueeze(-1)).exp_()
    return probs if _is_finite(lse) else probs.masked_fill_(bias_ST == -torch.inf, 0.0)


def _product(weights_ST: torch.Tensor, x_TD: torch.Tensor, bias_ST: torch.Tensor) -> torch.Tensor:
    """``weights @ x``, in which values that are not finite count for visible pairs only."""
    import torch

    if _is_finite(x_TD):
        return weights_ST @ x_TD
    product = weights_ST @ x_TD.nan_to_num(0.0, 0.0, 0.0)
    visible = bias_ST > -torch.inf
    positive, negative = visible & (weights_ST > 0), visible & (weights_ST < 0)
    infinite, minus_infinite = x_TD == torch.inf, x_TD == -torch.inf
    for value, pairs, found in (
        (torch.nan, visible, x_TD.isnan()),
        (torch.nan, visible & (weights_ST == 0), infinite | minus_infinite),
        (torch.inf, positive, infinite), (torch.inf, negative, minus_infinite),
        (-torch.inf, positive, minus_infinite), (-torch.inf, negative, infinite),
    ):  # fmt: skip
        seen = pairs.double() @ found.double() > 0
        product = torch.where(seen, product + value, product)
    return product


def _is_finite(x: torch.Tensor) -> bool:
    return bool(x.sum().isfinite())


def _row_blocks(
    mask: Mask | Selection, groups: int, batch_heads: int, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Blocks of query rows that see something, with the bias of their keys, and that of what they
    have a score with: the same, and landmarks.

    A bias is 0, -inf, or the logarithm of the number of times that a pair counts: ``[S, T]``,
    ``[G, R, S, T]`` if heads differ, or ``[B, G, R, S, T]`` if batches differ too.
    """
    import torch

    step = max(1, BLOCK_SCORES // max(1, batch_heads * mask.seq_k))
    for start in range(0, mask.seq_q, step):
        end = min(start + step, mask.seq_q)
        if isinstance(mask, Blocks | Lines | Tokens):
            bias = _bias_of(mask.dense_rows(start, end), groups)
            scored = bias
            if isinstance(mask, LandmarkBlocks):
                scored = _bias_of(mask.dense_blocks(start, end), groups)
            yield slice(start, end), bias, scored
            continue
        counts: np.ndarray[Any, Any]
        if isinstance(mask, DilatedMask):
            counts = mask.counts(start, end)
        else:
            rows = mask.crop(start, end, 0, mask.seq_k)
            if not rows.area:
                continue
            counts = rows.to_dense()
        bias = torch.as_tensor(counts, device=device).double().log_()
        bias = bias if bias.ndim == 2 else bias.unflatten(0, (groups, -1))
        yield slice(start, end), bias, bias


def _bias_of(visible_BHST: torch.Tensor, groups: int) -> torch.Tensor:
    """``[B, G, R, S, T]``: 0 where a pair is visible, else -inf."""
    bias: torch.Tensor = visible_BHST.double().log_().unflatten(1, (groups, -1))
    return bias


def _heads_first(x_BTGD: torch.Tensor) -> torch.Tensor:
    return x_BTGD.double().transpose(1, 2)


def _grouped(x_BSHD: torch.Tensor, groups: int) -> torch.Tensor:
    b, s, h, d = x_BSHD.shape
    return x_BSHD.double().reshape(b, s, groups, h // groups, d).permute(0, 2, 3, 1, 4)
