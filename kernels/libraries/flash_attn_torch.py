"""Operator `flash_attn.torch`: the FlashAttention-2 that comes with torch.

``sdpa.flash`` is the same kernel behind ``scaled_dot_product_attention``, for full and causal
masks; this operator also takes windows, and documents by its variable-length calls.  It needs no
other package than torch.

Written against the schema of ``aten._flash_attention_forward`` and its backward in torch 2.13,
checked by a test on meta tensors; not yet run on a GPU.

Legend: B batch, S query length, H query heads, D head dim; N = B * S tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries.adapter import (
    Limits,
    PackedAdapter,
    PackedPlan,
    misread_bound,
    missing_backward,
)

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

OPERATORS = (
    OperatorInfo(
        name="flash_attn.torch",
        summary="FlashAttention-2 in torch: full, causal, windows and documents",
        source="torch.ops.aten._flash_attention_forward, arXiv 2307.08691",
        load="cpbench.kernels.libraries.flash_attn_torch:FlashAttnTorch",
        dtypes=("bfloat16", "float16"),
        devices=("cuda",),
        deterministic=False,
        install="pip install torch",
        unproven="torch 2.13",
    ),
)


class FlashAttnTorch(PackedAdapter):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "flash_attn.torch"
    limits = Limits(min_capability=(8, 0), head_dim_multiple=8, max_head_dim=256)

    def device_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        return missing_backward(problem)

    def format_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        return misread_bound(mask)

    def call_forward(self, qkv: QKV, plan: PackedPlan) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *qkv, *_lengths(plan), 0.0, False, False, **_window(plan)
        )
        return out, lse

    def call_backward(self, x: BackwardInputs, plan: PackedPlan) -> Gradients:
        import torch

        seed = torch.empty(2, dtype=torch.uint64, device=x.q.device)  # not read without dropout
        unused = torch.empty((), dtype=torch.uint64, device=x.q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *x, *_lengths(plan), 0.0, False, seed, unused, **_window(plan)
        )
        return dq, dk, dv


def _lengths(plan: PackedPlan) -> tuple[Any, ...]:
    """Cumulative lengths, which only variable-length calls have, and the longest of each."""
    cu_seqlens = (plan.cu_q, plan.cu_k) if plan.documents > 1 else (None, None)
    return *cu_seqlens, plan.max_q, plan.max_k


def _window(plan: PackedPlan) -> dict[str, Any]:
    return {
        "scale": plan.scale, "window_size_left": plan.left, "window_size_right": plan.right,
    }  # fmt: skip
