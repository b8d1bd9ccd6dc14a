"""CUDA back ends of torch's scaled_dot_product_attention; see ``sdpa`` for their base classes.

Written against the schemas of torch 2.13, checked by a test on meta tensors; not yet run on a GPU.
Without dropout the random state that the backward ops take is not read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cpbench.core.operator import BackwardInputs
from cpbench.kernels.libraries.adapter import missing_backward
from cpbench.kernels.sdpa import Fused, Plan

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV
    from cpbench.core.problem import Problem
    from cpbench.masks.head_masks import SlicedMask


class Flash(Fused):
    """FlashAttention-2 in torch."""

    def unsupported(self, problem: Problem, mask: SlicedMask, device: str) -> str | None:
        reason = missing_backward(problem)
        return f"sdpa.flash {reason}" if reason else _multiple_of_8("sdpa.flash", problem)

    def _forward(self, qkv: QKV, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        q, k, v = qkv
        op = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = op(q, k, v, 0.0, plan.causal, False, scale=plan.scale)[:2]
        return out, lse

    def _backward(self, x: BackwardInputs, plan: Plan) -> tuple[torch.Tensor, ...]:
        import torch

        dout, q, k, v, out, lse = x
        op = torch.ops.aten._scaled_dot_product_flash_attention_backward
        no_seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        s, t = q.shape[2], k.shape[2]
        grads: tuple[torch.Tensor, ...] = op(
            dout,
            q,
            k,
            v,
            out,
            lse,
            None,
            None,
            s,
            t,
            0.0,
            plan.causal,
            no_seed,
            no_seed,
            scale=plan.scale,
        )
        return grads


class Cudnn(Fused):
    """cuDNN's fused attention in torch."""

    def unsupported(self, problem: Problem, mask: SlicedMask, device: str) -> str | None:
        if problem.seq_k == 1:
            return "sdpa.cudnn takes no single key"
        return _multiple_of_8("sdpa.cudnn", problem)

    def _forward(self, qkv: QKV, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        q, k, v = qkv
        op = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse = op(q, k, v, None, True, 0.0, plan.causal, False, scale=plan.scale)[:2]
        return out, lse.reshape(q.shape[:3])

    def _backward(self, x: BackwardInputs, plan: Plan) -> tuple[torch.Tensor, ...]:
        import torch

        dout, q, k, v, out, lse = x
        op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        no_seed = torch.empty((), dtype=torch.int64, device=q.device)
        s, t = q.shape[2], k.shape[2]
        grads: tuple[torch.Tensor, ...] = op(
            dout,
            q,
            k,
            v,
            out,
            lse.unsqueeze(-1),
            no_seed,
            no_seed,
            None,
            None,
            None,
            s,
            t,
            0.0,
            plan.causal,
            scale=plan.scale,
        )
        return grads


class Efficient(Fused):
    """Memory-efficient attention in torch.  It has no GQA and takes a bias padded to 16 columns;
    heads are repeated (and their gradients summed) inside the timed call, as a user would do."""

    def prepare(self, mask: SlicedMask, problem: Problem, device: str) -> Plan:
        import torch

        plan = super().prepare(mask, problem, device)
        if plan.bias_ST is None:
            return plan
        # The kernel takes rows that start at multiples of 16 elements.
        t = plan.bias_ST.shape[-1]
        padded = torch.nn.functional.pad(plan.bias_ST, (0, -t % 16))
        return replace(plan, bias_ST=padded[..., :t])

    def _forward(self, qkv: QKV, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        q, k, v = qkv
        op = torch.ops.aten._scaled_dot_product_efficient_attention
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        bias = _expand_bias(plan.bias_ST, q)
        out, lse = op(q, k, v, bias, True, 0.0, plan.causal, scale=plan.scale)[:2]
        return out, lse[:, :, : q.shape[2]].contiguous()

    def _backward(self, x: BackwardInputs, plan: Plan) -> tuple[torch.Tensor, ...]:
        import torch

        dout, q, k, v, out, lse = x
        op = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        heads_kv = k.shape[1]
        k, v = (x.repeat_interleave(q.shape[1] // heads_kv, 1) for x in (k, v))
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
        no_seed = torch.empty((), dtype=torch.int64, device=q.device)
        bias = _expand_bias(plan.bias_ST, q)
        grad_input_mask = [True, True, True, False]  # no gradient of the bias
        dq, dk, dv, _ = op(
            dout,
            q,
            k,
            v,
            bias,
            out,
            padded,
            no_seed,
            no_seed,
            0.0,
            grad_input_mask,
            plan.causal,
            scale=plan.scale,
        )
        dk, dv = (x.unflatten(1, (heads_kv, -1)).float().sum(2).to(x.dtype) for x in (dk, dv))
        return dq, dk, dv


def _expand_bias(bias_ST: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """Expand the bias to all batches and heads."""
    return None if bias_ST is None else bias_ST.expand(q.shape[0], q.shape[1], -1, -1)


def _multiple_of_8(name: str, problem: Problem) -> str | None:
    """Why the head dimension does not suit a kernel, or None."""
    if problem.head_dim % 8:
        return f"{name} needs head_dim a multiple of 8, not {problem.head_dim}"
    return None
