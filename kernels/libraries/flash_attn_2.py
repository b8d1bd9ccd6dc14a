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
    Adapter,
    Limits,
    Packed,
    buffers,
    flat,
    flat_lse,
    packed,
    unflat,
    unflat_lse,
)
from cpbench.masks.convert_library import UNBOUNDED, to_varlen

if TYPE_CHECKING:
    import torch

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


class FlashAttn2(Adapter):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "flash_attn.2"
    limits = Limits(least=(8, 0), multiple=8, head_dim=256)

    def refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        found = to_varlen(mask)
        # It takes a bound of as many tokens as there are keys for none, and none beside a bound
        # behind for that many: wrong where documents have more queries than keys.
        lost = found.right >= found.max_k
        invented = found.right == UNBOUNDED and 0 <= found.left < found.max_k < found.max_q - 1
        if lost or invented:
            return (
                f"mistakes how far ahead this window reaches: it has {found.max_q} queries and "
                f"only {found.max_k} keys"
            )
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Packed:
        return packed(mask, problem, device)

    def _forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Packed
    ) -> tuple[torch.Tensor, torch.Tensor]:
        api = importlib.import_module("flash_attn.flash_attn_interface")
        if plan.documents == 1:
            out, lse, _, _ = api._flash_attn_forward(q, k, v, **_shared(plan), return_softmax=False)
            return out, lse
        out, lse, _, _ = api._flash_attn_varlen_forward(
            flat(q), flat(k), flat(v), **_lengths(plan), **_shared(plan)
        )
        return unflat(out, len(q)), unflat_lse(lse, len(q))

    def _backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        plan: Packed,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        api = importlib.import_module("flash_attn.flash_attn_interface")
        shared = {**_shared(plan), "deterministic": False}
        dq, dk, dv = buffers(q, k, v)
        if plan.documents == 1:
            api._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, **shared)
            return dq, dk, dv
        given = (flat(x) for x in (dout, q, k, v, out))
        into = (x.flatten(0, 1) for x in (dq, dk, dv))  # views
        api._flash_attn_varlen_backward(*given, flat_lse(lse), *into, **_lengths(plan), **shared)
        return dq, dk, dv


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
