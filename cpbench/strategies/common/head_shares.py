"""The heads of each rank when several ranks share them.  Not a strategy.

Query heads are split evenly, in order.  Where they do not divide, some ranks hold one head fewer:
what padding to the next multiple would add is neither sent nor computed.  A rank holds the
key/value heads that its query heads attend to, so a key/value head may be replicated on several.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cpbench.core.problem import Problem
    from cpbench.parallel.world import World

Heads = tuple[int, int]  # heads from the first number to before the second


@dataclass(frozen=True)
class HeadShares:
    """The heads of each rank of a group.

    Attributes:
        heads_q, heads_kv: of the problem.
        q: query heads of each rank.
        kv: key/value heads of each rank.
    """

    heads_q: int
    heads_kv: int
    q: tuple[Heads, ...]
    kv: tuple[Heads, ...]

    @classmethod
    def of(cls, problem: Problem, size: int) -> HeadShares:
        """The shares of ``size`` ranks in the heads of a problem."""
        return _shares(problem.heads_q, problem.heads_kv, size)

    def attention(self, world: World, rank: int) -> World:
        """The attention of the heads of one rank; ``world`` has all heads of the same tokens.

        The operator gets equally many query heads for each key/value head: a key/value head that
        more of them attend to is repeated (``World.kv_heads``).
        """
        (first, last), (kv_first, kv_last) = self.q[rank], self.kv[rank]
        repeated = self.repeated(rank)
        uneven = len(repeated) != kv_last - kv_first
        return world.with_heads(last - first, len(repeated), repeated if uneven else ())

    def repeated(self, rank: int) -> tuple[int, ...]:
        """The key/value heads of one rank, counted from its first, each as often as it must be for
        all to have equally many query heads."""
        (first, last), heads_kv = self.q[rank], range(*self.kv[rank])
        group = self.heads_q // self.heads_kv
        counts = [min(last, (kv + 1) * group) - max(first, kv * group) for kv in heads_kv]
        step = math.gcd(*counts)
        return tuple(kv for kv, count in enumerate(counts) for _ in range(count // step))

    def replicas(self, rank: int) -> list[Replicas]:
        """The key/value heads of one rank, by the ranks that hold them."""
        found = list[Replicas]()
        first = self.kv[rank][0]
        for kv in range(*self.kv[rank]):
            ranks = tuple(r for r, (start, end) in enumerate(self.kv) if start <= kv < end)
            start = kv - first
            if found and found[-1].ranks == ranks:
                start = found.pop().heads[0]
            found.append(Replicas((start, kv - first + 1), ranks))
        return found


class Replicas(NamedTuple):
    """Key/value heads (counted from the first one of a rank) and the ranks that hold them."""

    heads: Heads
    ranks: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def _shares(heads_q: int, heads_kv: int, size: int) -> HeadShares:
    bounds = [rank * heads_q // size for rank in range(size + 1)]
    q = tuple(itertools.pairwise(bounds))
    group = heads_q // heads_kv
    kv = tuple(
        (first // group, -(-last // group) if last > first else first // group) for first, last in q
    )
    return HeadShares(heads_q, heads_kv, q, kv)


def refusal(name: str, problem: Problem, size: int, pad: bool) -> str | None:
    """The reason why the heads of a problem cannot be shared by ``size`` ranks, or None.

    Args:
        pad: whether shares may be unequal.
    """
    heads_q, heads_kv = problem.heads_q, problem.heads_kv
    padded = f"with pad=true, {name} computes {-(-heads_q // size)} query heads a rank"
    if pad:
        return None
    if heads_q % size:
        return (
            f"{name} needs num_heads_q divisible by the ranks that share them: {heads_q} on {size} "
            f"({padded} at most)"
        )
    if heads_kv % size and size % heads_kv:
        return (
            f"{name} needs num_heads_kv divisible by the ranks that share them, or these by "
            f"num_heads_kv (then heads are replicated): {heads_kv} on {size} ({padded})"
        )
    return None


def group_size(world: World, requested_size: int, pad: bool) -> int:
    """The ranks that share heads: as requested, or (0) as many per node as the heads allow.

    If the last node has fewer ranks, the size divides those of a full node, so that no group is on
    two nodes.
    """
    if requested_size:
        return requested_size
    per_node = world.ranks_per_node
    whole = world.size % per_node == 0
    return next(
        n
        for n in range(min(world.size, per_node, world.problem.heads_q), 0, -1)
        if world.size % n == 0
        and (whole or per_node % n == 0)
        and refusal("", world.problem, n, pad) is None
    )


class ChunkOfHeads(NamedTuple):
    """One of several chunks of the heads of every rank; each attribute has a value per rank.

    Attributes:
        q: query heads.
        kv: key/value heads that these attend to.
        received: those of ``kv`` that no earlier chunk of the rank has received.
        returned: those of ``kv`` whose gradients are complete: no later chunk of the rank has them.
    """

    q: tuple[Heads, ...]
    kv: tuple[Heads, ...]
    received: tuple[Heads, ...]
    returned: tuple[Heads, ...]


def chunks_of_heads(problem: Problem, size: int, chunks: int) -> tuple[ChunkOfHeads, ...]:
    """Divide the heads of each of ``size`` ranks into chunks."""
    return _chunks(HeadShares.of(problem, size * chunks), size, chunks)


@functools.lru_cache(maxsize=4)  # shared by all ranks of a trace
def _chunks(shares: HeadShares, size: int, chunks: int) -> tuple[ChunkOfHeads, ...]:
    by_rank = [_rank_chunks(shares.kv[rank * chunks : (rank + 1) * chunks]) for rank in range(size)]
    return tuple(
        ChunkOfHeads(
            q=shares.q[i::chunks],
            kv=shares.kv[i::chunks],
            received=tuple(received[i] for received, _ in by_rank),
            returned=tuple(returned[i] for _, returned in by_rank),
        )
        for i in range(chunks)
    )


def _rank_chunks(kv: Iterable[Heads]) -> tuple[list[Heads], list[Heads]]:
    """The key/value heads that each chunk of one rank receives, and those that it returns."""
    kv = list(kv)
    received, returned = list[Heads](), list[Heads]()
    held = kv[0][0]
    for i, (first, last) in enumerate(kv):
        received.append((max(first, held), max(last, held)))
        held = max(last, held)
        later = [start for start, end in kv[i + 1 :] if end > start]
        complete = min([last, *later]) if last > first else last
        returned.append((first, complete))
    return received, returned
