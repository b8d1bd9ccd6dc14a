"""Operator `te.cudnn`: cuDNN's fused attention, called by TransformerEngine.

``sdpa.cudnn`` is the same library called by torch, for full and causal masks; this operator also
takes windows and, on Hopper and later, documents.  It calls the functions below
``DotProductAttention``, since that does not return its lse; backward takes an external one.  The
results of cuDNN for queries that see nothing are not documented, so masks with such queries are
refused.

Written against transformer_engine/pytorch/cpp_extensions/fused_attn.py of TransformerEngine 2.19.0
(b4475763); never run.

Legend: B batch, S query length, H query heads, D head dim; N = B * S tokens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries import adapter
from cpbench.kernels.libraries.adapter import (
    Adapter,
    Limits,
    PackedPlan,
    flatten_batch,
    packed_plan,
    unflatten_batch,
)
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
MAX_BACKWARD_DIM = 128  # largest head_dim with a backward pass, except on Hopper


class TransformerEngine(Adapter):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "te.cudnn"
    limits = Limits(min_capability=(8, 0), head_dim_multiple=8, max_head_dim=256)

    def device_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        capability = adapter.compute_capability()
        if problem.head_dim > MAX_BACKWARD_DIM and capability != HOPPER:
            return (
                f"needs head_dim up to {MAX_BACKWARD_DIM} except on Hopper, not {problem.head_dim}"
            )
        if (capability is None or capability < HOPPER) and to_varlen(mask).documents > 1:
            return "needs compute capability 9.0 or later for documents"
        return None

    def format_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        varlen = to_varlen(mask)
        if varlen.surplus > 0 and (varlen.left >= 0 or varlen.right >= 0 or varlen.documents > 1):
            return (
                "needs at least as many keys as queries in every document that is causal or has a "
                "window"
            )
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> PackedPlan:
        return packed_plan(mask, problem, device)

    def _forward(self, qkv: QKV, plan: PackedPlan) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = qkv
        api = _api()
        B, S = q.shape[:2]
        packed = plan.documents > 1
        inputs = [flatten_batch(x) if packed else x.contiguous() for x in (q, k, v)]
        out, aux = api.fused_attn_fwd(
            True, plan.max_q, plan.max_k, plan.cu_q, plan.cu_k, *inputs,
            **_shared_arguments(plan, api, q.dtype),
        )[:2]  # fmt: skip
        stats = aux[0]
        if not packed:
            return out, stats.reshape(B, -1, S)
        if stats.ndim != 3:
            raise RuntimeError(
                f"{self.name}: the lse of documents has the shape {list(stats.shape)}; this "
                "adapter needs one value per token, which cuDNN 9.6 or later returns"
            )
        return unflatten_batch(out, B), stats[..., 0].unflatten(0, (B, S)).transpose(1, 2)

    def _backward(self, x: BackwardInputs, plan: PackedPlan) -> Gradients:
        import torch

        dout, q, k, v, out, lse = x
        api = _api()
        packed = plan.documents > 1
        inputs = [flatten_batch(x) if packed else x.contiguous() for x in (q, k, v, out, dout)]
        stats = flatten_batch(lse.transpose(1, 2)) if packed else lse
        seed = torch.zeros(2, dtype=torch.int64, device=q.device)  # not read without dropout
        shared = _shared_arguments(plan, api, q.dtype)
        grads = api.fused_attn_bwd(
            plan.max_q, plan.max_k, plan.cu_q, plan.cu_k, *inputs,
            aux_ctx_tensors=[stats.unsqueeze(-1).contiguous(), seed],
            do_format=shared["o_format"], dqkv_layout=shared["qkv_layout"], deterministic=False,
            **shared,
        )[:3]  # fmt: skip
        dq, dk, dv = (unflatten_batch(grad, len(q)) if packed else grad for grad in grads)
        return dq, dk, dv


def _api() -> Any:
    return importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")


def _shared_arguments(plan: PackedPlan, api: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of both passes; none of the library's defaults fits."""
    layout = "thd" if plan.documents > 1 else "bshd"
    left, right = plan.left, plan.right
    if min(left, right) < 0 <= max(left, right) and not plan.causal:
        # A window has both bounds or none: make the missing one larger than any document.
        left, right = (plan.max_k, right) if left < 0 else (left, plan.max_q)
    mask_types = ["padding"] if plan.documents > 1 else []
    mask_types += ["causal_bottom_right"] if plan.causal else []
    return {
        "fake_dtype": dtype,
        "fused_attention_backend": api.FusedAttnBackend["F16_arbitrary_seqlen"],
        "attn_scale": plan.scale,
        "dropout": 0.0,
        "qkv_layout": f"{layout}_{layout}_{layout}",
        "o_format": layout,
        "attn_bias_type": "no_bias",
        "attn_mask_type": "_".join(mask_types) or "no_mask",
        "window_size": (left, right),
        "bottom_right_diagonal": True,
    }
