"""Exchanging tokens for heads inside a group of ranks: what Ulysses and its descendants share.

Not a strategy.  With fewer key/value heads than ranks each head is replicated to the ranks that
need it, and the gradients of its copies are summed in float32.

Legend: B batch, L local tokens, P ranks of the group, h heads of a rank, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.strategies.common.collectives import Pending

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World


def refusal(name: str, problem: Problem, size: int) -> str | None:
    """Why the heads of a problem cannot be dealt to ``size`` ranks, or None."""
    heads_q, heads_kv = problem.heads_q, problem.heads_kv
    if heads_q % size:
        return (
            f"{name} needs num_heads_q divisible by the ranks that share them: {heads_q} on {size}"
        )
    if heads_kv % size and size % heads_kv:
        return (
            f"{name} needs num_heads_kv divisible by the ranks that share them, or these by "
            f"num_heads_kv (then heads are replicated): {heads_kv} on {size}"
        )
    return None


def local_heads(problem: Problem, size: int) -> tuple[int, int]:
    """Query and key/value heads of each rank after the exchange."""
    return problem.heads_q // size, max(problem.heads_kv // size, 1)


def replicated(kv: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, L, G, D]`` with heads repeated so that each rank gets whole ones."""
    if kv.shape[2] >= size:
        return kv
    return kv.repeat_interleave(size // kv.shape[2], dim=2)


def sum_replicas(grad: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """The gradient of the heads that :func:`replicated` repeated."""
    if grad.shape[2] == heads_kv:
        return grad
    total: torch.Tensor = grad.unflatten(2, (heads_kv, -1)).float().sum(3)
    return total.to(grad.dtype)


def to_heads(shards: list[torch.Tensor], comm: Comm) -> Pending:
    """Token shards ``[B, L, P * h, D]`` to head shards ``[B, P * L, h, D]``, in one all-to-all.

    Tokens lead on the wire, so that what arrives needs no reordering: ``[B, …]`` is a view.
    """
    import torch

    if comm.size == 1:
        return Pending((), lambda: shards)
    if shards[0].shape[1] != shards[-1].shape[1]:  # fewer queries than keys
        return _both(to_heads(shards[:1], comm), to_heads(shards[1:], comm))
    by_rank = [x.unflatten(2, (comm.size, -1)).permute(2, 1, 0, 3, 4) for x in shards]
    wire = torch.cat(by_rank, dim=3)
    arrived = wire.new_empty(wire.shape)
    heads = [x.shape[3] for x in by_rank]
    return Pending(
        [comm.all_to_all(arrived, wire)],
        lambda: list(arrived.flatten(0, 1).transpose(0, 1).split(heads, dim=2)),
    )


def qkv_to_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, comm: Comm) -> Pending:
    """:func:`to_heads` of queries, keys and values, key/value heads replicated as needed."""
    return to_heads([q, replicated(k, comm.size), replicated(v, comm.size)], comm)


def to_tokens(by_head: list[torch.Tensor], comm: Comm) -> Pending:
    """The inverse of :func:`to_heads`."""
    import torch

    if comm.size == 1:
        return Pending((), lambda: by_head)
    if by_head[0].shape[1] != by_head[-1].shape[1]:
        return _both(to_tokens(by_head[:1], comm), to_tokens(by_head[1:], comm))
    heads = [x.shape[2] for x in by_head]
    wire = torch.cat([x.transpose(0, 1) for x in by_head], dim=2)
    wire = wire.unflatten(0, (comm.size, -1))
    arrived = wire.new_empty(wire.shape)

    def take() -> list[torch.Tensor]:
        return [
            x.permute(2, 1, 0, 3, 4).flatten(2, 3).contiguous() for x in arrived.split(heads, dim=3)
        ]

    return Pending([comm.all_to_all(arrived, wire)], take)


def _both(first: Pending, second: Pending) -> Pending:
    return Pending((), lambda: first.wait() + second.wait())


def lse_to_tokens(lse_BHS: torch.Tensor, comm: Comm) -> torch.Tensor:
    """``[B, h, P * L]`` of some heads to ``[B, P * h, L]`` of some tokens."""
    (lse_BLH1,) = to_tokens([lse_BHS.transpose(1, 2).unsqueeze(-1)], comm).wait()
    return lse_BLH1.squeeze(-1).transpose(1, 2)


def group_size(world: World, wanted: int) -> int:
    """Ranks that exchange heads: as wanted, or (0) as many of a node's as the heads allow."""
    if wanted:
        return wanted
    sizes = range(min(world.size, world.ranks_per_node), 0, -1)
    fits = (n for n in sizes if world.size % n == 0 and refusal("", world.problem, n) is None)
    return next(fits)


def exchanged(world: World, groups: tuple[tuple[int, ...], ...]) -> World:
    """The world after the exchange: each group is one rank, with its share of the heads."""
    return world.merged(groups, *local_heads(world.problem, len(groups[0])))
