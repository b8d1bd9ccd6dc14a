"""Operator `magi.ffa`: flex-flash-attention of MagiAttention, for Hopper.

It takes any mask of all heads as a list of rectangles, each full, causal, inverse causal or both,
and adds up what overlaps in rows; batches lie end to end.  The call for the forward pass is the
public one; backward is the one below autograd, which takes an external out and lse and returns
float32.

Written against magi_attention/functional/flex_flash_attn.py of MagiAttention 1.1.1 (2c641357);
never run.

Legend: B batch, S query length, T key length, H query heads, D head dim; N = B * S tokens end to
end.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries.adapter import Adapter, Limits, Plan, about, flat, unflat
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
        q, k: ``[B * n, 2]`` int32, start and end in tokens of all batches end to end.
        types: ``[B * n]`` int32.
    """

    q: torch.Tensor
    k: torch.Tensor
    types: torch.Tensor


class MagiFfa(Adapter):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "magi.ffa"
    limits = Limits(least=(9, 0), most=(9, 0), multiple=8, head_dim=128)

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Ranges:
        import torch

        found = to_typed_slices(mask)
        batch = np.arange(problem.batch)[:, None, None]
        rows = found.ranges[None]
        q = (rows[..., :2] + batch * problem.seq_q).reshape(-1, 2)
        k = (rows[..., 2:] + batch * problem.seq_k).reshape(-1, 2)
        lists = (q, k, np.tile(found.types, problem.batch))
        ranges_q, ranges_k, types = (
            torch.as_tensor(x.astype(np.int32), device=device) for x in lists
        )
        return Ranges(**about(mask, problem, device), q=ranges_q, k=ranges_k, types=types)

    def _forward(self, qkv: QKV, plan: Ranges) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = qkv
        out, meta = _api().flex_flash_attn_func(
            flat(q),
            flat(k),
            flat(v),
            q_ranges=plan.q,
            k_ranges=plan.k,
            attn_type_map=plan.types,
            softmax_scale=plan.scale,
        )
        return unflat(out, len(q)), unflat(meta.lse, len(q)).transpose(1, 2)

    def _backward(self, x: BackwardInputs, plan: Ranges) -> Gradients:
        import torch

        dout, q, k, v, out, lse = x
        grads = _api()._flex_flash_attn_backward(
            dout=flat(dout),
            q=flat(q),
            k=flat(k),
            v=flat(v),
            sink=None,
            sink_layout="sh",
            out=flat(out),
            lse=flat(lse.transpose(1, 2)),
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
        dq, dk, dv = (unflat(x, len(q)).to(q.dtype) for x in grads)
        return dq, dk, dv


def _api() -> Any:
    return importlib.import_module("magi_attention.functional.flex_flash_attn")
