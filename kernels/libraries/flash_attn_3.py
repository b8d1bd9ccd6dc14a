"""Operator `flash_attn.3`: FlashAttention-3, for Hopper.

One pair of functions below autograd serves fixed-length and variable-length calls.  There are two
versions of the pair: in the main branch of flash-attention they are custom operators, which hide
their signature, and take two bounds; up to the tag v2.8.3 they are Python functions without
defaults and take a window.  FlashAttention-4 has no adapter: its signature is not settled yet.

Written against hopper/flash_attn_interface.py and hopper/flash_api_stable.cpp of flash-attention at
0251105a (main; the package calls itself 3.0.0) and a8aa52b1 (v2.8.3.post1); never run.

Legend: B batch, S query length, H query heads, D head dim; N = B * S tokens.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries.adapter import (
    Limits,
    PackedAdapter,
    PackedPlan,
    empty_contiguous,
)
from cpbench.masks.convert_library import to_varlen

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask


def workspace(problem: Problem) -> int:
    """Bytes of a backward pass: dQ in float32, and dK and dV where query heads share them."""
    if problem.direction != "bwd":
        return 0
    per_query = problem.heads_q * problem.head_dim
    per_key = problem.heads_kv * (problem.head_dim + problem.value_dim) * (problem.group > 1)
    return 4 * problem.batch * (problem.seq_q * per_query + problem.seq_k * per_key)


OPERATORS = (
    OperatorInfo(
        name="flash_attn.3",
        summary="FlashAttention-3 for Hopper: full, causal, windows and documents",
        source="flash-attention, folder hopper; arXiv 2407.08608",
        load="cpbench.kernels.libraries.flash_attn_3:FlashAttn3",
        dtypes=("bfloat16", "float16"),
        devices=("cuda",),
        deterministic=False,
        requires=("torch", "flash_attn_interface"),
        workspace=workspace,
        install="python setup.py install in folder hopper of github.com/Dao-AILab/flash-attention",
        unproven="flash-attention main 0251105a",
    ),
)


class FlashAttn3(PackedAdapter):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "flash_attn.3"
    limits = Limits(
        min_capability=(9, 0), max_capability=(9, 0), head_dim_multiple=8, max_head_dim=256
    )

    def format_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        to_varlen(mask)
        return None

    def call_forward(self, qkv: QKV, plan: PackedPlan) -> tuple[torch.Tensor, torch.Tensor]:
        api = importlib.import_module("flash_attn_interface")
        out, lse, *_ = _call(api._flash_attn_forward, plan, "causal", qkv._asdict())
        return out, lse

    def call_backward(self, x: BackwardInputs, plan: PackedPlan) -> Gradients:
        gradients = dq, dk, dv = empty_contiguous(*x.qkv)
        api = importlib.import_module("flash_attn_interface")
        tensors = {**x._asdict(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
        tensors["softmax_lse"] = tensors.pop("lse")
        _call(api._flash_attn_backward, plan, "is_causal", tensors)
        return dq, dk, dv


def _call(
    function: Callable[..., Any], plan: PackedPlan, causal: str, tensors: dict[str, torch.Tensor]
) -> Any:
    """Call one of the pair, of either version.

    Args:
        causal: name of the causal flag in the main branch.
    """
    arguments: dict[str, Any] = {**tensors, "softmax_scale": plan.scale}
    if plan.documents > 1:
        arguments |= {
            "cu_seqlens_q": plan.cu_q,
            "cu_seqlens_k": plan.cu_k,
            "max_seqlen_q": plan.max_q,
            "max_seqlen_k": plan.max_k,
        }
    parameters = inspect.signature(function).parameters
    if "window_size" not in parameters:
        bounds = {"window_size_left": plan.left, "window_size_right": plan.right}
        return function(**arguments, **{causal: plan.causal}, **bounds)
    required = {name: None for name, p in parameters.items() if p.default is p.empty}
    window = {"causal": plan.causal, "window_size": (plan.left, plan.right)}
    return function(**{**required, **arguments, **window})
