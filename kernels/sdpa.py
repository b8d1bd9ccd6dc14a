"""torch's scaled_dot_product_attention, one operator per back end, chosen explicitly.

Each calls the aten op that returns the log-sum-exp and its explicit backward, which takes an
external out and lse.  Masks that the back end cannot express natively become a dense additive bias
where it takes one (refused above a size), and a typed refusal elsewhere.

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV, BackwardInputs, nothing_visible, zero_gradients
from cpbench.core.problem import DTYPE_BYTES, Problem
from cpbench.core.registry import ANY_MASK, OperatorInfo
from cpbench.kernels.autograd_op import GraphKeeper
from cpbench.masks.head_masks import SlicedMask, distinct_masks

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse

DENSE_LIMIT_BYTES = 4 << 30
_NATIVE = ("empty", "full", "causal")
_ANY = (*ANY_MASK, "heads")
_HALF = ("bfloat16", "float16")


def _info(name: str, summary: str, **declared: Any) -> OperatorInfo:
    home = "sdpa_cuda" if declared.get("devices") == ("cuda",) else "sdpa"
    load = f"cpbench.kernels.{home}:{''.join(part.title() for part in name.split('_'))}"
    source = "torch.nn.functional.scaled_dot_product_attention"
    return OperatorInfo(name=f"sdpa.{name}", summary=summary, source=source, load=load, **declared)


OPERATORS = (
    _info(
        "math",
        "torch's unfused formula with a dense mask; it returns no lse",
        masks=_ANY,
        external_lse=False,
        mergeable=False,
    ),
    _info(
        "flash",
        "FlashAttention-2 in torch",
        masks=_NATIVE,
        devices=("cuda",),
        dtypes=_HALF,
        deterministic=False,
    ),
    _info(
        "efficient",
        "memory-efficient attention in torch; other masks as a dense bias",
        masks=_ANY,
        devices=("cuda",),
        deterministic=False,
    ),
    _info(
        "cudnn",
        "cuDNN's fused attention in torch",
        masks=_NATIVE,
        devices=("cuda",),
        dtypes=_HALF,
        deterministic=False,
    ),
    _info(
        "cpu_flash",
        "torch's flash attention for CPUs; other masks as a dense bias",
        masks=_ANY,
        devices=("cpu",),
    ),
)


@dataclass(frozen=True)
class Plan:
    """What a back end is called with.

    Attributes:
        scale: of the scores.
        empty: nothing is visible at all; no call is made.
        causal: the native causal flag serves.
        bias_ST: additive mask, 0 or -inf, in the problem's dtype, ``[1, H, S, T]`` where it
            differs from head to head; None where none is needed.
        blind: ``[S]`` or ``[H, S]``, which queries see nothing; None where all see something.
        keep_graph: a backward pass will follow (for the back end that needs autograd).
    """

    scale: float
    empty: bool
    causal: bool
    bias_ST: torch.Tensor | None
    blind: torch.Tensor | None
    keep_graph: bool


class Backend:
    """What every back end needs: the mask as it takes it, or the refusal of one."""

    def unsupported(self, problem: Problem, mask: SlicedMask, device: str) -> str | None:
        if mask.kind in ("bands", "heads"):
            cells = len(distinct_masks(mask)) * mask.seq_q * mask.seq_k
            needed = cells * DTYPE_BYTES[problem.dtype]
            if needed > DENSE_LIMIT_BYTES:
                return (
                    f"a dense mask of {needed / 2**30:.1f} GiB would be needed, "
                    f"more than the {DENSE_LIMIT_BYTES >> 30} GiB allowed"
                )
        return None

    def prepare(self, mask: SlicedMask, problem: Problem, device: str) -> Plan:
        import torch

        bias, blind = None, None
        if mask.kind in ("bands", "heads"):
            dtype = getattr(torch, problem.dtype)
            hidden = ~torch.as_tensor(mask.to_dense(), device=device)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
            bias.masked_fill_(hidden, -torch.inf)
            bias = bias if bias.ndim == 2 else bias.unsqueeze(0)  # of every batch
            rows = mask.empty_rows()
            blind = torch.as_tensor(rows, device=device) if rows.any() else None
        return Plan(
            scale=problem.softmax_scale,
            empty=mask.kind == "empty",
            causal=mask.kind == "causal",
            bias_ST=bias,
            blind=blind,
            keep_graph=problem.backward,
        )


class Fused(Backend, ABC):
    """Axes, empty masks and blind rows, around one aten op on ``[B, H, S, D]`` views."""

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        if plan.empty:
            return nothing_visible(qkv.q)
        out, lse = self._forward(QKV(*(of_tokens.transpose(1, 2) for of_tokens in qkv)), plan)
        if plan.blind is not None:
            # torch's back ends disagree on rows that see nothing (lse 0, NaN outputs).
            lse.masked_fill_(plan.blind, -torch.inf)
            out.masked_fill_(plan.blind.unsqueeze(-1), 0.0)
        return out.transpose(1, 2), lse

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        import torch

        if plan.empty:
            return zero_gradients(x.qkv)
        # exp(score - lse) must be 0, not NaN, on rows that see nothing.
        lse = x.lse.masked_fill(x.lse == -torch.inf, torch.inf)
        dout, q, k, v, out = (of_tokens.transpose(1, 2) for of_tokens in x[:-1])
        gradients = self._backward(BackwardInputs(dout, q, k, v, out, lse), plan)
        dq, dk, dv = (grad.transpose(1, 2) for grad in gradients)
        return dq, dk, dv

    @abstractmethod
    def _forward(self, qkv: QKV, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """out ``[B, H, S, D]`` and lse ``[B, H, S]`` from ``[B, H, S, D]``."""

    @abstractmethod
    def _backward(self, x: BackwardInputs, plan: Plan) -> tuple[torch.Tensor, ...]:
        """dq, dk, dv in the same axes."""


class CpuFlash(Fused):
    """Copied to contiguous ``[B, H, S, D]`` first: over strides the kernel loses a tenth of its
    speed, in bfloat16 backward a third."""

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
    """The unfused path differentiates through autograd, and its op returns no lse."""

    def __init__(self) -> None:
        self._keeper = GraphKeeper()

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        if plan.empty:
            return torch.zeros_like(qkv.q), None
        op = torch.ops.aten._scaled_dot_product_attention_math

        def run(qkv: QKV) -> OutLse:
            q, k, v = (x.transpose(1, 2) for x in qkv)
            gqa = q.shape[1] != k.shape[1]
            out, _ = op(q, k, v, plan.bias_ST, 0.0, plan.causal, scale=plan.scale, enable_gqa=gqa)
            return out.transpose(1, 2), None

        return self._keeper.forward(run, qkv, plan.keep_graph)

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:

        if plan.empty:
            return zero_gradients(x.qkv)
        return self._keeper.backward(x.dout, x.out)
