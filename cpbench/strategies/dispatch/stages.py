"""What one rank sends, receives and computes in each stage of a group-cast."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.parallel.kv_requirements import KeyTransfers

if TYPE_CHECKING:
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.world import World
    from cpbench.strategies.dispatch.relays import RankedCast

Runs = tuple[tuple[int, int], ...]  # (start, length) of tokens


@dataclass(frozen=True)
class Messages:
    """Messages of keys that one rank sends and receives.

    Attributes:
        sends: by receiver, the tokens to send.
        receives: rows (sender, first, length): position of each sender's tokens in the buffer.
    """

    sends: tuple[tuple[int, Runs], ...] = ()
    receives: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Stage:
    """The messages and the computation of one rank in one stage.

    Attributes:
        across: local tokens to relays in other nodes, and tokens of other nodes to this relay,
            which come first in its buffer.
        direct: local tokens to the ranks that need them.
        relayed: tokens in the buffer of a relay to the ranks of its node that need them.
        passing: number of tokens at the beginning of the buffer that only others need.
        tokens_across: number of tokens that this relay receives.
        tokens: number of all tokens received.
        plan: of the operator, for all received keys that are needed; None if there are none.
    """

    across: Messages = Messages()
    direct: Messages = Messages()
    relayed: Messages = Messages()
    passing: int = 0
    tokens_across: int = 0
    tokens: int = 0
    plan: Any = None


@dataclass(frozen=True)
class Plan:
    """The plan of one rank.

    Attributes:
        stages: the first one with the local keys, then those of the group-cast.
        by_node: whether any rank receives keys through a relay.
    """

    stages: tuple[Stage, ...]
    by_node: bool = False


def plan_rank(op: BoundOperator, world: World, rank: int, cast: RankedCast) -> Plan:
    """Plan all stages of a rank."""
    local = world.subproblem([rank], [rank])
    kinds = (cast.passing, cast.across, cast.direct, cast.relayed)
    by_stage = (_by_stage(transfers.of(rank), cast.stages) for transfers in kinds)
    stages = [_plan_stage(op, world, rank, of_kinds) for of_kinds in zip(*by_stage, strict=True)]
    first = Stage(plan=op.prepare(local) if local.area else None)
    return Plan((first, *stages), cast.by_node)


def _plan_stage(
    op: BoundOperator, world: World, rank: int, kinds: tuple[KeyTransfers, ...]
) -> Stage:
    """Plan one stage of a rank from its transfers: passing, across, direct and relayed ones."""
    received = [_select(x, x.receiver == rank) for x in kinds]
    tokens = [0, *itertools.accumulate(int(x.length.sum()) for x in received)]
    passing, across, direct, relayed = (
        _messages(*of_kind, rank) for of_kind in zip(kinds, received, tokens, strict=False)
    )
    keys = np.concatenate([np.column_stack([x.start, x.length]) for x in received[1:]])
    return Stage(
        Messages(passing.sends + across.sends, passing.receives + across.receives),
        direct,
        relayed,
        passing=tokens[1],
        tokens_across=tokens[2],
        tokens=tokens[-1],
        plan=op.prepare(world.key_subset(rank, keys)) if len(keys) else None,
    )


def _messages(transfers: KeyTransfers, received: KeyTransfers, offset: int, rank: int) -> Messages:
    """The messages of one kind; what is received lies in the buffer from ``offset`` on."""
    if not len(transfers.stage):
        return Messages()
    sent = _select(transfers, transfers.owner == rank)
    sends: dict[int, list[tuple[int, int]]] = {}
    for receiver, start, n in zip(
        sent.receiver.tolist(), sent.local.tolist(), sent.length.tolist(), strict=True
    ):
        sends.setdefault(receiver, []).append((start, n))
    counts = np.bincount(received.owner, weights=received.length).astype(int)
    first = offset + np.cumsum(counts) - counts
    owners = np.flatnonzero(counts)
    return Messages(
        tuple((receiver, tuple(runs)) for receiver, runs in sends.items()),
        tuple(zip(owners.tolist(), first[owners].tolist(), counts[owners].tolist(), strict=True)),
    )


def _by_stage(transfers: KeyTransfers, stages: int) -> list[KeyTransfers]:
    """The transfers of each stage; they are sorted by stage."""
    bounds = np.searchsorted(transfers.stage, np.arange(stages + 1)).tolist()
    return [
        KeyTransfers(*(column[first:last] for column in transfers))
        for first, last in itertools.pairwise(bounds)
    ]


def _select(transfers: KeyTransfers, condition: Any) -> KeyTransfers:
    """The transfers for which a condition holds."""
    return transfers.select(np.flatnonzero(condition)) if len(condition) else transfers
