"""All-to-all between token shards and head shards in a group of ranks, as in Ulysses.

Not a strategy.  Each rank gets the heads of its share (``head_shares``): one all-to-all where all
get equally many, else messages between each pair of ranks that has something to send.  The
gradients of a key/value head that several ranks hold are summed in float32.

Legend: B batch, L local tokens, P ranks of the group, h heads per rank, D head dim, which may
differ from tensor to tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from cpbench.parallel.comm import CompletedHandle
from cpbench.strategies.common.collectives import PendingTensors

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, Gradients, OutLse
    from cpbench.parallel.comm import Comm, Handle
    from cpbench.strategies.common.head_shares import Heads, HeadShares

    Shares = tuple[Heads, ...]  # of one tensor, the heads of each rank

T = TypeVar("T")
LANE = "heads"  # of messages between pairs of ranks


class Part(NamedTuple):
    """Some heads of a tensor, ``[B, L, h, D]``, that another rank has returned.

    Attributes:
        heads: their numbers.
        tensor: their values.
    """

    heads: Heads
    tensor: torch.Tensor


def tokens_to_heads(
    shards: Sequence[torch.Tensor], shares: Sequence[Shares], comm: Comm
) -> PendingTensors[torch.Tensor]:
    """Exchange token shards ``[B, L, H, D]`` for head shards ``[B, P * L, h, D]``.

    Data is sent token-major, so that ``[B, …]`` is a view of what is received.

    Args:
        shares: for each tensor, the heads of each rank.
    """
    import torch

    if comm.size == 1:
        local = [_select(x, share[0]) for x, share in zip(shards, shares, strict=True)]
        return PendingTensors((), lambda: local)
    if shards[0].shape[1] != shards[-1].shape[1]:  # fewer queries than keys
        halves = (tokens_to_heads(shards[i], shares[i], comm) for i in (slice(1), slice(1, None)))
        return _join_pending(*halves)
    shapes = _shapes(shards, shares, comm.rank)
    B, L = shards[0].shape[:2]
    received = shards[0].new_empty((comm.size, L, B, sum(h * d for h, d in shapes)))
    handle: Handle
    if not any(map(_total, shares)):
        handle = CompletedHandle()
    elif _equal(shares):
        by_rank = [
            _select(x, *share).unflatten(2, (comm.size, -1)).permute(2, 1, 0, 3, 4)
            for x, share in zip(shards, shares, strict=True)
        ]
        packed = torch.cat([x.flatten(3) for x in by_rank], dim=3)  # [P, L, B, all of h * D]
        handle = comm.all_to_all(received, packed)
    else:
        token_major = [x.transpose(0, 1) for x in shards]
        sends = []
        for of_rank in zip(*shares, strict=True):
            parts = [_select(x, heads) for x, heads in zip(token_major, of_rank, strict=True)]
            sends.append(torch.cat([x.flatten(2) for x in parts], dim=2))
        handle = _exchange(sends, list(received), comm)
    return PendingTensors(
        [handle], lambda: _split_last(received.flatten(0, 1).transpose(0, 1), shapes)
    )


def heads_to_tokens(
    by_head: Sequence[torch.Tensor], shares: Sequence[Shares], comm: Comm
) -> PendingTensors[list[Part]]:
    """The inverse of :func:`tokens_to_heads`: for each tensor, the parts of all ranks in order."""
    import torch

    if comm.size == 1:
        parts = [[Part(share[0], x)] for x, share in zip(by_head, shares, strict=True)]
        return PendingTensors((), lambda: parts)
    if by_head[0].shape[1] != by_head[-1].shape[1]:
        halves = (heads_to_tokens(by_head[i], shares[i], comm) for i in (slice(1), slice(1, None)))
        return _join_pending(*halves)
    packed = torch.cat([x.transpose(0, 1).flatten(2) for x in by_head], dim=2)
    packed = packed.unflatten(0, (comm.size, -1))  # [P, L, B, all of h * D]
    shapes = [_shapes(by_head, shares, rank) for rank in range(comm.size)]
    received: list[torch.Tensor]
    handle: Handle
    if not any(map(_total, shares)):
        received, handle = list(packed), CompletedHandle()
    elif _equal(shares):
        received_all = packed.new_empty(packed.shape)
        received, handle = list(received_all), comm.all_to_all(received_all, packed)
    else:
        L, B = packed.shape[1:3]
        received = [packed.new_empty((L, B, sum(h * d for h, d in of_rank))) for of_rank in shapes]
        handle = _exchange(list(packed), received, comm)

    def collect() -> list[list[Part]]:
        tensors = [
            _split_last(x.transpose(0, 1), of_rank)
            for x, of_rank in zip(received, shapes, strict=True)
        ]
        return [
            [Part(heads, of_rank[i]) for heads, of_rank in zip(share, tensors, strict=True)]
            for i, share in enumerate(shares)
        ]

    return PendingTensors([handle], collect)


def join_parts(parts: Sequence[Part], heads: int) -> torch.Tensor:
    """Join parts to a tensor of all ``heads``, contiguous; heads that several parts have are summed
    in float32."""
    import torch

    parts = sorted((part for part in parts if _count(part.heads)), key=lambda part: part.heads)
    if len(parts) == 1:
        return parts[0].tensor
    joined = torch.cat([part.tensor for part in parts], dim=2)
    numbers = [head for part in parts for head in range(*part.heads)]
    if len(numbers) == heads:
        return joined
    if numbers == [head for head in range(heads) for _ in range(len(numbers) // heads)]:
        summed: torch.Tensor = joined.unflatten(2, (heads, -1)).float().sum(3)
        return summed.to(joined.dtype)
    total = joined.new_zeros((*joined.shape[:2], heads, joined.shape[3]), dtype=torch.float32)
    for part in parts:
        _select(total, part.heads).add_(part.tensor)
    return total.to(joined.dtype)


def qkv_to_heads(qkv: QKV, shares: HeadShares, comm: Comm) -> PendingTensors[torch.Tensor]:
    """Exchange q, k, v by :func:`tokens_to_heads`."""
    return tokens_to_heads(qkv, (shares.q, shares.kv, shares.kv), comm)


def result_to_tokens(result: OutLse, need_lse: bool, shares: HeadShares, comm: Comm) -> OutLse:
    """Exchange out and (if needed) lse of the local heads for those of the local tokens."""
    (parts,) = heads_to_tokens([result[0]], (shares.q,), comm).wait()
    out = join_parts(parts, shares.heads_q)
    if not need_lse or result[1] is None:
        return out, None
    return out, lse_to_tokens(result[1], shares, comm)


def gradients_to_tokens(gradients: Gradients, shares: HeadShares, comm: Comm) -> Gradients:
    """Exchange dq, dk, dv of the local heads for those of the local tokens."""
    dq, dk, dv = heads_to_tokens(gradients, (shares.q, shares.kv, shares.kv), comm).wait()
    return (
        join_parts(dq, shares.heads_q),
        join_parts(dk, shares.heads_kv),
        join_parts(dv, shares.heads_kv),
    )


def lse_to_tokens(lse_BHS: torch.Tensor, shares: HeadShares, comm: Comm) -> torch.Tensor:
    """Exchange the lse ``[B, h, P * L]`` of the local heads for ``[B, H, L]`` of the tokens."""
    lse_BSH1 = lse_BHS.transpose(1, 2).unsqueeze(-1)
    (parts,) = heads_to_tokens([lse_BSH1], (shares.q,), comm).wait()
    return join_parts(parts, shares.heads_q).squeeze(-1).transpose(1, 2)


def _exchange(sends: list[torch.Tensor], recvs: list[torch.Tensor], comm: Comm) -> Handle:
    """Send a tensor to each rank and receive one from each, unless it is empty."""
    return comm.lane(LANE).exchange(
        [(x, rank) for rank, x in enumerate(sends) if x.numel()],
        [(x, rank) for rank, x in enumerate(recvs) if x.numel()],
        LANE,
    )


def _equal(shares: Sequence[Shares]) -> bool:
    """Whether all ranks get equally many heads of each tensor."""
    return all(len({_count(heads) for heads in share}) == 1 for share in shares)


def _count(heads: Heads) -> int:
    return heads[1] - heads[0]


def _total(share: Shares) -> int:
    """The heads that all ranks get together."""
    return sum(map(_count, share))


def _shapes(
    tensors: Sequence[torch.Tensor], shares: Sequence[Shares], rank: int
) -> list[tuple[int, int]]:
    """Of each tensor, the heads of one rank and the head_dim."""
    return [(_count(share[rank]), x.shape[3]) for x, share in zip(tensors, shares, strict=True)]


def _select(x: torch.Tensor, *shares: Heads) -> torch.Tensor:
    """Heads of ``[…, …, H, D]``, joined; ``x`` itself if those are all, in order, and a view
    if they are of one share."""
    import torch

    if all(start == end for (_, start), (end, _) in itertools.pairwise(shares)):
        shares = ((shares[0][0], shares[-1][1]),)
    if shares == ((0, x.shape[2]),):
        return x
    parts = [x[:, :, first:last] for first, last in shares]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _split_last(x: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Split the last axis into axes of these shapes, ``(h, D)`` each."""
    parts = x.split([heads * dim for heads, dim in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _join_pending(first: PendingTensors[T], second: PendingTensors[T]) -> PendingTensors[T]:
    return PendingTensors((), lambda: first.wait() + second.wait())
