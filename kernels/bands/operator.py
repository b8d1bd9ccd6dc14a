"""Operator `bands`: exact attention for any mask, from the band slices of the mask.

On CPU the mask is divided into tiles (``bands.plan``), each computed with a few matrix products
(``bands.cpu``).  On CUDA, and with ``kernel`` on CPU too, it is divided into pieces that the kernel
of another operator takes (``bands.composed``): by default the FlashAttention-2 in torch, whose
sliding window can be any band of a rectangle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.registry import ANY_MASK, OperatorInfo
from cpbench.kernels.bands import cpu
from cpbench.kernels.bands.composed import Call, Composed
from cpbench.kernels.bands.plan import Layout, layout
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import distinct_masks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from cpbench.core.operator import Gradients, OutLse
    from cpbench.core.problem import Problem
    from cpbench.masks.head_masks import SlicedMask


CUDA_KERNEL = "flash_attn.torch"
CUDA_KERNEL_OF_VALUES = "triton_band"  # where they have another head_dim than queries and keys


@dataclass(frozen=True)
class Plan:
    """The plan: one layout for all heads or one per query head; or a kernel and its calls."""

    scale: float
    layouts: tuple[Layout, ...] = ()
    composed: Composed | None = None
    calls: tuple[Call, ...] = ()


class Bands:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        tile: on CPU, maximum rows of a tile (queries times the query heads that share a key/value
            head); 0 for the default, which depends on the mask.
        kernel: name of the operator whose kernel computes the pieces of the mask; empty for tiles
            on CPU, and on CUDA for ``flash_attn.torch``, or ``triton_band`` where values have
            another head_dim.

    Raises:
        ValueError: for a negative tile, or a kernel whose partial results do not merge.
    """

    def __init__(self, tile: int = 0, kernel: str = "") -> None:
        if tile < 0:
            raise ValueError(f"tile is a number of rows, or 0 for the default; not {tile}")
        if kernel == "bands":
            raise ValueError("kernel = 'bands' of bands would be itself; leave it out")
        self.tile = tile
        self._given = Composed(kernel) if kernel else None

    def unsupported(self, problem: Problem, mask: SlicedMask, device: str) -> str | None:
        if problem.softcap:
            return "bands has no softcap"
        if device != "cpu" and not device.startswith("cuda"):
            return f"bands runs on cpu and cuda, not on {device}"
        composed = self.composed(problem, device)
        if composed is None:
            return None
        if not isinstance(mask, AttnMask):
            return "bands over a kernel takes one mask for all heads; use triton_block_sparse"
        return composed.unsupported(problem, mask, device)

    def is_deterministic(self, problem: Problem, device: str) -> bool:
        """See ``cpbench.core.operator.is_deterministic``: as the kernel that it calls."""
        composed = self.composed(problem, device)
        return composed is None or composed.is_deterministic(problem, device)

    def composed(self, problem: Problem, device: str) -> Composed | None:
        """What calls the kernel of another operator; None for tiles on a CPU."""
        if self._given is not None or device == "cpu":
            return self._given
        return Composed(CUDA_KERNEL_OF_VALUES if problem.head_dim_v else CUDA_KERNEL)

    def prepare(self, mask: SlicedMask, problem: Problem, device: str) -> Plan:
        composed = self.composed(problem, device)
        if composed is not None:
            assert isinstance(mask, AttnMask)
            calls = composed.prepare(mask, problem, device)
            return Plan(problem.softmax_scale, composed=composed, calls=calls)
        group = problem.group if isinstance(mask, AttnMask) else 1
        fused = not problem.head_dim_v  # torch's kernel takes one head_dim
        layouts = tuple(
            layout(head_mask, group, self.tile, fused) for head_mask in distinct_masks(mask)
        )
        return Plan(problem.softmax_scale, layouts)

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        q, k, v = qkv
        if plan.composed is not None:
            return plan.composed.forward(qkv, plan.calls)
        if len(plan.layouts) == 1:
            return cpu.forward(qkv, plan.layouts[0], plan.scale)
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        lse = q.new_empty(_lse_shape(q), dtype=torch.float32)
        for head_layout, (h, g) in zip(plan.layouts, _head_pairs(q, k), strict=True):
            inputs = QKV(q[:, :, h], k[:, :, g], v[:, :, g])
            out[:, :, h], lse[:, h] = cpu.forward(inputs, head_layout, plan.scale)
        return out, lse

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        import torch

        dout, q, k, v, out, lse = x
        if plan.composed is not None:
            return plan.composed.backward(x, plan.calls)
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


def load(tile: int = 0, kernel: str = "") -> Bands:
    """The operator with the parameters of its spec (``bands:tile=128``)."""
    return Bands(int(tile), str(kernel))


OPERATORS = (
    OperatorInfo(
        name="bands",
        summary="exact attention for any mask: tiles of matrix products on CPU, "
        "as few calls as it takes of another operator's kernel on CUDA",
        source="FlashAttention-2 (Dao 2023), composed over the band slices of AttnMask",
        load=load,
        masks=(*ANY_MASK, "heads"),
        dtypes=("float64", "float32", "bfloat16", "float16"),
        value_dims=True,
        lse_error=2e-4,  # as ``sdpa.cpu_flash``, the kernel that it calls in bfloat16
        params=("tile", "kernel"),
    ),
)
