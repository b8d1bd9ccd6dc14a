"""Operator `flashmask`: FlashMask V3 with torch tensors, for Hopper.

It takes masks that hide each key from at most two intervals of queries, as most masks do.  Forward
is the public function; backward is the operator below its autograd function, which takes an
external out and lse.  The library requires a copy of the intervals for every batch.

Written against flashmask/flash_mask/flashmask_attention_v3/interface_torch.py and
flash_api_torch.cpp of PaddlePaddle/flash-attention at 9985af53, 3.0.0b1; never run.

Legend: B batch, S query length, T key length, H query heads, D head dim.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries.adapter import Adapter, Limits, Plan, plan_fields
from cpbench.masks.convert_library import to_flashmask

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

OPERATORS = (
    OperatorInfo(
        name="flashmask",
        summary="FlashMask V3: masks that hide each key from at most two intervals of queries",
        source="FlashMask, arXiv 2410.01359",
        load="cpbench.kernels.libraries.flashmask:FlashMask",
        dtypes=("bfloat16",),
        devices=("cuda",),
        deterministic=False,
        requires=("torch", "flashmask", "interface_torch"),
        install="python setup_torch.py install in flashmask/flash_mask/flashmask_attention_v3 of "
        "github.com/PaddlePaddle/flash-attention",
        unproven="FlashMask 3.0.0b1, 9985af53",
    ),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns(Plan):
    """The intervals ``startend`` ``[B, 1, T, n]`` int32, and the causal flag."""

    startend: torch.Tensor
    causal: bool


class FlashMask(Adapter):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "flashmask"
    limits = Limits(
        min_capability=(9, 0), max_capability=(9, 0), head_dim_multiple=8, max_head_dim=256
    )

    def format_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        to_flashmask(mask)
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Columns:
        import torch

        columns = to_flashmask(mask)
        startend = torch.as_tensor(columns.startend, device=device)
        return Columns(
            **plan_fields(mask, problem, device),
            startend=startend.expand(problem.batch, -1, -1, -1).contiguous(),
            causal=columns.causal,
        )

    def _forward(self, qkv: QKV, plan: Columns) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = qkv
        out, lse = _api().flashmask_attention(
            q,
            k,
            v,
            plan.startend,
            causal=plan.causal,
            return_softmax_lse=True,
            softmax_scale=plan.scale,
        )
        return out, lse

    def _backward(self, x: BackwardInputs, plan: Columns) -> Gradients:
        dout, q, k, v, out, lse = x
        dq, dk, dv = _api().flashmask_cuda.bwd(
            dout=dout.contiguous(),
            q=q,
            k=k,
            v=v,
            out=out.contiguous(),
            softmax_lse=lse,
            startend_row_indices=plan.startend,
            softmax_scale=plan.scale,
            is_causal=plan.causal,
        )
        return dq, dk, dv


def _api() -> Any:
    return importlib.import_module("interface_torch")
