"""Operator `triton_band`: attention for any mask in Triton, forward and backward.

The mask becomes lists of tiles (``triton.plan``) for the kernels of ``forward_device`` and
``backward_device``: empty tiles are skipped, and entirely visible ones computed without masking.
The backward pass is deterministic.  The same kernels serve every mask, so the cost of a mask is
that of the tiles it visits.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.triton import launch as triton_launch
from cpbench.kernels.triton.configs import Config
from cpbench.kernels.triton.launch import ConfigOverrides, Plan

if TYPE_CHECKING:
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

OPERATORS = (
    OperatorInfo(
        name="triton_band",
        summary="any mask in one Triton kernel per pass, over lists of tiles; deterministic",
        source="FlashAttention-2, arXiv 2307.08691, over tile lists as in FlexAttention",
        load="cpbench.kernels.triton.band:TritonBand",
        requires=("torch", "triton"),
        value_dims=True,
        interpreted_on=("cpu",),
        params=(
            "block_q",
            "block_k",
            "num_warps",
            "num_stages",
            "descriptors",
            "launches",
            "parts",
        ),
        compiles="cpbench.kernels.triton.ahead_of_time:launches",
    ),
)


class TritonBand:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        block_q, block_k, num_warps, num_stages, descriptors, launches: see
            :class:`ConfigOverrides`.
        parts: number of parts to split each row of tiles into; 0 splits rows if there would be
            fewer programs than processors.
    """

    def __init__(
        self, block_q: int = 0, block_k: int = 0, num_warps: int = 0, num_stages: int = 0,
        descriptors: int = 0, launches: int = 0, parts: int = 0,
    ) -> None:  # fmt: skip
        launch = {
            "num_warps": num_warps, "num_stages": num_stages, "descriptors": descriptors,
            "launches": launches,
        }  # fmt: skip
        self._overrides = ConfigOverrides("triton_band", False, block_q, block_k, **launch)
        self._parts = parts

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        return self._overrides.refusal(problem, device)

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Plan:
        return self.prepare_with(mask, problem, device, self._overrides.configs(problem, device))

    def prepare_with(
        self, mask: AttnMask, problem: Problem, device: str, configs: dict[str, Config]
    ) -> Plan:
        """As :meth:`prepare`, with given configurations by kernel."""
        return triton_launch.plan((mask,), problem, device, configs, self._parts)

    forward = staticmethod(triton_launch.forward)
    backward = staticmethod(triton_launch.backward)
