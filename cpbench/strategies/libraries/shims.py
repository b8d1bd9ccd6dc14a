"""What a transport lacks that libraries rely on.  Not a strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def self_sends(group: Any) -> Iterator[None]:
    """Messages of a rank to itself work on Gloo, which has none.

    Ring libraries send their gradients home in a last hop, on a ring of one rank to themselves;
    NCCL does that.  Nothing changes where there are more ranks.
    """
    import torch.distributed

    dist: Any = torch.distributed
    if dist.get_world_size(group) > 1 or "gloo" not in dist.get_backend(group):
        yield
        return
    original = dist.batch_isend_irecv

    def copy(operations: list[Any]) -> list[Any]:
        sent = [one.tensor for one in operations if one.op is dist.isend]
        received = [one.tensor for one in operations if one.op is dist.irecv]
        for target, source in zip(received, sent, strict=True):
            target.copy_(source)
        return []

    dist.batch_isend_irecv = copy
    try:
        yield
    finally:
        dist.batch_isend_irecv = original
