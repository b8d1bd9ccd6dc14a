"""What one rank sends, receives and computes in each stage of a group-cast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.parallel.kv_requirements import KeyTransfers

if TYPE_CHECKING:
    from cpbench.masks.slices import IntArray
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
    stages = [_StageMessages() for _ in range(cast.stages)]
    for kind in ("passing", "across", "direct", "relayed"):
        _divide(getattr(cast, kind).of(rank), rank, kind, stages)
    subsets = world.key_subsets(rank, [stage.keys() for stage in stages])
    first = Stage(plan=op.prepare(local) if local.area else None)
    planned = (
        stage.planned(op.prepare(subset) if subset.keys.size else None)
        for stage, subset in zip(stages, subsets, strict=True)
    )
    return Plan((first, *planned), cast.by_node)


class _StageMessages:
    """The messages of one stage of a rank, while its transfers are read, kind after kind.

    Attributes:
        messages: by kind.
        received: by kind, runs of keys of the sequence, (start, length), in the order of the
            buffer; ends: where each kind ends in it.
    """

    def __init__(self) -> None:
        self.messages: dict[str, Messages] = {}
        self.received: dict[str, list[tuple[int, int]]] = {}
        self.ends: dict[str, int] = {}

    def keys(self) -> IntArray:
        """The keys that the rank itself needs, rows (start, length)."""
        needed = [run for kind, runs in self.received.items() if kind != "passing" for run in runs]
        return np.array(needed, dtype=np.int64).reshape(-1, 2)

    def planned(self, plan: Any) -> Stage:
        """The stage, with the plan of its operator."""
        passing, across = self.messages["passing"], self.messages["across"]
        return Stage(
            Messages(passing.sends + across.sends, passing.receives + across.receives),
            self.messages["direct"],
            self.messages["relayed"],
            passing=self.ends["passing"],
            tokens_across=self.ends["across"],
            tokens=self.ends["relayed"],
            plan=plan,
        )


def _divide(transfers: KeyTransfers, rank: int, kind: str, stages: list[_StageMessages]) -> None:
    """Add the transfers of one kind to stages; those from one rank to another in a stage are in the
    order of the receiver's buffer."""
    sends: list[dict[int, list[tuple[int, int]]]] = [{} for _ in stages]
    counts: list[dict[int, int]] = [{} for _ in stages]  # of keys, by owner
    received: list[list[tuple[int, int]]] = [[] for _ in stages]
    columns = (column.tolist() for column in transfers)
    for stage, receiver, owner, start, length, local in zip(*columns, strict=True):
        if owner == rank:
            runs = sends[stage].setdefault(receiver, [])
            if runs and sum(runs[-1]) == local:  # adjacent runs are sent as one, uncopied
                runs[-1] = runs[-1][0], runs[-1][1] + length
            else:
                runs.append((local, length))
        if receiver == rank:
            counts[stage][owner] = counts[stage].get(owner, 0) + length
            received[stage].append((start, length))
    for stage, sent, by_owner, runs in zip(stages, sends, counts, received, strict=True):
        end, receives = max(stage.ends.values(), default=0), list[tuple[int, int, int]]()
        for owner, n in by_owner.items():
            receives.append((owner, end, n))
            end += n
        sent_runs = tuple((receiver, tuple(runs)) for receiver, runs in sent.items())
        stage.messages[kind] = Messages(sent_runs, tuple(receives))
        stage.received[kind], stage.ends[kind] = runs, end
