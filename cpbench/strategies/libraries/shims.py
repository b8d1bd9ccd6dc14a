"""Workarounds for features that libraries need and a transport lacks.  Not a strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def gloo_self_sends(group: Any) -> Iterator[None]:
    """Emulate P2P messages of a rank to itself on Gloo, which does not support them.

    On a ring of one rank, ring libraries return gradients by a message to themselves, as NCCL
    allows.  Does nothing for more than one rank.
    """
    import torch.distributed

    dist: Any = torch.distributed
    if dist.get_world_size(group) > 1 or "gloo" not in dist.get_backend(group):
        yield
        return
    original = dist.batch_isend_irecv

    def copy(ops: list[Any]) -> list[Any]:
        sources = [op.tensor for op in ops if op.op is dist.isend]
        targets = [op.tensor for op in ops if op.op is dist.irecv]
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return []

    dist.batch_isend_irecv = copy
    try:
        yield
    finally:
        dist.batch_isend_irecv = original
