"""Which keys each rank needs of each other, exactly: what a group-cast sends.

A key is needed where some query of the rank sees it, and sent once however many do.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cpbench.masks.attn_mask import AttnMask, IntArray, cut_axis, expand
from cpbench.parallel.layout import Layout

if TYPE_CHECKING:
    from cpbench.parallel.world import World

MERGE_PAIRS = 64  # merging a query's partial results costs as much as this many visible keys


class Parcels(NamedTuple):
    """Runs of keys that go from rank to rank; arrays ``(n,)``.

    Attributes:
        stage: 0, 1, … in which it is sent.
        receiver, owner: ranks.
        start, length: of the run, in tokens of the sequence.
        local: its place among the owner's tokens.
    """

    stage: IntArray
    receiver: IntArray
    owner: IntArray
    start: IntArray
    length: IntArray
    local: IntArray

    def of(self, chosen: IntArray) -> Parcels:
        """Some of them, in the order given."""
        return Parcels(*(column[chosen] for column in self))


def needed(mask: AttnMask, queries: Layout, keys: Layout) -> Parcels:
    """The keys that each rank needs and does not hold, in one stage.

    Args:
        queries, keys: of step 1.
    """
    assert queries.step == keys.step == 1
    cut, _, part = cut_axis(mask.slices, queries.segments[:, 1:], axis=0)
    apart = np.int64(keys.padded_len + 1)  # an axis on which every rank sees keys of its own
    shift = queries.segments[part, 0] * apart
    seen = _union(cut[:, 2] + shift, cut[:, 3] + shift)
    receiver = seen[:, 0] // apart
    start, end = seen[:, 0] - receiver * apart, seen[:, 1] - receiver * apart
    held = keys.segments
    local = np.cumsum(held[:, 2]) - held[:, 2] - held[:, 0] * keys.local_len
    order = np.argsort(held[:, 1], kind="stable")
    held, local = held[order], local[order]
    first = np.searchsorted(held[:, 1] + held[:, 2], start, side="right")
    last = np.searchsorted(held[:, 1], end, side="left")
    source, nth = expand(last - first)
    run = first[source] + nth
    begin = np.maximum(start[source], held[run, 1])
    length = np.minimum(end[source], held[run, 1] + held[run, 2]) - begin
    found = Parcels(
        np.zeros_like(begin), receiver[source], held[run, 0], begin, length,
        local[run] + begin - held[run, 1],
    )  # fmt: skip
    return found.of(np.flatnonzero(found.receiver != found.owner))


def _union(start: IntArray, end: IntArray) -> IntArray:
    """``(m, 2)`` disjoint intervals, in order, that cover the same as some intervals."""
    if not len(start):
        return np.zeros((0, 2), dtype=np.int64)
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    first = np.flatnonzero(np.append(True, start[1:] > end[:-1]))
    return np.column_stack([start[first], end[np.append(first[1:], len(end)) - 1]])


def in_stages(parcels: Parcels, stages: int, size: int) -> Parcels:
    """The same in stages that bring each receiver equally many keys; sorted by stage, receiver,
    owner and start.

    A receiver starts with the keys of the rank before it and goes on downward, as a ring does, so
    that not all ask the same owner at once.
    """
    far = (parcels.receiver - parcels.owner) % size
    parcels = parcels.of(np.lexsort((parcels.start, far, parcels.receiver)))
    total = np.bincount(parcels.receiver, weights=parcels.length, minlength=size).astype(np.int64)
    each = np.maximum(-(-total // stages), 1)[parcels.receiver]
    before = np.cumsum(parcels.length) - parcels.length
    before -= (np.cumsum(total) - total)[parcels.receiver]
    source, nth = expand((before + parcels.length - 1) // each - before // each + 1)
    cut = parcels.of(source)
    each, before = each[source], before[source]
    stage = before // each + nth
    skipped = np.maximum(stage * each - before, 0)
    length = np.minimum((stage + 1) * each, before + cut.length) - before - skipped
    cut = Parcels(stage, cut.receiver, cut.owner, cut.start + skipped, length, cut.local + skipped)
    return cut.of(np.lexsort((cut.start, cut.owner, cut.receiver, cut.stage)))


def best_stages(local_area: IntArray, area: IntArray, keys: IntArray, tokens: int) -> int:
    """The number of stages for which a step is shortest if the transfer of the rank that needs the
    most keys takes as long as the mean rank computes: where their number matters most.

    The keys of one stage travel while those before are computed, the first while the local part
    is; every stage after that costs a merge.

    Args:
        local_area, area: ``(P,)`` visible pairs of own keys, and of all keys.
        keys: ``(P,)`` that must come.
        tokens: queries of a rank.
    """
    if not keys.any():
        return 1
    transfer = area.mean() / keys.max() * keys
    merge = MERGE_PAIRS * tokens
    best, number = np.inf, 1
    for stages in sorted({round(1.25**i) for i in range(24)}):
        coming, computing = transfer / stages, (area - local_area) / stages + merge
        step = np.maximum(local_area, coming) + computing
        step = (step + (stages - 1) * np.maximum(computing, coming)).max()
        if step < best:
            best, number = step, stages
    return number


def least_keys(mask: AttnMask, ranks: int, balance: float = 1.0) -> int:
    """A lower bound on the keys that all ranks together must be sent, however tokens are dealt, if
    no rank is to have more than ``balance`` times the mean area.

    The queries that see one key need at least so many ranks that all of them, and the lightest
    other tokens that fill those ranks up, stay below ``balance`` times the mean area; one of the
    ranks may hold the key.  O(S log P), and O(keys) for every slice.

    Args:
        balance: largest area of a rank over the mean area.
    """
    each = -(-mask.seq_q // ranks)
    seen = np.zeros(ranks * each, dtype=np.int64)
    seen[: mask.seq_q] = mask.row_counts()
    total = np.concatenate([[0], np.cumsum(seen)])
    lightest = np.concatenate([[0], np.cumsum(np.sort(seen))])
    most = balance * float(total[-1]) / ranks
    if not total[-1]:
        return 0
    count, area = np.zeros(mask.seq_k, np.int64), np.zeros(mask.seq_k, np.int64)
    for q0, q1, k0, k1, lo, hi in mask.slices.tolist():
        key = np.arange(k0, k1)
        first, last = np.maximum(q0, key - hi), np.minimum(q1, key - lo + 1)
        count[k0:k1] += last - first
        area[k0:k1] += total[last] - total[first]
    low = np.maximum(-(-count // each), np.ceil(area / most - 1e-9).astype(np.int64))
    high = np.full_like(low, ranks)
    while (open_ := low < high).any():
        middle = (low + high) // 2
        others = np.maximum(middle * each - count, 0)
        enough = area + lightest[others] <= middle * most * (1 + 1e-12)
        high = np.where(open_ & enough, middle, high)
        low = np.where(open_ & ~enough, middle + 1, low)
    return int(np.maximum(low - 1, 0).sum())


@functools.lru_cache(maxsize=8)  # every rank of a trace asks for the same
def group_cast(world: World, stages: int) -> Parcels:
    """What every rank sends to every other in a world, in so many stages; 0 for the best number."""
    found = needed(world.shared_mask, world.queries, world.keys)
    if not stages:
        keys = np.bincount(found.receiver, weights=found.length, minlength=world.size)
        areas = world.areas
        own = np.diagonal(areas)
        stages = best_stages(own, areas.sum(1), keys.astype(np.int64), world.queries.local_len)
    return in_stages(found, stages, world.size)
