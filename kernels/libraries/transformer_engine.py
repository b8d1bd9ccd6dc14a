"""Operator `te.cudnn`: cuDNN's fused attention as TransformerEngine calls it.

``sdpa.cudnn`` is the same library called by torch, for full and causal masks; this takes windows
and, on Hopper and later, documents too.  The calls are those below ``DotProductAttention``, which
never returns its lse; backward takes an external one.  What cuDNN makes of queries that see nothing
is not documented, so masks with any are refused.

Written against transformer_engine/pytorch/cpp_extensions/fused_attn.py of TransformerEngine 2.19.0
(b4475763); never run.

Legend: B batch, S query length, H query heads, D head dim; N = B * S tokens end to end.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries import adapter
from cpbench.kernels.libraries.adapter import Adapter, Limits, Packed, flat, packed, unflat
from cpbench.masks.convert_library import to_varlen

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

OPERATORS = (
    OperatorInfo(
        name="te.cudnn",
        summary="cuDNN's fused attention in TransformerEngine: full, causal, windows, documents",
        source="https://github.com/NVIDIA/TransformerEngine",
        load="cpbench.kernels.libraries.transformer_engine:TransformerEngine",
        dtypes=("bfloat16", "float16"),
        devices=("cuda",),
        deterministic=False,
        requires=("torch", "transformer_engine"),
        install="pip install --no-build-isolation transformer_engine[pytorch]",
        unproven="TransformerEngine 2.19.0",
    ),
)
HOPPER = (9, 0)
WIDE = 128  # head_dim from which on only Hopper trains


class TransformerEngine(Adapter):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "te.cudnn"
    limits = Limits(least=(8, 0), multiple=8, head_dim=256)

    def device_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        device = adapter.capability()
        if problem.head_dim > WIDE and device != HOPPER:
            return f"needs head_dim up to {WIDE} except on Hopper, not {problem.head_dim}"
        if (device is None or device < HOPPER) and to_varlen(mask).documents > 1:
            return "needs compute capability 9.0 or later for documents"
        return None

    def refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        found = to_varlen(mask)
        if found.surplus > 0 and (found.left >= 0 or found.right >= 0 or found.documents > 1):
            return (
                "needs at least as many keys as queries in every document that is causal or has a "
                "window"
            )
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Packed:
        return packed(mask, problem, device)

    def _forward(self, qkv: QKV, plan: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = qkv
        api = _api()
        B, S = q.shape[:2]
        several = plan.documents > 1
        given = [flat(x) if several else x.contiguous() for x in (q, k, v)]
        out, aux = api.fused_attn_fwd(
            True, plan.max_q, plan.max_k, plan.cu_q, plan.cu_k, *given,
            **_shared(plan, api, q.dtype),
        )[:2]  # fmt: skip
        stats = aux[0]
        if not several:
            return out, stats.reshape(B, -1, S)
        if stats.ndim != 3:
            raise RuntimeError(
                f"{self.name}: the lse of documents came as {list(stats.shape)}; cuDNN 9.6 or "
                "later returns it by token, which is what this adapter reads"
            )
        return unflat(out, B), stats[..., 0].unflatten(0, (B, S)).transpose(1, 2)

    def _backward(self, x: BackwardInputs, plan: Packed) -> Gradients:
        import torch

        dout, q, k, v, out, lse = x
        api = _api()
        several = plan.documents > 1
        given = [flat(x) if several else x.contiguous() for x in (q, k, v, out, dout)]
        stats = flat(lse.transpose(1, 2)) if several else lse
        unused = torch.zeros(2, dtype=torch.int64, device=q.device)  # without dropout
        shared = _shared(plan, api, q.dtype)
        grads = api.fused_attn_bwd(
            plan.max_q, plan.max_k, plan.cu_q, plan.cu_k, *given,
            aux_ctx_tensors=[stats.unsqueeze(-1).contiguous(), unused],
            do_format=shared["o_format"], dqkv_layout=shared["qkv_layout"], deterministic=False,
            **shared,
        )[:3]  # fmt: skip
        dq, dk, dv = (unflat(x, len(q)) if several else x for x in grads)
        return dq, dk, dv


def _api() -> Any:
    return importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")


def _shared(plan: Packed, api: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of both passes.  Every default is another one than is meant here."""
    form = "thd" if plan.documents > 1 else "bshd"
    left, right = plan.left, plan.right
    if min(left, right) < 0 <= max(left, right) and not plan.causal:
        # A window has both bounds, or none: one that cuts nothing.
        left, right = (plan.max_k, right) if left < 0 else (left, plan.max_q)
    masked = ["padding"] if plan.documents > 1 else []
    masked += ["causal_bottom_right"] if plan.causal else []
    return {
        "fake_dtype": dtype,
        "fused_attention_backend": api.FusedAttnBackend["F16_arbitrary_seqlen"],
        "attn_scale": plan.scale,
        "dropout": 0.0,
        "qkv_layout": f"{form}_{form}_{form}",
        "o_format": form,
        "attn_bias_type": "no_bias",
        "attn_mask_type": "_".join(masked) or "no_mask",
        "window_size": (left, right),
        "bottom_right_diagonal": True,
    }
