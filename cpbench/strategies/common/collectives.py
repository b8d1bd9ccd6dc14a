"""Collectives on token-major tensors.  Not a strategy.

Tensors are sent token-major, ``[L, B, …]``, so that received data needs no reordering:
``[B, P * L, …]`` is a view of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm, Handle

LANE = "tokens"  # of messages between pairs of ranks


T = TypeVar("T")


class PendingTensors(Generic[T]):
    """Tensors of pending operations, or lists of them; ``wait`` returns them."""

    def __init__(self, handles: Sequence[Handle], collect: Callable[[], list[T]]) -> None:
        self._handles, self._collect = handles, collect

    def wait(self) -> list[T]:
        for handle in self._handles:
            handle.wait()
        return self._collect()


def all_gather_tokens(
    shards: Sequence[torch.Tensor], comm: Comm, lengths: Sequence[int] = ()
) -> PendingTensors[torch.Tensor]:
    """All-gather ``[L, …]`` of each rank to ``[P * L, …]``, in rank-major order.

    Args:
        lengths: L of each rank, if they differ; then messages go from each rank to each.
    """
    if comm.size == 1:
        return PendingTensors((), lambda: list(shards))
    if len(set(lengths)) > 1:
        joined = [x.new_empty((sum(lengths), *x.shape[1:])) for x in shards]
        parts = [x.split(list(lengths)) for x in joined]
        handle = comm.lane(LANE).exchange(
            [(x, rank) for rank in range(comm.size) for x in shards],
            [(of_rank[rank], rank) for rank in range(comm.size) for of_rank in parts],
            "tokens",
        )
        return PendingTensors([handle], lambda: joined)
    gathered = [x.new_empty((comm.size, *x.shape)) for x in shards]
    handles = [comm.all_gather(out, x) for out, x in zip(gathered, shards, strict=True)]
    return PendingTensors(handles, lambda: [x.flatten(0, 1) for x in gathered])


def reduce_scatter_tokens(
    sums: Sequence[torch.Tensor], comm: Comm, lengths: Sequence[int] = ()
) -> PendingTensors[torch.Tensor]:
    """Reduce-scatter ``[P * L, …]`` of all tokens to the local ``[L, …]`` of the sum over ranks.

    Args:
        lengths: as for :func:`all_gather_tokens`.
    """
    if comm.size == 1:
        return PendingTensors((), lambda: list(sums))
    if len(set(lengths)) > 1:
        parts = [x.split(list(lengths)) for x in sums]
        received = [x.new_empty((comm.size, lengths[comm.rank], *x.shape[1:])) for x in sums]
        handle = comm.lane(LANE).exchange(
            [(of_rank[rank], rank) for rank in range(comm.size) for of_rank in parts],
            [(x[rank], rank) for rank in range(comm.size) for x in received],
            "sums",
        )
        return PendingTensors([handle], lambda: [x.sum(0) for x in received])
    by_rank = [x.unflatten(0, (comm.size, -1)) for x in sums]
    local = [x.new_empty(x.shape[1:]) for x in by_rank]
    handles = [comm.reduce_scatter(out, x) for out, x in zip(local, by_rank, strict=True)]
    return PendingTensors(handles, lambda: local)


def to_token_major(x: torch.Tensor) -> torch.Tensor:
    """Transpose ``[B, L, …]`` to a contiguous ``[L, B, …]``."""
    return x.transpose(0, 1).contiguous()
