"""Operator `flash_attn.2`: FlashAttention-2 of the package flash-attn.

Full, causal and windowed masks use its fixed-length calls, documents its variable-length calls,
both below autograd: forward returns the lse, backward takes an external one.  The library's lse of
queries that see nothing is inf; ``cpbench.kernels.libraries.adapter`` replaces it by -inf.

Written against flash_attn/flash_attn_interface.py and csrc/flash_attn/flash_api.cpp of
flash-attn 2.8.3.post1 (a8aa52b1); never run.

Legend: B batch, S query length, H query heads, D head dim; N = B * S tokens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cpbench.core.problem import DTYPE_BYTES
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries.adapter import (
    Limits,
    PackedAdapter,
    PackedPlan,
    empty_contiguous,
    misread_bound,
)

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask


def workspace(problem: Problem) -> int:
    """Bytes of a backward pass: dQ in float32; and where query heads share keys, dK and dV of every
    query head."""
    if problem.direction != "bwd":
        return 0
    per_query = 4 * problem.heads_q * problem.head_dim
    per_key = 2 * DTYPE_BYTES[problem.dtype] * problem.heads_q * problem.head_dim
    per_key *= problem.group > 1
    return problem.batch * (problem.seq_q * per_query + problem.seq_k * per_key)


OPERATORS = (
    OperatorInfo(
        name="flash_attn.2",
        summary="FlashAttention-2: full, causal, windows and documents",
        source="flash-attn, arXiv 2307.08691",
        load="cpbench.kernels.libraries.flash_attn_2:FlashAttn2",
        dtypes=("bfloat16", "float16"),
        devices=("cuda",),
        deterministic=False,
        requires=("torch", "flash_attn"),
        workspace=workspace,
        install="pip install flash-attn --no-build-isolation",
        unproven="flash-attn 2.8.3.post1",
    ),
)


class FlashAttn2(PackedAdapter):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "flash_attn.2"
    limits = Limits(min_capability=(8, 0), head_dim_multiple=8, max_head_dim=256)

    def format_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        return misread_bound(mask)

    def call_forward(self, qkv: QKV, plan: PackedPlan) -> tuple[torch.Tensor, torch.Tensor]:
        api = importlib.import_module("flash_attn.flash_attn_interface")
        if plan.documents == 1:
            result = api._flash_attn_forward(*qkv, **_shared_arguments(plan), return_softmax=False)
        else:
            result = api._flash_attn_varlen_forward(
                *qkv, **_length_arguments(plan), **_shared_arguments(plan)
            )
        out, lse, _, _ = result
        return out, lse

    def call_backward(self, x: BackwardInputs, plan: PackedPlan) -> Gradients:
        gradients = dq, dk, dv = empty_contiguous(*x.qkv)
        api = importlib.import_module("flash_attn.flash_attn_interface")
        shared = {**_shared_arguments(plan), "deterministic": False}
        if plan.documents == 1:
            api._flash_attn_backward(*x, *gradients, **shared)
        else:
            api._flash_attn_varlen_backward(*x, *gradients, **_length_arguments(plan), **shared)
        return dq, dk, dv


def _length_arguments(plan: PackedPlan) -> dict[str, Any]:
    """Arguments of both passes of variable-length calls."""
    return {
        "cu_seqlens_q": plan.cu_q,
        "cu_seqlens_k": plan.cu_k,
        "max_seqlen_q": plan.max_q,
        "max_seqlen_k": plan.max_k,
    }


def _shared_arguments(plan: PackedPlan) -> dict[str, Any]:
    """Arguments of all calls."""
    return {
        "dropout_p": 0.0,
        "softmax_scale": plan.scale,
        "causal": plan.causal,
        "window_size_left": plan.left,
        "window_size_right": plan.right,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
