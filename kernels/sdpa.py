"""Operators `sdpa.*`: the back ends of torch's scaled_dot_product_attention, one operator each.

Each calls the aten op that returns the log-sum-exp, and its explicit backward, which takes an
external out and lse.  Masks that a back end has no native form for become a dense additive bias,
refused above a size, if it takes one; otherwise they are refused.

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim (values
may have another).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV, BackwardInputs, nothing_visible, zero_gradients
from cpbench.core.problem import DTYPE_BYTES, Problem
from cpbench.core.registry import ANY_MASK, OperatorInfo
from cpbench.kernels.autograd_op import GraphStore
from cpbench.masks.head_masks import SlicedMask, distinct_masks

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse

DENSE_LIMIT_BYTES = 4 << 30
_NATIVE_MASKS = ("empty", "full", "causal")
_ALL_MASKS = (*ANY_MASK, "heads")
_HALF_DTYPES = ("bfloat16", "float16")


def _info(name: str, summary: str, **fields: Any) -> OperatorInfo:
    module = "sdpa_cuda" if fields.get("devices") == ("cuda",) else "sdpa"
    load = f"cpbench.kernels.{module}:{''.join(word.title() for word in name.split('_'))}"
    source = "torch.nn.functional.scaled_dot_product_attention"
    return OperatorInfo(name=f"sdpa.{name}", summary=summary, source=source, load=load, **fields)


OPERATORS = (
    _info(
        "math",
        "torch's unfused formula with a dense mask; returns no lse",
        masks=_ALL_MASKS,
        value_dims=True,
        external_lse=False,
        mergeable=False,
    ),
    _info(
        "flash",
        "FlashAttention-2 in torch",
        masks=_NATIVE_MASKS,
        devices=("cuda",),
        dtypes=_HALF_DTYPES,
        deterministic=False,
    ),
    _info(
        "efficient",
        "memory-efficient attention in torch; masks that are not native as a dense bias",
        masks=_ALL_MASKS,
        value_dims=True,
        devices=("cuda",),
        deterministic=False,
    ),
    _info(
        "cudnn",
        "cuDNN's fused attention in torch",
        max_head_dim=128,  # what is taken beyond depends on versions of cuDNN and its frontend
        masks=_NATIVE_MASKS,
        devices=("cuda",),
        dtypes=_HALF_DTYPES,
        deterministic=False,
    ),
    _info(
        "cpu_flash",
        "torch's flash attention for CPUs; masks that are not native as a dense bias",
        masks=_ALL_MASKS,
        devices=("cpu",),
        lse_error=2e-4,  # in 16 bits; up to 7e-5 measured
    ),
)


@dataclass(frozen=True)
class Plan:
    """Arguments of a back end.

    Attributes:
        scale: factor of the scores.
        empty: whether the mask is empty; then no call is made.
        causal: whether to set the native causal flag.
        bias_ST: additive mask, 0 or -inf, in the problem's dtype; ``[1, H, S, T]`` if it differs
            between heads; None if not needed.
        empty_rows: ``[S]`` or ``[H, S]`` booleans, queries that see nothing; None if there are
            none.
        keep_graph: whether a backward pass follows (for the back end that uses autograd).
    """

    scale: float
    empty: bool
    causal: bool
    bias_ST: torch.Tensor | None
    empty_rows: torch.Tensor | None
    keep_graph: bool


class Backend:
    """Base class of back ends: refuses masks, or converts them to arguments."""

    def unsupported(self, problem: Problem, mask: SlicedMask, device: str) -> str | None:
        if mask.kind in ("bands", "heads"):
            elements = len(distinct_masks(mask)) * mask.seq_q * mask.seq_k
            nbytes = elements * DTYPE_BYTES[problem.dtype]
            if nbytes > DENSE_LIMIT_BYTES:
                return (
                    f"a dense mask of {nbytes / 2**30:.1f} GiB would be needed, "
                    f"more than the {DENSE_LIMIT_BYTES >> 30} GiB allowed"
                )
        return None

    def prepare(self, mask: SlicedMask, problem: Problem, device: str) -> Plan:
        import torch

        bias, empty_rows = None, None
        if mask.kind in ("bands", "heads"):
            dtype = getattr(torch, problem.dtype)
            hidden = ~torch.as_tensor(mask.to_dense(), device=device)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
            bias.masked_fill_(hidden, -torch.inf)
            bias = bias if bias.ndim == 2 else bias.unsqueeze(0)  # the same for every batch
            rows = mask.empty_rows()
            empty_rows = torch.as_tensor(rows, device=device) if rows.any() else None
        return Plan(
            scale=problem.softmax_scale,
            empty=mask.kind == "empty",
            causal=mask.kind == "causal",
            bias_ST=bias,
            empty_rows=empty_rows,
            keep_graph=problem.backward,
        )


class Fused(Backend, ABC):
    """A back end with one aten op per pass on ``[B, H, S, D]`` views; handles axes, empty masks and
    rows that see nothing."""

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        if plan.empty:
            return nothing_visible(qkv.q, qkv.v.shape[3])
        out, lse = self._forward(QKV(*(tensor.transpose(1, 2) for tensor in qkv)), plan)
        if plan.empty_rows is not None:
            # torch's back ends disagree on rows that see nothing (lse 0, NaN outputs).
            lse.masked_fill_(plan.empty_rows, -torch.inf)
            out.masked_fill_(plan.empty_rows.unsqueeze(-1), 0.0)
        return out.transpose(1, 2), lse

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        import torch

        if plan.empty:
            return zero_gradients(x.qkv)
        # exp(score - lse) must be 0, not NaN, on rows that see nothing.
        lse = x.lse.masked_fill(x.lse == -torch.inf, torch.inf)
        dout, q, k, v, out = (tensor.transpose(1, 2) for tensor in x[:-1])
        gradients = self._backward(BackwardInputs(dout, q, k, v, out, lse), plan)
        dq, dk, dv = (grad.transpose(1, 2) for grad in gradients)
        return dq, dk, dv

    @abstractmethod
    def _forward(self, qkv: QKV, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out ``[B, H, S, D]`` and lse ``[B, H, S]``; inputs are ``[B, H, S, D]``."""

    @abstractmethod
    def _backward(self, x: BackwardInputs, plan: Plan) -> tuple[torch.Tensor, ...]:
        """Return dq, dk, dv; all tensors are ``[B, H, S, D]``."""


class CpuFlash(Fused):
    """torch's flash attention for CPUs.  Inputs are copied to contiguous ``[B, H, S, D]`` first:
    strided inputs cost a tenth of the speed, a third in the bfloat16 backward pass."""

    def _forward(self, qkv: QKV, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        q, k, v = (x.contiguous() for x in qkv)
        out, lse = op(q, k, v, 0.0, plan.causal, attn_mask=plan.bias_ST, scale=plan.scale)
        return out, lse.contiguous()

    def _backward(self, x: BackwardInputs, plan: Plan) -> tuple[torch.Tensor, ...]:
        import torch

        dout, q, k, v, out, lse = (y.contiguous() for y in x)
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads: tuple[torch.Tensor, ...] = op(
            dout, q, k, v, out, lse, 0.0, plan.causal, attn_mask=plan.bias_ST, scale=plan.scale
        )
        return grads


class Math(Backend):
    """torch's unfused formula; it is differentiated by autograd, and its op returns no lse."""

    def __init__(self) -> None:
        self._graphs = GraphStore("sdpa.math")
        self.states = self._graphs.states

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        if plan.empty:
            return self.differentiable_forward(qkv, plan)
        attend = functools.partial(self.differentiable_forward, plan=plan)
        return self._graphs.forward(attend, qkv, plan.keep_graph)

    def differentiable_forward(self, qkv: QKV, plan: Plan) -> OutLse:
        """The forward pass, for autograd to record."""
        import torch

        if plan.empty:
            return nothing_visible(qkv.q, qkv.v.shape[3])[0], None
        q, k, v = (x.transpose(1, 2) for x in qkv)
        op = torch.ops.aten._scaled_dot_product_attention_math
        gqa = q.shape[1] != k.shape[1]
        out, _ = op(q, k, v, plan.bias_ST, 0.0, plan.causal, scale=plan.scale, enable_gqa=gqa)
        return out.transpose(1, 2), None

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        if plan.empty:
            return zero_gradients(x.qkv)
        return self._graphs.backward(x.dout, x.out)
