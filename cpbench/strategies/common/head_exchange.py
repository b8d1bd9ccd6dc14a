"""All-to-all between token shards and head shards in a group of ranks, as in Ulysses.

Not a strategy.  With fewer key/value heads than ranks, each head is replicated on the ranks that
need it, and the gradients of the replicas are summed in float32.

Legend: B batch, L local tokens, P ranks of the group, h heads per rank, D head dim, which may
differ from tensor to tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpbench.strategies.common.collectives import PendingTensors

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, Gradients, OutLse
    from cpbench.core.problem import Problem
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World


def refusal(name: str, problem: Problem, size: int) -> str | None:
    """The reason why the heads of a problem cannot be sharded over ``size`` ranks, or None."""
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


def heads_per_rank(problem: Problem, size: int) -> tuple[int, int]:
    """The query and key/value heads per rank after the exchange."""
    return problem.heads_q // size, max(problem.heads_kv // size, 1)


def replicate_kv_heads(kv: torch.Tensor, size: int) -> torch.Tensor:
    """Repeat the heads of ``[B, L, G, D]`` so that each rank gets whole ones."""
    if kv.shape[2] >= size:
        return kv
    return kv.repeat_interleave(size // kv.shape[2], dim=2)


def sum_replicas(grad: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """Sum the gradients of the replicas made by :func:`replicate_kv_heads`."""
    if grad.shape[2] == heads_kv:
        return grad
    total: torch.Tensor = grad.unflatten(2, (heads_kv, -1)).float().sum(3)
    return total.to(grad.dtype)


def tokens_to_heads(shards: list[torch.Tensor], comm: Comm) -> PendingTensors:
    """Exchange token shards ``[B, L, P * h, D]`` for head shards ``[B, P * L, h, D]``, in one
    all-to-all.

    Data is sent token-major, so that ``[B, …]`` is a view of what is received.
    """
    import torch

    if comm.size == 1:
        return PendingTensors((), lambda: shards)
    if shards[0].shape[1] != shards[-1].shape[1]:  # fewer queries than keys
        return _join_pending(tokens_to_heads(shards[:1], comm), tokens_to_heads(shards[1:], comm))
    by_rank = [x.unflatten(2, (comm.size, -1)).permute(2, 1, 0, 3, 4) for x in shards]
    packed = torch.cat([x.flatten(3) for x in by_rank], dim=3)  # [P, L, B, all of h * D]
    received = packed.new_empty(packed.shape)
    shapes = [x.shape[3:] for x in by_rank]
    return PendingTensors(
        [comm.all_to_all(received, packed)],
        lambda: _split_last(received.flatten(0, 1).transpose(0, 1), shapes),
    )


def qkv_to_heads(qkv: QKV, comm: Comm) -> PendingTensors:
    """Exchange q, k, v by :func:`tokens_to_heads`, key/value heads replicated as needed."""
    k, v = (replicate_kv_heads(x, comm.size) for x in (qkv.k, qkv.v))
    return tokens_to_heads([qkv.q, k, v], comm)


def heads_to_tokens(by_head: list[torch.Tensor], comm: Comm) -> PendingTensors:
    """The inverse of :func:`tokens_to_heads`."""
    import torch

    if comm.size == 1:
        return PendingTensors((), lambda: by_head)
    if by_head[0].shape[1] != by_head[-1].shape[1]:
        return _join_pending(heads_to_tokens(by_head[:1], comm), heads_to_tokens(by_head[1:], comm))
    shapes = [x.shape[2:] for x in by_head]
    packed = torch.cat([x.transpose(0, 1).flatten(2) for x in by_head], dim=2)
    packed = packed.unflatten(0, (comm.size, -1))
    received = packed.new_empty(packed.shape)

    def collect() -> list[torch.Tensor]:
        return [
            x.permute(2, 1, 0, 3, 4).flatten(2, 3).contiguous()
            for x in _split_last(received, shapes)
        ]

    return PendingTensors([comm.all_to_all(received, packed)], collect)


def _split_last(x: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Split the last axis into axes of these shapes, ``(h, D)`` each."""
    parts = x.split([math.prod(shape) for shape in shapes], dim=-1)
    return [part.unflatten(-1, tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


def result_to_tokens(
    out_all: torch.Tensor, lse_all: torch.Tensor | None, need_lse: bool, comm: Comm
) -> OutLse:
    """Exchange the result of the local heads for that of the local tokens; the lse if needed."""
    (out,) = heads_to_tokens([out_all], comm).wait()
    return out, lse_to_tokens(lse_all, comm) if need_lse and lse_all is not None else None


def gradients_to_tokens(gradients: Sequence[torch.Tensor], heads_kv: int, comm: Comm) -> Gradients:
    """Exchange dq, dk, dv of the local heads for those of the local tokens; sum replicas."""
    dq, dk, dv = heads_to_tokens(list(gradients), comm).wait()
    return dq, sum_replicas(dk, heads_kv), sum_replicas(dv, heads_kv)


def _join_pending(first: PendingTensors, second: PendingTensors) -> PendingTensors:
    return PendingTensors((), lambda: first.wait() + second.wait())


def lse_to_tokens(lse_BHS: torch.Tensor, comm: Comm) -> torch.Tensor:
    """Exchange the lse ``[B, h, P * L]`` of the local heads for ``[B, P * h, L]`` of the tokens."""
    (lse_BLH1,) = heads_to_tokens([lse_BHS.transpose(1, 2).unsqueeze(-1)], comm).wait()
    return lse_BLH1.squeeze(-1).transpose(1, 2)


def group_size(world: World, requested_size: int) -> int:
    """The ranks that exchange heads: as requested, or (0) as many per node as the heads allow.

    If the last node has fewer ranks, the size divides those of a full node, so that no group is on
    two nodes.
    """
    if requested_size:
        return requested_size
    per_node = world.ranks_per_node
    whole = world.size % per_node == 0
    return next(
        n
        for n in range(min(world.size, per_node), 0, -1)
        if world.size % n == 0
        and (whole or per_node % n == 0)
        and refusal("", world.problem, n) is None
    )


def world_after_exchange(world: World, groups: tuple[tuple[int, ...], ...]) -> World:
    """The world after the exchange: each group is one rank, with a member's part of the heads."""
    return world.merged(groups, *heads_per_rank(world.problem, len(groups[0])))
