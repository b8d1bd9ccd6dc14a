"""Operator `bands`: exact attention for any mask, from the band slices of the mask.

On CPU the mask is divided into tiles (``bands.plan``), each computed with a few matrix products
(``bands.cpu``).  On CUDA every slice is one call of the FlashAttention-2 kernel in torch, whose
sliding window can be any band of a rectangle (``bands.cuda``); the partial results are merged in
float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.registry import ANY_MASK, OperatorInfo
from cpbench.kernels.bands import cpu, cuda
from cpbench.kernels.bands.plan import Layout, layout
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import distinct_masks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from cpbench.core.operator import Gradients, OutLse
    from cpbench.core.problem import Problem
    from cpbench.masks.head_masks import SlicedMask


@dataclass(frozen=True)
class Plan:
    """The plan: on CPU one layout for all heads or one per query head; on CUDA the calls."""

    scale: float
    layouts: tuple[Layout, ...] = ()
    calls: tuple[cuda.Call, ...] = ()


class Bands:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        tile: on CPU, maximum rows of a tile (queries times the query heads that share a key/value
            head); 0 for the default, which depends on the mask.
    """

    def __init__(self, tile: int = 0) -> None:
        if tile < 0:
            raise ValueError(f"tile is a number of rows, or 0 for the default; not {tile}")
        self.tile = tile

    def unsupported(self, problem: Problem, mask: SlicedMask, device: str) -> str | None:
        if problem.softcap:
            return "bands has no softcap"
        if device.startswith("cuda"):
            if not isinstance(mask, AttnMask):
                return "bands on cuda takes one mask for all heads; use triton_block_sparse"
            return cuda.unsupported(problem)
        if device != "cpu":
            return f"bands runs on cpu and cuda, not on {device}"
        return None

    def prepare(self, mask: SlicedMask, problem: Problem, device: str) -> Plan:
        if device.startswith("cuda"):
            assert isinstance(mask, AttnMask)
            return Plan(problem.softmax_scale, calls=cuda.plan_calls(mask))
        group = problem.group if isinstance(mask, AttnMask) else 1
        layouts = tuple(layout(head_mask, group, self.tile) for head_mask in distinct_masks(mask))
        return Plan(problem.softmax_scale, layouts)

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        q, k, v = qkv
        if not plan.layouts:
            return cuda.forward(qkv, plan.calls, plan.scale)
        if len(plan.layouts) == 1:
            return cpu.forward(qkv, plan.layouts[0], plan.scale)
        out, lse = torch.empty_like(q), q.new_empty(_lse_shape(q), dtype=torch.float32)
        for head_layout, (h, g) in zip(plan.layouts, _head_pairs(q, k), strict=True):
            inputs = QKV(q[:, :, h], k[:, :, g], v[:, :, g])
            out[:, :, h], lse[:, h] = cpu.forward(inputs, head_layout, plan.scale)
        return out, lse

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        import torch

        dout, q, k, v, out, lse = x
        if not plan.layouts:
            return cuda.backward(x, plan.calls, plan.scale)
        if len(plan.layouts) == 1:
            return cpu.backward(x, plan.layouts[0], plan.scale)
        dq = torch.empty_like(q)
        # float32, since the query heads of a group add to one key/value head.
        dtype = torch.promote_types(k.dtype, torch.float32)
        dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        for head_layout, (h, g) in zip(plan.layouts, _head_pairs(q, k), strict=True):
            dout_h, q_h, out_h = (tensor[:, :, h] for tensor in (dout, q, out))
            inputs = BackwardInputs(dout_h, q_h, k[:, :, g], v[:, :, g], out_h, lse[:, h])
            dq[:, :, h], dk_h, dv_h = cpu.backward(inputs, head_layout, plan.scale)
            dk[:, :, g] += dk_h
            dv[:, :, g] += dv_h
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _lse_shape(q: torch.Tensor) -> tuple[int, int, int]:
    return (q.shape[0], q.shape[2], q.shape[1])


def _head_pairs(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Each query head with its key/value head, as slices of one head."""
    group = q.shape[2] // k.shape[2]
    for h in range(q.shape[2]):
        yield slice(h, h + 1), slice(h // group, h // group + 1)


def load(tile: int = 0) -> Bands:
    """The operator with the parameters of its spec (``bands:tile=128``)."""
    return Bands(int(tile))


OPERATORS = (
    OperatorInfo(
        name="bands",
        summary="exact attention for any mask: tiles of matrix products on CPU, "
        "one windowed flash call per band slice on CUDA",
        source="FlashAttention-2 (Dao 2023), composed over the band slices of AttnMask",
        load=load,
        masks=(*ANY_MASK, "heads"),
        dtypes=("float64", "float32", "bfloat16", "float16"),
        params=("tile",),
    ),
)
