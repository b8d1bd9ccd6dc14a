"""The contract of a context-parallel strategy.

A strategy is plain code against :class:`~cpbench.parallel.comm.Comm`.  It receives an operator and
never imports one, and never branches on tensor values: every decision (who sends what, which steps
are empty) is taken in ``prepare`` from data that all ranks share.

Legend: B batch, L local tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from cpbench.core.registry import missing_package
from cpbench.masks.head_masks import per_head

if TYPE_CHECKING:
    import torch

    from cpbench.core.registry import StrategyInfo
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World


class Strategy(Protocol):
    """What a strategy file implements."""

    def unsupported(self, world: World) -> str | None:
        """Why this cannot be done, in words a user can act on; None if it can."""
        ...

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Any:
        """The immutable plan of one rank, made without a communicator.

        It is made a second time with a :class:`~cpbench.parallel.trace.TracedOperator`, so that
        ranks can agree on who sends what before anything is sent.
        """
        ...

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Any,
        op: BoundOperator,
        comm: Comm,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        """Attention on local shards.

        Args:
            q: ``[B, L, H, D]``; k, v: ``[B, L, G, D]``, contiguous.
            need_lse: whether the local lse must be returned even where that costs traffic.

        Returns:
            out ``[B, L, H, D]``, lse ``[B, H, L]`` or None, and what ``backward`` needs.
        """
        ...

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Any, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the local shards, in their shapes and dtypes."""
        ...


def declared_refusal(info: StrategyInfo, world: World) -> str | None:
    """Why the declaration alone rules a world out; None if it does not."""
    missing = missing_package(info)
    if missing is not None:
        return f"{info.name} needs the Python package {missing}, which is not installed"
    if world.keys.name not in info.layouts:
        return f"{info.name} takes layouts {', '.join(info.layouts)}, not {world.keys.name}"
    if per_head(world.mask) and world.size > 1:
        return f"{info.name}: a mask for each head runs on 1 rank alone, under the strategy single"
    if world.placement and world.placement not in info.axes:
        takes = f"placements {', '.join(info.axes)}" if info.axes else "no placement"
        return f"{info.name} takes {takes}, not {world.placement!r}"
    return None
