"""The keys that each rank requires from every other rank: the transfers of a group-cast.

A rank requires the keys that at least one of its queries sees; each is sent to it once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import IntArray, cut_axis, ragged_indices
from cpbench.parallel.layout import Layout

if TYPE_CHECKING:
    from cpbench.parallel.world import World

# Cost of merging a query's partial results, in visible keys: by the rates of ``h100-ib``, its bytes
# (head_dim 128, bfloat16) take as long as about 500.
MERGE_COST_PAIRS = 512


class KeyTransfers(NamedTuple):
    """Runs of keys to send between ranks; arrays ``(n,)``.

    Attributes:
        stage: the stage (0, 1, …) in which a run is sent.
        receiver, owner: ranks.
        start, length: the run, in tokens of the sequence.
        local: its offset among the owner's local tokens.
    """

    stage: IntArray
    receiver: IntArray
    owner: IntArray
    start: IntArray
    length: IntArray
    local: IntArray

    def select(self, index: IntArray) -> KeyTransfers:
        """The transfers at ``index``, in that order."""
        return KeyTransfers(*(column[index] for column in self))


class TransfersByRank:
    """Transfers between ``size`` ranks, and where those of each rank are."""

    def __init__(self, transfers: KeyTransfers, size: int) -> None:
        self._transfers = transfers
        self._sides = [_grouped(ranks, size) for ranks in (transfers.owner, transfers.receiver)]

    def of(self, rank: int) -> KeyTransfers:
        """The transfers that a rank sends or receives, in order."""
        index = [order[first[rank] : first[rank + 1]] for order, first in self._sides]
        return self._transfers.select(np.sort(np.concatenate(index)))


def _grouped(ranks: IntArray, size: int) -> tuple[IntArray, IntArray]:
    """The indices of ranks, those of rank 0 first, and where those of each rank begin."""
    order = np.argsort(ranks.astype(np.min_scalar_type(size)), kind="stable")  # a radix sort
    return order, np.concatenate([[0], np.cumsum(np.bincount(ranks, minlength=size))])


def required_transfers(mask: AttnMask, queries: Layout, keys: Layout) -> KeyTransfers:
    """The keys that each rank requires and does not hold, in one stage.

    Args:
        queries, keys: layouts of step 1.
    """
    assert queries.step == keys.step == 1
    cut, _, part = cut_axis(mask.slices, queries.segments[:, 1:], axis=0)
    span = np.int64(keys.padded_len + 1)  # keys of rank r at offset r * span: one axis for all
    shift = queries.segments[part, 0] * span
    seen = _merge_intervals(cut[:, 2] + shift, cut[:, 3] + shift)
    receiver = seen[:, 0] // span
    start, end = seen[:, 0] - receiver * span, seen[:, 1] - receiver * span
    held = keys.segments
    local = np.cumsum(held[:, 2]) - held[:, 2] - held[:, 0] * keys.local_len
    order = np.argsort(held[:, 1], kind="stable")
    held, local = held[order], local[order]
    first = np.searchsorted(held[:, 1] + held[:, 2], start, side="right")
    last = np.searchsorted(held[:, 1], end, side="left")
    source, nth = ragged_indices(last - first)
    run = first[source] + nth
    begin = np.maximum(start[source], held[run, 1])
    length = np.minimum(end[source], held[run, 1] + held[run, 2]) - begin
    transfers = KeyTransfers(
        np.zeros_like(begin), receiver[source], held[run, 0], begin, length,
        local[run] + begin - held[run, 1],
    )  # fmt: skip
    return transfers.select(np.flatnonzero(transfers.receiver != transfers.owner))


def _merge_intervals(start: IntArray, end: IntArray) -> IntArray:
    """The union of intervals as ``(m, 2)`` disjoint ones, in order."""
    if not len(start):
        return np.zeros((0, 2), dtype=np.int64)
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    first = np.flatnonzero(np.append(True, start[1:] > end[:-1]))
    return np.column_stack([start[first], end[np.append(first[1:], len(end)) - 1]])


def split_into_stages(
    transfers: KeyTransfers, stages: int, size: int
) -> tuple[KeyTransfers, IntArray]:
    """Split transfers into stages with equally many keys per receiver.

    As in a ring, a receiver starts with the keys of the rank before it and continues downward, so
    that not all ranks receive from the same owner at once.

    Returns:
        The parts, sorted by stage, receiver, owner and start, and the transfer that each is of.
    """
    distance = (transfers.receiver - transfers.owner) % size
    order = np.lexsort((transfers.start, distance, transfers.receiver))
    transfers = transfers.select(order)
    total = np.bincount(transfers.receiver, weights=transfers.length, minlength=size)
    total = total.astype(np.int64)
    per_stage = np.maximum(-(-total // stages), 1)[transfers.receiver]
    before = np.cumsum(transfers.length) - transfers.length
    before -= (np.cumsum(total) - total)[transfers.receiver]
    last_stage = (before + transfers.length - 1) // per_stage
    source, nth = ragged_indices(last_stage - before // per_stage + 1)
    cut = transfers.select(source)
    per_stage, before = per_stage[source], before[source]
    stage = before // per_stage + nth
    skipped = np.maximum(stage * per_stage - before, 0)
    length = np.minimum((stage + 1) * per_stage, before + cut.length) - before - skipped
    cut = cut._replace(
        stage=stage, start=cut.start + skipped, length=length, local=cut.local + skipped
    )
    sorting = np.lexsort((cut.start, cut.owner, cut.receiver, cut.stage))
    return cut.select(sorting), order[source][sorting]


def best_stage_count(local_area: IntArray, area: IntArray, keys: IntArray, tokens: int) -> int:
    """The number of stages with the shortest step, if the rank that requires the most keys receives
    for as long as the mean rank computes: the case in which the number matters most.

    The keys of a stage are sent while the previous stage is computed, those of the first stage
    while the local keys are; every stage costs a merge.

    Args:
        local_area, area: ``(P,)`` visible pairs of the local keys, and of all keys.
        keys: ``(P,)`` number of keys that a rank receives.
        tokens: queries per rank.
    """
    if not keys.any():
        return 1
    transfer = area.mean() / keys.max() * keys
    merge = MERGE_COST_PAIRS * tokens
    best_time, best_count = np.inf, 1
    for stages in sorted({round(1.25**i) for i in range(24)}):
        receiving, computing = transfer / stages, (area - local_area) / stages + merge
        rank_times = np.maximum(local_area, receiving) + computing
        rank_times += (stages - 1) * np.maximum(computing, receiving)
        if rank_times.max() < best_time:
            best_time, best_count = rank_times.max(), stages
    return best_count


def choose_stages(world: World, transfers: KeyTransfers) -> int:
    """The best number of stages for these transfers between the ranks of a world."""
    keys = np.bincount(transfers.receiver, weights=transfers.length, minlength=world.size)
    local_area, area = np.diagonal(world.areas), world.areas.sum(1)
    return best_stage_count(local_area, area, keys.astype(np.int64), world.queries.local_len)


def min_keys_sent(
    mask: AttnMask, ranks: int, max_imbalance: float = 1.0, ranks_per_node: int = 1
) -> int:
    """A lower bound on the total number of keys sent, over all assignments of tokens whose load
    imbalance (max/mean area) is at most ``max_imbalance``; with ``ranks_per_node``, of keys sent to
    other nodes, where a key is sent to a node once.

    The queries that see a key occupy at least as many ranks (whole nodes of them) as keep them,
    with the lightest other tokens that fill up those ranks, within ``max_imbalance`` times the mean
    area; one of these ranks may hold the key.  O(S log P), and O(keys) for every slice.
    """
    local_len = -(-mask.seq_q // ranks)
    row_areas = np.zeros(ranks * local_len, dtype=np.int64)
    row_areas[: mask.seq_q] = mask.row_counts()
    total = np.concatenate([[0], np.cumsum(row_areas)])
    lightest = np.concatenate([[0], np.cumsum(np.sort(row_areas))])
    max_area = max_imbalance * float(total[-1]) / ranks
    if not total[-1]:
        return 0
    count, area = np.zeros(mask.seq_k, np.int64), np.zeros(mask.seq_k, np.int64)
    for q0, q1, k0, k1, lo, hi in mask.slices.tolist():
        key = np.arange(k0, k1)
        first, last = np.maximum(q0, key - hi), np.minimum(q1, key - lo + 1)
        count[k0:k1] += last - first
        area[k0:k1] += total[last] - total[first]
    low = np.maximum(-(-count // local_len), np.ceil(area / max_area - 1e-9).astype(np.int64))
    low = -(-low // ranks_per_node)  # nodes
    high = np.full_like(low, -(-ranks // ranks_per_node))
    while (searching := low < high).any():  # bisection over the number of nodes, for every key
        middle = (low + high) // 2
        held = np.minimum(middle * ranks_per_node, ranks)
        others = np.maximum(held * local_len - count, 0)
        enough = area + lightest[others] <= held * max_area * (1 + 1e-12)
        high = np.where(searching & enough, middle, high)
        low = np.where(searching & ~enough, middle + 1, low)
    return int(np.maximum(low - 1, 0).sum())
