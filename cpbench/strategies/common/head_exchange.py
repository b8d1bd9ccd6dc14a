"""All-to-all between token shards and head shards in a group of ranks, as in Ulysses.

Not a strategy.  Each rank gets the heads of its share (``head_shares``): one all-to-all where all
get equally many, else messages between each pair of ranks that has something to send.  The
gradients of a key/value head that several ranks hold are summed in float32.

Legend: B batch, L local tokens, P ranks of the group, h heads per rank, D head dim, which may
differ from tensor to tensor.
"""

from __future__ import annotations

import functools
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


class ReturnedHeads(NamedTuple):
    """A tensor of the local tokens whose heads other ranks have returned.

    Attributes:
        shares: the heads of each rank.
        even: of all ranks, ``[B, L, P, h, D]``, if they returned equally many.
        by_rank: else of each rank that has some, ``[B, L, h, D]``.
    """

    shares: Shares
    even: torch.Tensor | None
    by_rank: dict[int, torch.Tensor]


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
    elif _equal(tuple(shares)):
        by_rank = [
            _select(x, *share).unflatten(2, (comm.size, -1)).permute(2, 1, 0, 3, 4)
            for x, share in zip(shards, shares, strict=True)
        ]
        packed = torch.cat([x.flatten(3) for x in by_rank], dim=3)  # [P, L, B, all of h * D]
        handle = comm.all_to_all(received, packed)
    else:
        token_major = [x.transpose(0, 1) for x in shards]
        sends = {}
        for rank in _holders(tuple(shares)):
            parts = [_select(x, share[rank]) for x, share in zip(token_major, shares, strict=True)]
            sends[rank] = torch.cat([x.flatten(2) for x in parts], dim=2)
        handle = _exchange(sends, dict(enumerate(received)) if received.shape[3] else {}, comm)
    return PendingTensors(
        [handle], lambda: _split_last(received.flatten(0, 1).transpose(0, 1), shapes)
    )


def heads_to_tokens(
    by_head: Sequence[torch.Tensor], shares: Sequence[Shares], comm: Comm
) -> PendingTensors[ReturnedHeads]:
    """The inverse of :func:`tokens_to_heads`, up to :func:`join_heads`."""
    import torch

    if comm.size == 1:
        local = [
            ReturnedHeads(share, x.unsqueeze(2), {})
            for x, share in zip(by_head, shares, strict=True)
        ]
        return PendingTensors((), lambda: local)
    if by_head[0].shape[1] != by_head[-1].shape[1]:
        halves = (heads_to_tokens(by_head[i], shares[i], comm) for i in (slice(1), slice(1, None)))
        return _join_pending(*halves)
    packed = torch.cat([x.transpose(0, 1).flatten(2) for x in by_head], dim=2)
    packed = packed.unflatten(0, (comm.size, -1))  # [P, L, B, all of h * D]
    if _equal(tuple(shares)):
        shapes = _shapes(by_head, shares, comm.rank)
        received = packed.new_empty(packed.shape)
        empty = not any(map(_total, shares))
        handle = CompletedHandle() if empty else comm.all_to_all(received, packed)

        def collect_even() -> list[ReturnedHeads]:
            tensors = _split_last(received.permute(2, 1, 0, 3), shapes)
            return [ReturnedHeads(share, x, {}) for share, x in zip(shares, tensors, strict=True)]

        return PendingTensors([handle], collect_even)
    L, B = packed.shape[1:3]
    shapes_by_rank = {rank: _shapes(by_head, shares, rank) for rank in _holders(tuple(shares))}
    buffers = {
        rank: packed.new_empty((L, B, sum(h * d for h, d in shapes)))
        for rank, shapes in shapes_by_rank.items()
    }
    handle = _exchange(dict(enumerate(packed)) if packed.shape[3] else {}, buffers, comm)

    def collect() -> list[ReturnedHeads]:
        returned = [ReturnedHeads(share, None, {}) for share in shares]
        for rank, shapes in shapes_by_rank.items():
            parts = _split_last(buffers[rank].transpose(0, 1), shapes)
            for of_tensor, part in zip(returned, parts, strict=True):
                if part.shape[2]:
                    of_tensor.by_rank[rank] = part
        return returned

    return PendingTensors([handle], collect)


def join_heads(chunks: Sequence[ReturnedHeads], heads: int) -> torch.Tensor:
    """Join what was returned to a tensor of all ``heads``, contiguous; heads that several ranks
    have returned are summed in float32.

    Args:
        chunks: of the heads of each rank, in order.
    """
    import torch

    numbers: list[int]
    evens = [chunk.even for chunk in chunks if chunk.even is not None]
    if len(evens) == len(chunks):
        size = len(chunks[0].shares)
        numbers = [
            head for rank in range(size) for chunk in chunks for head in range(*chunk.shares[rank])
        ]
        joined = (evens[0] if len(evens) == 1 else torch.cat(evens, dim=3)).flatten(2, 3)
    else:
        found = sorted(
            (
                (chunk.shares[rank], part)
                for chunk in chunks
                for rank, part in _by_rank(chunk).items()
            ),
            key=lambda item: item[0],
        )
        numbers = [head for share, _ in found for head in range(*share)]
        joined = torch.cat([part for _, part in found], dim=2)
    if len(numbers) == heads:
        return joined
    if numbers == [head for head in range(heads) for _ in range(len(numbers) // heads)]:
        summed: torch.Tensor = joined.unflatten(2, (heads, -1)).float().sum(3)
        return summed.to(joined.dtype)
    total = joined.new_zeros((*joined.shape[:2], heads, joined.shape[3]), dtype=torch.float32)
    position = 0
    for first, last in _runs(numbers):
        count = last - first
        total[:, :, first:last] += joined[:, :, position : position + count]
        position += count
    return total.to(joined.dtype)


def _by_rank(chunk: ReturnedHeads) -> dict[int, torch.Tensor]:
    """The parts of each rank that has some."""
    if chunk.even is None or not _total(chunk.shares):
        return chunk.by_rank
    return dict(enumerate(chunk.even.unbind(2)))


def _runs(numbers: Sequence[int]) -> list[Heads]:
    """Consecutive numbers, joined."""
    runs: list[Heads] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def qkv_to_heads(qkv: QKV, shares: HeadShares, comm: Comm) -> PendingTensors[torch.Tensor]:
    """Exchange q, k, v by :func:`tokens_to_heads`."""
    return tokens_to_heads(qkv, (shares.q, shares.kv, shares.kv), comm)


def result_to_tokens(result: OutLse, need_lse: bool, shares: HeadShares, comm: Comm) -> OutLse:
    """Exchange out and (if needed) lse of the local heads for those of the local tokens."""
    out = join_heads(heads_to_tokens([result[0]], (shares.q,), comm).wait(), shares.heads_q)
    if not need_lse or result[1] is None:
        return out, None
    return out, lse_to_tokens(result[1], shares, comm)


def gradients_to_tokens(gradients: Gradients, shares: HeadShares, comm: Comm) -> Gradients:
    """Exchange dq, dk, dv of the local heads for those of the local tokens."""
    dq, dk, dv = heads_to_tokens(gradients, (shares.q, shares.kv, shares.kv), comm).wait()
    return (
        join_heads([dq], shares.heads_q),
        join_heads([dk], shares.heads_kv),
        join_heads([dv], shares.heads_kv),
    )


def lse_to_tokens(lse_BHS: torch.Tensor, shares: HeadShares, comm: Comm) -> torch.Tensor:
    """Exchange the lse ``[B, h, P * L]`` of the local heads for ``[B, H, L]`` of the tokens."""
    lse_BSH1 = lse_BHS.transpose(1, 2).unsqueeze(-1)
    returned = heads_to_tokens([lse_BSH1], (shares.q,), comm).wait()
    return join_heads(returned, shares.heads_q).squeeze(-1).transpose(1, 2)


def _exchange(sends: dict[int, torch.Tensor], recvs: dict[int, torch.Tensor], comm: Comm) -> Handle:
    """Send to some ranks and receive from some."""
    return comm.lane(LANE).exchange(
        [(x, rank) for rank, x in sends.items()], [(x, rank) for rank, x in recvs.items()], LANE
    )


@functools.lru_cache(maxsize=16)  # shared by all ranks of a trace
def _holders(shares: tuple[Shares, ...]) -> list[int]:
    """The ranks that have heads of some tensor."""
    return [rank for rank, of_rank in enumerate(zip(*shares, strict=True)) if _total(of_rank)]


@functools.lru_cache(maxsize=16)
def _equal(shares: tuple[Shares, ...]) -> bool:
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
