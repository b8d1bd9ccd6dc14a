"""Collectives on tensors whose tokens lead, and results on their way.  Not a strategy.

Tokens lead on the wire, ``[L, B, …]``, so that what arrives needs no reordering:
``[B, P * L, …]`` is a view of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm, Handle


class Pending:
    """Tensors on their way; ``wait`` returns them."""

    def __init__(self, handles: Sequence[Handle], take: Callable[[], list[torch.Tensor]]) -> None:
        self._handles, self._take = handles, take

    def wait(self) -> list[torch.Tensor]:
        for handle in self._handles:
            handle.wait()
        return self._take()


def gather(shards: Sequence[torch.Tensor], comm: Comm) -> Pending:
    """``[L, …]`` of this rank to ``[P * L, …]`` of all, in rank-major order."""
    if comm.size == 1:
        return Pending((), lambda: list(shards))
    everyone = [x.new_empty((comm.size, *x.shape)) for x in shards]
    handles = [comm.all_gather(out, x) for out, x in zip(everyone, shards, strict=True)]
    return Pending(handles, lambda: [x.flatten(0, 1) for x in everyone])


def reduce(sums: Sequence[torch.Tensor], comm: Comm) -> Pending:
    """``[P * L, …]`` of all tokens to this rank's ``[L, …]`` of the sum over ranks."""
    if comm.size == 1:
        return Pending((), lambda: list(sums))
    wire = [x.unflatten(0, (comm.size, -1)) for x in sums]
    local = [x.new_empty(x.shape[1:]) for x in wire]
    handles = [comm.reduce_scatter(out, x) for out, x in zip(local, wire, strict=True)]
    return Pending(handles, lambda: local)


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """``[B, L, …]`` as ``[L, B, …]``, contiguous."""
    return x.transpose(0, 1).contiguous()
