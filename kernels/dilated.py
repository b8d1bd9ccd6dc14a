"""Operator `dilated`: LongNet's dilated attention by gathering, on CPUs.

The tokens that a branch picks in each segment are gathered into a batch of short dense sequences,
which torch's fused CPU kernel computes; branches are merged by log-sum-exp, so a pair that several
see counts several times.  Source: LongNet, arXiv 2307.02486.

Legend: B batch, S tokens, H query heads, D head dim; h heads with the same offset, g segments of m
picked tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.parallel.bound_operator import merge

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.core.problem import Problem

OPERATORS = (
    OperatorInfo(
        name="dilated",
        summary="LongNet's dilated attention: gathers each branch, dense flash, merged",
        source="LongNet, arXiv 2307.02486",
        load="cpbench.kernels.dilated:Dilated",
        masks=("dilated",),
        devices=("cpu",),
    ),
)


class Piece(NamedTuple):
    """Segments of one length of a branch, for the heads of one offset."""

    tokens: torch.Tensor  # [g, m]
    heads: torch.Tensor  # [h] of queries
    heads_kv: torch.Tensor  # [h] of keys and values


@dataclass(frozen=True, eq=False)
class Plan:
    """What to gather."""

    pieces: tuple[Piece, ...]
    causal: bool
    scale: float


class Dilated:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    def unsupported(self, problem: Problem, mask: DilatedMask, device: str) -> str | None:
        return None

    def prepare(self, mask: DilatedMask, problem: Problem, device: str) -> Plan:
        import torch

        pieces = []
        for branch, (_, dilation) in enumerate(mask.branches):
            for offset in range(min(dilation, mask.heads)):
                heads = torch.arange(offset, mask.heads, dilation, device=device)
                by_length: dict[int, list[np.typing.NDArray[np.int64]]] = {}
                for tokens in mask.segment_tokens(branch, offset):
                    by_length.setdefault(len(tokens), []).append(tokens)
                for rows in by_length.values():
                    table = torch.as_tensor(np.stack(rows), device=device)
                    pieces.append(Piece(table, heads, heads // problem.group))
        return Plan(tuple(pieces), mask.causal, problem.softmax_scale)

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        q, k, v = qkv
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        B, S, H, D = q.shape
        out_BHSD = torch.zeros((B, H, S, D), dtype=torch.float32)
        lse_BHS = torch.full((B, H, S), -torch.inf)
        for piece in plan.pieces:
            given = _gather(q, piece), _gather(k, piece, True), _gather(v, piece, True)
            o, lse = flash(*given, 0.0, plan.causal, scale=plan.scale)
            at = _places(piece)
            # [B, h, g, m]: merged as one query head of so many tokens each.
            shape = (B, len(piece.heads), *piece.tokens.shape)
            old, old_lse = out_BHSD[at], lse_BHS[at]
            merged, both = merge(
                *(x.flatten(2, 3).transpose(1, 2) if x.ndim == 5 else x.flatten(2, 3) for x in (
                    old, old_lse, _ungather(o.float(), shape), _ungather(lse, shape)
                ))
            )  # fmt: skip
            out_BHSD[at] = merged.transpose(1, 2).unflatten(2, shape[2:])
            lse_BHS[at] = both.unflatten(2, shape[2:])
        return out_BHSD.transpose(1, 2).to(q.dtype), lse_BHS

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        import torch

        dout, q, k, v, out, lse = x
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = [torch.zeros(x.transpose(1, 2).shape) for x in (q, k, v)]
        for piece in plan.pieces:
            shape = (q.shape[0], len(piece.heads), *piece.tokens.shape)
            lse_here = lse[_places(piece)].permute(0, 2, 1, 3).flatten(0, 1).contiguous()
            found = flash(
                _gather(dout, piece), _gather(q, piece), _gather(k, piece, True),
                _gather(v, piece, True), _gather(out, piece), lse_here, 0.0, plan.causal,
                scale=plan.scale,
            )  # fmt: skip
            for into, grad, of_keys in zip(grads, found, (False, True, True), strict=True):
                _add(into, piece, _ungather(grad.float(), shape), of_keys)
        dq, dk, dv = (
            x.transpose(1, 2).to(like.dtype) for x, like in zip(grads, (q, k, v), strict=True)
        )
        return dq, dk, dv


def _places(piece: Piece, of_keys: bool = False) -> Any:
    """The index of a piece in ``[B, H, S, …]``: ``[B, h, g, m, …]``."""
    heads = piece.heads_kv if of_keys else piece.heads
    return slice(None), heads[:, None, None], piece.tokens[None]


def _gather(x_BSHD: torch.Tensor, piece: Piece, of_keys: bool = False) -> torch.Tensor:
    """``[B * g, h, m, D]``."""
    x: torch.Tensor = x_BSHD.transpose(1, 2)[_places(piece, of_keys)]
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _ungather(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``[B * g, h, m, …]`` as ``[B, h, g, m, …]``."""
    apart: torch.Tensor = x.unflatten(0, (shape[0], shape[2]))
    return apart.transpose(1, 2)


def _add(into_BHSD: torch.Tensor, piece: Piece, x_BhgmD: torch.Tensor, of_keys: bool) -> None:
    """Add to the places of a piece; query heads of a group may add to one key/value head."""
    heads = piece.heads_kv if of_keys else piece.heads
    S = into_BHSD.shape[2]
    flat = (heads[:, None, None] * S + piece.tokens[None]).flatten()
    into_BHSD.view(len(into_BHSD), -1, into_BHSD.shape[3]).index_add_(
        1, flat, x_BhgmD.flatten(1, 3)
    )
