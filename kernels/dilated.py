"""Operator `dilated`: LongNet's dilated attention by gathering, on CPUs.

The tokens that a branch selects in each segment are gathered into a batch of short dense sequences,
which torch's fused CPU kernel computes.  Branches are merged by log-sum-exp, so a pair that is
visible in several branches counts several times.  Source: LongNet, arXiv 2307.02486.

Legend: B batch, S tokens, H query heads, D head dim; h heads with the same offset, g segments of m
selected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.parallel.partial_results.merge import merge

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.core.problem import Problem

OPERATORS = (
    OperatorInfo(
        name="dilated",
        summary="LongNet's dilated attention: dense flash attention on gathered segments, merged",
        source="LongNet, arXiv 2307.02486",
        load="cpbench.kernels.dilated:Dilated",
        masks=("dilated",),
        devices=("cpu",),
        lse_error=2e-4,  # as ``sdpa.cpu_flash``, the kernel that it calls
    ),
)


class SegmentBatch(NamedTuple):
    """Segments of equal length of a branch, for the heads with one offset."""

    tokens: torch.Tensor  # [g, m]
    heads: torch.Tensor  # [h] query heads
    heads_kv: torch.Tensor  # [h] key/value heads


@dataclass(frozen=True, eq=False)
class Plan:
    """The segments to gather, and the arguments of the fused kernel."""

    batches: tuple[SegmentBatch, ...]
    causal: bool
    scale: float


class Dilated:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    def unsupported(self, problem: Problem, mask: DilatedMask, device: str) -> str | None:
        return None

    def prepare(self, mask: DilatedMask, problem: Problem, device: str) -> Plan:
        import torch

        batches = []
        for branch, (_, dilation) in enumerate(mask.branches):
            for offset in range(min(dilation, mask.heads)):
                heads = torch.arange(offset, mask.heads, dilation, device=device)
                by_length: dict[int, list[np.typing.NDArray[np.int64]]] = {}
                for tokens in mask.segment_tokens(branch, offset):
                    by_length.setdefault(len(tokens), []).append(tokens)
                for segments in by_length.values():
                    table = torch.as_tensor(np.stack(segments), device=device)
                    batches.append(SegmentBatch(table, heads, heads // problem.group))
        return Plan(tuple(batches), mask.causal, problem.softmax_scale)

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        q, k, v = qkv
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        B, S, H, D = q.shape
        out_BHSD = torch.zeros((B, H, S, D), dtype=torch.float32)
        lse_BHS = torch.full((B, H, S), -torch.inf)
        for batch in plan.batches:
            inputs = _gather(q, batch), _gather(k, batch, True), _gather(v, batch, True)
            o, lse = flash(*inputs, 0.0, plan.causal, scale=plan.scale)
            index = _index(batch)
            # [B, h, g, m]: segments are merged as one sequence of g * m tokens.
            shape = (B, len(batch.heads), *batch.tokens.shape)
            old, old_lse = out_BHSD[index], lse_BHS[index]
            merged, merged_lse = merge(
                *(x.flatten(2, 3).transpose(1, 2) if x.ndim == 5 else x.flatten(2, 3) for x in (
                    old, old_lse, _ungather(o.float(), shape), _ungather(lse, shape)
                ))
            )  # fmt: skip
            out_BHSD[index] = merged.transpose(1, 2).unflatten(2, shape[2:])
            lse_BHS[index] = merged_lse.unflatten(2, shape[2:])
        return out_BHSD.transpose(1, 2).to(q.dtype), lse_BHS

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        import torch

        dout, q, k, v, out, lse = x
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = [torch.zeros(x.transpose(1, 2).shape) for x in (q, k, v)]
        for batch in plan.batches:
            shape = (q.shape[0], len(batch.heads), *batch.tokens.shape)
            batch_lse = lse[_index(batch)].permute(0, 2, 1, 3).flatten(0, 1).contiguous()
            batch_grads = flash(
                _gather(dout, batch), _gather(q, batch), _gather(k, batch, True),
                _gather(v, batch, True), _gather(out, batch), batch_lse, 0.0, plan.causal,
                scale=plan.scale,
            )  # fmt: skip
            for total, grad, is_kv in zip(grads, batch_grads, (False, True, True), strict=True):
                _scatter_add(total, batch, _ungather(grad.float(), shape), is_kv)
        dq, dk, dv = (
            grad.transpose(1, 2).to(tensor.dtype)
            for grad, tensor in zip(grads, (q, k, v), strict=True)
        )
        return dq, dk, dv


def _index(batch: SegmentBatch, is_kv: bool = False) -> Any:
    """The index of a batch into ``[B, H, S, …]`` that gives ``[B, h, g, m, …]``."""
    heads = batch.heads_kv if is_kv else batch.heads
    return slice(None), heads[:, None, None], batch.tokens[None]


def _gather(x_BSHD: torch.Tensor, batch: SegmentBatch, is_kv: bool = False) -> torch.Tensor:
    """Gather the tokens of a batch, ``[B * g, h, m, D]``."""
    x: torch.Tensor = x_BSHD.transpose(1, 2)[_index(batch, is_kv)]
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _ungather(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``[B * g, h, m, …]`` as ``[B, h, g, m, …]``."""
    unflattened: torch.Tensor = x.unflatten(0, (shape[0], shape[2]))
    return unflattened.transpose(1, 2)


def _scatter_add(
    total_BHSD: torch.Tensor, batch: SegmentBatch, x_BhgmD: torch.Tensor, is_kv: bool
) -> None:
    """Add to the tokens of a batch; query heads of a group may add to one key/value head."""
    heads = batch.heads_kv if is_kv else batch.heads
    S = total_BHSD.shape[2]
    index = (heads[:, None, None] * S + batch.tokens[None]).flatten()
    total_BHSD.view(len(total_BHSD), -1, total_BHSD.shape[3]).index_add_(
        1, index, x_BhgmD.flatten(1, 3)
    )
