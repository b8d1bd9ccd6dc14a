"""Operator `bands`: exact attention for any mask, from the mask's band slices.

On CPU the mask becomes tiles (``bands_plan``) that are a few matrix products each (``bands_cpu``).
On CUDA every slice is one call of the FlashAttention-2 kernel that torch carries, whose sliding
window can be any band of a rectangle (``bands_cuda``); the parts are merged in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.kernels import bands_cpu, bands_cuda
from cpbench.kernels.bands_plan import Layout, layout
from cpbench.registry import OperatorInfo

if TYPE_CHECKING:
    import torch

    from cpbench.mask import AttnMask
    from cpbench.problem import Problem


@dataclass(frozen=True)
class Plan:
    """What to compute: a CPU layout or CUDA calls, never both."""

    scale: float
    layout: Layout | None = None
    calls: tuple[bands_cuda.Call, ...] = ()


class Bands:
    """The operator; see ``cpbench.operator.Operator`` for shapes.

    Args:
        tile: CPU only, most rows of scores of a tile (queries times the query heads that share a
            key/value head).  0 chooses.
    """

    def __init__(self, tile: int = 0) -> None:
        if tile < 0:
            raise ValueError(f"tile is a number of rows, or 0 to let bands choose; not {tile}")
        self.tile = tile

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        if problem.softcap:
            return "bands has no softcap"
        if device.startswith("cuda"):
            return bands_cuda.unsupported(problem)
        if device != "cpu":
            return f"bands runs on cpu and cuda, not on {device}"
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Plan:
        if device.startswith("cuda"):
            return Plan(problem.softmax_scale, calls=bands_cuda.calls(mask))
        return Plan(problem.softmax_scale, layout(mask, problem.group, self.tile))

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if plan.layout is None:
            return bands_cuda.forward(q, k, v, plan.calls, plan.scale)
        return bands_cpu.forward(q, k, v, plan.layout, plan.scale)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        plan: Plan,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if plan.layout is None:
            return bands_cuda.backward(dout, q, k, v, out, lse, plan.calls, plan.scale)
        return bands_cpu.backward(dout, q, k, v, out, lse, plan.layout, plan.scale)


def load(tile: int = 0) -> Bands:
    """The operator with the parameters of a spec (``bands(tile=128)``)."""
    return Bands(int(tile))


OPERATORS = (
    OperatorInfo(
        name="bands",
        summary="exact attention for any mask: tiles of matrix products on CPU, "
        "one windowed flash call per band slice on CUDA",
        source="FlashAttention-2 (Dao 2023), composed over the band slices of AttnMask",
        load=load,
        dtypes=("float64", "float32", "bfloat16", "float16"),
        params=("tile",),
    ),
)
