"""Keys that cross the slow link once per node: a relay receives them and passes them on inside.

Every rank has a network interface of its own.  The relay of a key is one of the ranks of the node
that need it, chosen so that these receive equally much from other nodes; only where one of them
would receive more than the mean rank of the node that receives most, others help.  Where that
leaves a choice, ranks at the same position of their nodes exchange keys.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cpbench.masks.slices import BoolArray, IntArray, ragged_indices
from cpbench.parallel.kv_requirements import (
    KeyTransfers,
    TransfersByRank,
    choose_stages,
    required_transfers,
    split_into_stages,
)

if TYPE_CHECKING:
    from cpbench.parallel.world import World


class GroupCast(NamedTuple):
    """The transfers of all ranks.

    Attributes:
        direct: from owners to the ranks that need the keys.
        across: from owners to relays in other nodes that need the keys.
        passing: from owners to relays in other nodes that do not.
        relayed: from relays to the other ranks of their nodes that need the keys.  A relay holds
            those of ``passing``, then those of ``across``.
    """

    direct: KeyTransfers
    across: KeyTransfers
    passing: KeyTransfers
    relayed: KeyTransfers

    @property
    def stages(self) -> int:
        """The number of stages."""
        return 1 + max(int(transfers.stage.max(initial=-1)) for transfers in self)


class RankedCast(NamedTuple):
    """A :class:`GroupCast`, to look up the transfers of a rank.

    Attributes:
        stages: the number of stages.
        by_node: whether any rank receives keys through a relay.
    """

    stages: int
    by_node: bool
    direct: TransfersByRank
    across: TransfersByRank
    passing: TransfersByRank
    relayed: TransfersByRank


@functools.lru_cache(maxsize=8)  # shared by all ranks of a trace
def rank_transfers(world: World, stages: int, by_node: bool) -> RankedCast:
    """:func:`plan_transfers`, by rank."""
    cast = plan_transfers(world, stages, by_node)
    relays = len(cast.across.stage) + len(cast.passing.stage) > 0
    by_rank = (TransfersByRank(transfers, world.size) for transfers in cast)
    return RankedCast(cast.stages, relays, *by_rank)


def plan_transfers(world: World, stages: int, by_node: bool) -> GroupCast:
    """All transfers between the ranks of a world.

    Args:
        stages: the number of stages in which a rank receives its keys, or (``by_node``) those from
            other nodes; 0 chooses it.
        by_node: send keys once to each other node, instead of to every rank that needs them.
    """
    required = required_transfers(world.shared_mask, world.queries, world.keys)
    per_node = world.ranks_per_node
    crosses = required.receiver // per_node != required.owner // per_node
    crosses &= by_node and per_node > 1
    direct, across = (required.select(np.flatnonzero(x)) for x in (~crosses, crosses))
    if not crosses.any():
        count = stages or choose_stages(world, required)
        direct, _ = split_into_stages(required, count, world.size)
        return GroupCast(direct, across, across, across)
    across, needs = _pieces(across, per_node)
    across, needs = _choose_relays(across, needs, per_node, world.size)
    count = stages or choose_stages(world, across)
    across, source = split_into_stages(across, count, world.size)
    direct, _ = split_into_stages(direct, count + 1, world.size)
    across, needs = across._replace(stage=across.stage + 1), needs[source]
    needed = needs[np.arange(len(needs)), across.receiver % per_node]
    order = np.lexsort((needed, across.receiver, across.stage))
    across, needs, needed = across.select(order), needs[order], needed[order]
    return GroupCast(
        direct,
        _merged(across.select(np.flatnonzero(needed))),
        _merged(across.select(np.flatnonzero(~needed))),
        _merged(_relayed(across, needs, per_node)),
    )


def _pieces(crossing: KeyTransfers, per_node: int) -> tuple[KeyTransfers, BoolArray]:
    """Cut transfers to other nodes where the set of ranks of a node that need the keys changes.

    Returns:
        The pieces, once per node, with the first rank of the node as receiver; and whether each of
        its ranks needs them, ``(n, per_node)``.
    """
    span = np.int64((crossing.start + crossing.length).max() + 1)
    begin = crossing.receiver // per_node * span + crossing.start
    edges = np.unique(np.concatenate([begin, begin + crossing.length]))
    first = np.searchsorted(edges, begin)
    transfer, nth = ragged_indices(np.searchsorted(edges, begin + crossing.length) - first)
    piece = first[transfer] + nth
    needs = np.zeros((len(edges), per_node), dtype=np.bool_)
    needs[piece, crossing.receiver[transfer] % per_node] = True
    pieces, of_piece = np.unique(piece, return_index=True)
    transfer = transfer[of_piece]
    start = edges[pieces] % span
    cut = crossing.select(transfer)._replace(
        receiver=edges[pieces] // span * per_node,
        start=start,
        length=edges[pieces + 1] - edges[pieces],
        local=crossing.local[transfer] + start - crossing.start[transfer],
    )
    return cut, needs[pieces]


def _choose_relays(
    pieces: KeyTransfers, needs: BoolArray, per_node: int, size: int
) -> tuple[KeyTransfers, BoolArray]:
    """Distribute pieces over the ranks that need them: as before, with relays as receivers.

    Pieces of one node that the same ranks need are a group.  Every group is divided into one share
    per rank, and its pieces, sorted by the position of their owners in their nodes, are cut where
    the shares meet.
    """
    keys = np.column_stack([pieces.receiver // per_node, np.packbits(needs, axis=1)])
    groups, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.lexsort((pieces.start, pieces.owner, pieces.owner % per_node, group))
    pieces, needs, group = pieces.select(order), needs[order], group[order]
    members = needs[np.searchsorted(group, np.arange(len(groups)))]
    amount = np.bincount(group, weights=pieces.length).astype(np.int64)
    shares = _balanced_shares(groups[:, 0], members, amount, size)
    # All groups, and all shares, one after another on one axis.
    end, share_end = np.cumsum(pieces.length), np.cumsum(shares)
    edges = np.unique(np.concatenate([[0], end, share_end]))
    begin = edges[:-1]
    source = np.searchsorted(end, begin, side="right")
    relay = np.searchsorted(share_end, begin, side="right") % per_node
    skipped = begin - (end - pieces.length)[source]
    cut = pieces.select(source)
    cut = cut._replace(
        receiver=cut.receiver + relay,
        start=cut.start + skipped,
        length=np.diff(edges),
        local=cut.local + skipped,
    )
    return cut, needs[source]


def _balanced_shares(node: IntArray, members: BoolArray, amount: IntArray, size: int) -> IntArray:
    """Divide the keys of every group among its members, so that the sums of the ranks of a node
    become equal as far as possible; what would exceed the mean sum of the node with the most keys
    is divided among all its ranks.

    Args:
        node: ``(groups,)``; members: ``(groups, ranks of a node)``; amount: ``(groups,)`` keys.

    Returns:
        ``(groups, ranks of a node)`` keys.
    """
    per_node = members.shape[1]
    total = np.bincount(node, weights=amount)
    ranks = np.minimum(size - np.arange(len(total)) * per_node, per_node)
    limit = int(np.ceil((total / ranks).max()))
    exists = np.arange(per_node) < ranks[:, None]
    shares = np.zeros(members.shape, dtype=np.int64)
    sums = np.zeros((len(total), per_node), dtype=np.int64)
    order = np.lexsort((members.sum(1), node))  # few members first
    turn = np.arange(len(order)) - np.searchsorted(node[order], node[order])
    for among in (members, exists[node]):
        for i in range(int(turn.max()) + 1):  # one group of every node that has so many
            groups = order[turn == i]
            nodes = node[groups]
            rest = amount[groups] - shares[groups].sum(1)
            added = _raise_lowest(sums[nodes], among[groups], rest)
            added = np.clip(added, 0, np.maximum(limit - sums[nodes], 0))
            shares[groups] += added
            sums[nodes] += added
    return shares


def _raise_lowest(sums: IntArray, members: BoolArray, amount: IntArray) -> IntArray:
    """What to add to the lowest sums of the members in each row, so that they become equal and the
    additions are ``amount`` in total; ``(n, ranks)``."""
    rows = np.arange(len(sums))
    height = np.where(members, sums, np.iinfo(np.int64).max // (2 * sums.shape[1]))
    ascending = np.sort(height, axis=1)
    raised = np.arange(1, sums.shape[1] + 1)  # so many are raised to one level
    level = (amount[:, None] + np.cumsum(ascending, axis=1)) / raised
    above = np.column_stack([ascending[:, 1:], np.full(len(sums), np.inf)])
    level = level[rows, np.argmax(level <= above, axis=1)]
    added = np.where(members, np.maximum(np.floor(level[:, None]) - sums, 0), 0).astype(np.int64)
    missing = amount - added.sum(1)  # less than one for each that is raised
    lowest = members & (sums <= level[:, None])
    added += lowest & (np.cumsum(lowest, axis=1) <= missing[:, None])
    return added


def _relayed(across: KeyTransfers, needs: BoolArray, per_node: int) -> KeyTransfers:
    """The transfers from relays to the other ranks that need the keys, in order.

    Args:
        across: sorted by stage and relay: in the order in which a relay holds them.
    """
    new_buffer = np.append(True, np.diff(across.stage) | np.diff(across.receiver)) != 0
    before = np.cumsum(across.length) - across.length
    offset = before - before[np.flatnonzero(new_buffer)][np.cumsum(new_buffer) - 1]
    source, position = np.nonzero(needs)
    receiver = across.receiver[source] // per_node * per_node + position
    relayed = across.select(source)
    relayed = relayed._replace(receiver=receiver, owner=relayed.receiver, local=offset[source])
    relayed = relayed.select(np.flatnonzero(relayed.receiver != relayed.owner))
    keys = (relayed.local, relayed.owner, relayed.receiver, relayed.stage)
    return relayed.select(np.lexsort(keys))


def _merged(transfers: KeyTransfers) -> KeyTransfers:
    """Merge consecutive transfers that continue each other."""
    stage, receiver, owner, start, length, local = transfers
    new = np.ones(len(stage), dtype=np.bool_)
    new[1:] = (np.diff(stage) | np.diff(receiver) | np.diff(owner)) != 0
    new[1:] |= (np.diff(start) != length[:-1]) | (np.diff(local) != length[:-1])
    first = np.flatnonzero(new)
    total = np.concatenate([[0], np.cumsum(length)])
    length = np.diff(total[np.append(first, len(stage))])
    return transfers.select(first)._replace(length=length)
