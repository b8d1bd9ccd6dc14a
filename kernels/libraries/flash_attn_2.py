"""Operator `flash_attn.2`: FlashAttention-2 of the package flash-attn.

Full, causal and windowed masks go through its calls of fixed length, documents through those of
variable length, both below autograd: forward returns the lse, backward takes an external one.
Its lse of queries that see nothing is inf; ``cpbench.kernels.libraries.adapter`` makes it -inf.

Written against flash_attn/flash_attn_interface.py and csrc/flash_attn/flash_api.cpp of
flash-attn 2.8.3.post1 (a8aa52b1); never run.

Legend: B batch, S query length, H query heads, D head dim; N = B * S tokens end to end.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries.adapter import (
    Limits,
    Packed,
    PackedAdapter,
)
from cpbench.masks.convert_library import UNBOUNDED, to_varlen

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

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
        install="pip install flash-attn --no-build-isolation",
        unproven="flash-attn 2.8.3.post1",
    ),
)


class FlashAttn2(PackedAdapter):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "flash_attn.2"
    limits = Limits(least=(8, 0), multiple=8, head_dim=256)

    def refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        varlen = to_varlen(mask)
        # It takes a bound of as many tokens as there are keys for none, and none beside a bound
        # behind for that many: wrong where documents have more queries than keys.
        lost = varlen.right >= varlen.max_k
        invented = varlen.right == UNBOUNDED and 0 <= varlen.left < varlen.max_k < varlen.max_q - 1
        if lost or invented:
            return (
                f"mistakes how far ahead this window reaches: it has {varlen.max_q} queries and "
                f"only {varlen.max_k} keys"
            )
        return None

    def call_forward(self, qkv: QKV, plan: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        api = importlib.import_module("flash_attn.flash_attn_interface")
        if plan.documents == 1:
            result = api._flash_attn_forward(*qkv, **_shared(plan), return_softmax=False)
        else:
            result = api._flash_attn_varlen_forward(*qkv, **_lengths(plan), **_shared(plan))
        out, lse, _, _ = result
        return out, lse

    def call_backward(self, x: BackwardInputs, gradients: list[torch.Tensor], plan: Packed) -> None:
        api = importlib.import_module("flash_attn.flash_attn_interface")
        shared = {**_shared(plan), "deterministic": False}
        if plan.documents == 1:
            api._flash_attn_backward(*x, *gradients, **shared)
        else:
            api._flash_attn_varlen_backward(*x, *gradients, **_lengths(plan), **shared)


def _lengths(plan: Packed) -> dict[str, Any]:
    return {
        "cu_seqlens_q": plan.cu_q,
        "cu_seqlens_k": plan.cu_k,
        "max_seqlen_q": plan.max_q,
        "max_seqlen_k": plan.max_k,
    }


def _shared(plan: Packed) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": plan.scale,
        "causal": plan.causal,
        "window_size_left": plan.left,
        "window_size_right": plan.right,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
