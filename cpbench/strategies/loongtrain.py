"""LoongTrain: head parallelism, and a double ring over the ranks that hold the same heads.

The ranks form a mesh, ``outer`` x ``inner`` x ``ulysses``: the ring is divided into windows of
``inner`` ranks, and each send between windows overlaps a whole round inside one.  Head-first
placement (the default) puts the Ulysses groups inside nodes; context-first is
``placement = "inner"``.

Source: LoongTrain (arXiv 2406.18485).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.mesh import Mesh, largest_divisor
from cpbench.strategies.usp import Usp

if TYPE_CHECKING:
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="loongtrain",
    summary="head parallelism and a double ring of windows",
    source="LoongTrain, arXiv 2406.18485",
    load="cpbench.strategies.loongtrain:LoongTrain",
    value_dims=True,
    merges=True,
    params=("ulysses", "window", "grad_dtype", "pad"),
    axes=("outer", "inner", "ulysses"),
    variants=("ulysses=2,window=2,pad=true", "ulysses=1,window=2", "ulysses=2,window=2"),
)


class LoongTrain(Usp):
    """The strategy.

    Args:
        ulysses, grad_dtype, pad: as for :class:`Usp`.
        window: ranks of an inner ring; 0 for as many as share a node, or about the square root of
            the ring size if the placement leaves no ring neighbours on one node.
    """

    name = "loongtrain"

    def __init__(
        self, ulysses: int = 0, window: int = 0, grad_dtype: str = "float32", pad: bool = False
    ) -> None:
        super().__init__(ulysses, grad_dtype, pad=pad)
        if window < 0:
            raise ValueError(
                f"loongtrain: window = {window} must be a number of ranks, or 0 to choose"
            )
        self.window = window

    def unsupported(self, world: World) -> str | None:
        reason = super().unsupported(world)
        if reason is None:
            ring = world.size // self.group_size(world)
            if self.window and ring % self.window:
                reason = f"loongtrain: window = {self.window} must divide the ring of {ring} ranks"
        return reason

    def mesh(self, world: World) -> Mesh:
        size = self.group_size(world)
        ring = world.size // size
        window = self.window or _default_window(world, ring, size)
        return world.mesh(outer=ring // window, inner=window, ulysses=size)


def _default_window(world: World, ring: int, size: int) -> int:
    neighbours = (
        world.ranks_per_node if world.placement == "inner" else world.ranks_per_node // size
    )
    if 1 < neighbours < ring:
        return largest_divisor(ring, neighbours)
    return largest_divisor(ring, math.isqrt(ring))
