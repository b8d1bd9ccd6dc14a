"""Operator `magi.ffa`: flex-flash-attention of MagiAttention, for Hopper.

It takes any mask that heads share as a list of rectangles, each full, causal, inverse causal or
both; rectangles in the same rows are combined in one softmax, and batches are concatenated.
Forward is the public function; backward is the function below autograd, which takes an external
out and lse and returns float32.

Written against magi_attention/functional/flex_flash_attn.py of MagiAttention 1.1.1 (2c641357);
never run.

Legend: B batch, S query length, T key length, H query heads, D head dim; N = B * S tokens.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries.adapter import (
    Adapter,
    Limits,
    Plan,
    flatten_batch,
    plan_fields,
    unflatten_batch,
)
from cpbench.masks.convert import to_typed_slices

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

OPERATORS = (
    OperatorInfo(
        name="magi.ffa",
        summary="MagiAttention's flex-flash-attention: any mask as typed rectangles",
        source="MagiAttention, arXiv 2505.13211",
        load="cpbench.kernels.libraries.magi_ffa:MagiFfa",
        dtypes=("bfloat16", "float16"),
        max_head_dim=128,
        devices=("cuda",),
        deterministic=False,
        requires=("torch", "magi_attention"),
        install="pip install --no-build-isolation . in a clone of "
        "github.com/SandAI-org/MagiAttention with its submodules",
        unproven="MagiAttention 1.1.1",
    ),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranges(Plan):
    """The rectangles of all batches.

    Attributes:
        q, k: ``[B * n, 2]`` int32, start and end in the tokens of all batches, concatenated.
        types: ``[B * n]`` int32, the library's mask type of each rectangle.
    """

    q: torch.Tensor
    k: torch.Tensor
    types: torch.Tensor


class MagiFfa(Adapter):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "magi.ffa"
    limits = Limits(
        min_capability=(9, 0), max_capability=(9, 0), head_dim_multiple=8, max_head_dim=128
    )

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Ranges:
        import torch

        slices = to_typed_slices(mask)
        batch = np.arange(problem.batch)[:, None, None]
        ranges = slices.ranges[None]
        q = (ranges[..., :2] + batch * problem.seq_q).reshape(-1, 2)
        k = (ranges[..., 2:] + batch * problem.seq_k).reshape(-1, 2)
        arrays = (q, k, np.tile(slices.types, problem.batch))
        ranges_q, ranges_k, types = (
            torch.as_tensor(array.astype(np.int32), device=device) for array in arrays
        )
        return Ranges(**plan_fields(mask, problem, device), q=ranges_q, k=ranges_k, types=types)

    def _forward(self, qkv: QKV, plan: Ranges) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = qkv
        out, meta = _api().flex_flash_attn_func(
            flatten_batch(q),
            flatten_batch(k),
            flatten_batch(v),
            q_ranges=plan.q,
            k_ranges=plan.k,
            attn_type_map=plan.types,
            softmax_scale=plan.scale,
        )
        return unflatten_batch(out, len(q)), unflatten_batch(meta.lse, len(q)).transpose(1, 2)

    def _backward(self, x: BackwardInputs, plan: Ranges) -> Gradients:
        import torch

        dout, q, k, v, out, lse = x
        grads = _api()._flex_flash_attn_backward(
            dout=flatten_batch(dout),
            q=flatten_batch(q),
            k=flatten_batch(k),
            v=flatten_batch(v),
            sink=None,
            sink_layout="sh",
            out=flatten_batch(out),
            lse=flatten_batch(lse.transpose(1, 2)),
            dq=None,
            dk=None,
            dv=None,
            dsink=None,
            q_ranges=plan.q,
            k_ranges=plan.k,
            attn_type_map=plan.types,
            softmax_scale=plan.scale,
            softcap=0.0,
            dq_type=torch.float32,
            dk_type=torch.float32,
            dv_type=torch.float32,
            disable_bwd_dkv_atomic_reduction=False,
            deterministic=False,
            sm_margin=0,
        )[:3]
        dq, dk, dv = (unflatten_batch(x, len(q)).to(q.dtype) for x in grads)
        return dq, dk, dv


def _api() -> Any:
    return importlib.import_module("magi_attention.functional.flex_flash_attn")
