"""Collectives on token-major tensors.  Not a strategy.

Tensors are sent token-major, ``[L, B, …]``, so that received data needs no reordering:
``[B, P * L, …]`` is a view of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm, Handle


class PendingTensors:
    """Tensors of pending operations; ``wait`` returns them."""

    def __init__(
        self, handles: Sequence[Handle], collect: Callable[[], list[torch.Tensor]]
    ) -> None:
        self._handles, self._collect = handles, collect

    def wait(self) -> list[torch.Tensor]:
        for handle in self._handles:
            handle.wait()
        return self._collect()


def all_gather_tokens(shards: Sequence[torch.Tensor], comm: Comm) -> PendingTensors:
    """All-gather ``[L, …]`` of each rank to ``[P * L, …]``, in rank-major order."""
    if comm.size == 1:
        return PendingTensors((), lambda: list(shards))
    gathered = [x.new_empty((comm.size, *x.shape)) for x in shards]
    handles = [comm.all_gather(out, x) for out, x in zip(gathered, shards, strict=True)]
    return PendingTensors(handles, lambda: [x.flatten(0, 1) for x in gathered])


def reduce_scatter_tokens(sums: Sequence[torch.Tensor], comm: Comm) -> PendingTensors:
    """Reduce-scatter ``[P * L, …]`` of all tokens to the local ``[L, …]`` of the sum over ranks."""
    if comm.size == 1:
        return PendingTensors((), lambda: list(sums))
    by_rank = [x.unflatten(0, (comm.size, -1)) for x in sums]
    local = [x.new_empty(x.shape[1:]) for x in by_rank]
    handles = [comm.reduce_scatter(out, x) for out, x in zip(local, by_rank, strict=True)]
    return PendingTensors(handles, lambda: local)


def to_token_major(x: torch.Tensor) -> torch.Tensor:
    """Transpose ``[B, L, …]`` to a contiguous ``[L, B, …]``."""
    return x.transpose(0, 1).contiguous()
