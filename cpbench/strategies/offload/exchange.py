"""Exchanges between ranks of tensors in host memory: a chunk of tokens at a time goes to the
device, through a collective, and to its place in host memory.

Legend: B batch, L local tokens, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpbench.parallel.host_memory import allocation
from cpbench.strategies.common import head_exchange
from cpbench.strategies.common.collectives import (
    all_gather_tokens,
    reduce_scatter_tokens,
    to_token_major,
)
from cpbench.strategies.offload.grid import Span, spans
from cpbench.strategies.offload.stream import Reader, Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.strategies.common.head_shares import Heads

    Transform = Callable[..., torch.Tensor]


def by_chunk(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    sources: Sequence[Sequence[Span]],
    targets: Sequence[Sequence[Span]],
    transform: Transform,
    op: BoundOperator,
    comm: Comm,
) -> None:
    """Transform host tensors to the host tensor ``out``, a chunk after the other.

    Args:
        sources: for each chunk, the spans of the tensors that it consists of.
        targets: for each chunk, the spans of ``out`` that it becomes.
        transform: of a chunk of each tensor on the device, whose buffers are overwritten later.
    """
    reader, writer = Reader(tensors, sources, op, comm), Writer(comm)
    for chunk_targets in targets:
        result = transform(*reader.next())
        writer.release()
        offset = 0
        for start, end in chunk_targets:
            piece = result[:, offset : offset + end - start]
            writer.write(out[:, start:end], piece.contiguous())
            offset += end - start
        del result, piece
    writer.finish()


def of_all_ranks(tokens: int, chunk: int, size: int) -> list[tuple[Span, ...]]:
    """For each chunk of the ``tokens`` of a rank, its spans in the tokens of all ranks, rank after
    rank; one span, if a chunk are all of them."""
    if chunk >= tokens:
        return [((0, size * tokens),)]
    return [
        tuple((rank * tokens + start, rank * tokens + end) for rank in range(size))
        for start, end in spans(tokens, chunk)
    ]


def of_one_rank(tokens: int, chunk: int) -> list[tuple[Span, ...]]:
    """For each chunk of the ``tokens`` of a rank, its span in them."""
    return [(span,) for span in spans(tokens, chunk)]


def tokens_to_heads(
    x: torch.Tensor, shares: Sequence[Heads], chunk: int, op: BoundOperator, comm: Comm
) -> torch.Tensor:
    """Exchange ``[B, L, H, D]`` for ``[B, P * L, h, D]``: see ``head_exchange``.

    Args:
        shares: the heads of each rank.
    """
    if comm.size == 1:
        return x
    b, tokens, _, dim = x.shape
    first, last = shares[comm.rank]
    out = allocation.empty((b, comm.size * tokens, last - first, dim), x.dtype, op.device)

    def exchange(local: torch.Tensor) -> torch.Tensor:
        return head_exchange.tokens_to_heads([local], [tuple(shares)], comm).wait()[0]

    one, all_ranks = of_one_rank(tokens, chunk), of_all_ranks(tokens, chunk, comm.size)
    by_chunk((x,), out, one, all_ranks, exchange, op, comm)
    return out


def heads_to_tokens(
    x: torch.Tensor, shares: Sequence[Heads], chunk: int, op: BoundOperator, comm: Comm, heads: int
) -> torch.Tensor:
    """The inverse of :func:`tokens_to_heads`, for ``heads`` heads; replicas are summed."""
    if comm.size == 1:
        return x
    b, all_tokens, _, dim = x.shape
    tokens = all_tokens // comm.size
    out = allocation.empty((b, tokens, heads, dim), x.dtype, op.device)

    def exchange(by_head: torch.Tensor) -> torch.Tensor:
        returned = head_exchange.heads_to_tokens([by_head], [tuple(shares)], comm).wait()
        return head_exchange.join_heads(returned, heads)

    one, all_ranks = of_one_rank(tokens, chunk), of_all_ranks(tokens, chunk, comm.size)
    by_chunk((x,), out, all_ranks, one, exchange, op, comm)
    return out


def gather(x: torch.Tensor, chunk: int, op: BoundOperator, comm: Comm) -> torch.Tensor:
    """All-gather ``[B, L, …]`` of each rank to ``[B, P * L, …]``, in rank-major order."""
    if comm.size == 1:
        return x
    tokens = x.shape[1]
    out = allocation.empty((x.shape[0], comm.size * tokens, *x.shape[2:]), x.dtype, op.device)

    def all_gather(local: torch.Tensor) -> torch.Tensor:
        (gathered,) = all_gather_tokens([to_token_major(local)], comm).wait()
        return gathered.transpose(0, 1)

    one, all_ranks = of_one_rank(tokens, chunk), of_all_ranks(tokens, chunk, comm.size)
    by_chunk((x,), out, one, all_ranks, all_gather, op, comm)
    return out


def reduce_scatter(
    x: torch.Tensor, chunk: int, op: BoundOperator, comm: Comm, dtype: torch.dtype
) -> torch.Tensor:
    """Reduce-scatter float32 ``[B, P * L, …]`` to ``[B, L, …]`` of ``dtype``."""
    tokens = x.shape[1] // comm.size
    out = allocation.empty((x.shape[0], tokens, *x.shape[2:]), dtype, op.device)

    def reduce(sums: torch.Tensor) -> torch.Tensor:
        (local,) = reduce_scatter_tokens([to_token_major(sums)], comm).wait()
        return local.transpose(0, 1).to(dtype)

    one, all_ranks = of_one_rank(tokens, chunk), of_all_ranks(tokens, chunk, comm.size)
    by_chunk((x,), out, all_ranks, one, reduce, op, comm)
    return out
