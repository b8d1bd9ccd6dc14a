"""Ranks that stand for all: one of each class of alike ranks, found from the world alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from cpbench.masks.slices import IntArray, cut_axis
from cpbench.parallel.layout import area_matrix

if TYPE_CHECKING:
    from cpbench.masks.attn_mask import AttnMask
    from cpbench.parallel.layout import Layout
    from cpbench.parallel.world import World

MOST = 16  # classes that are told apart; beyond, ranks of nearly equal work are one class
MOST_EVEN = 8  # of a mask of one slice, such as causal, that the layout divides evenly
EVEN = 1.01  # max/mean of visible pairs


def rank_classes(world: World) -> IntArray:
    """The class of each rank, ``(P,)``, numbered in the order of ranks.

    Alike are ranks in the same place of their nodes that compute the same rectangles of equal area
    with the ranks at every distance before and behind them, as queries and as keys.
    """
    return _rank_classes(world.shared_mask, world.queries, world.keys, world.ranks_per_node)


@functools.lru_cache(maxsize=8)  # shared by all strategies and placements
def _rank_classes(mask: AttnMask, queries: Layout, keys: Layout, per_node: int) -> IntArray:
    size = keys.world_size
    nodes = np.arange(size) % per_node
    ahead = (np.arange(size)[:, None] + np.arange(size)[None, :]) % size
    own = np.arange(size)[:, None]
    features = [nodes[:, None]]
    for table in (area_matrix(mask, queries, keys), *_hulls(mask, queries, keys)):
        features += [table[own, ahead], table[ahead, own]]
    numbers: dict[bytes, int] = {}
    rows = (row.tobytes() for row in np.concatenate(features, axis=1))
    return np.array([numbers.setdefault(row, len(numbers)) for row in rows])


def representatives(world: World, most: int = 0) -> dict[int, int]:
    """Ranks to record, each with the number of ranks that it stands for.

    With more classes than ``most``, ranks are divided into that many groups by their visible pairs
    (those of equal work by their number).  Of the last one the rank with the most pairs is chosen,
    and of each one before it a rank at another place of its node, as long as there are any: ranks
    beside another node send and wait otherwise.

    Args:
        most: classes; 0 for ``MOST``, or ``MOST_EVEN`` of an even mask of one slice.
    """
    if not most:
        work = world.areas.sum(1)
        even = len(world.shared_mask.slices) <= 1 and work.max() <= EVEN * work.mean()
        most = MOST_EVEN if even else MOST
    classes = rank_classes(world)
    _, first, counts = np.unique(classes, return_index=True, return_counts=True)
    if len(first) <= most:
        return dict(sorted(zip(first.tolist(), counts.tolist(), strict=True)))
    by_work = np.lexsort((np.arange(world.size), world.areas.sum(1)))
    groups = np.array_split(by_work, most)
    busiest, per_node = int(by_work[-1]), world.ranks_per_node
    chosen = {}
    for i, group in enumerate(reversed(groups)):
        at_place = group[group % per_node == (busiest - i) % per_node]
        chosen[int((at_place if len(at_place) else group)[-1])] = len(group)
    return dict(sorted(chosen.items()))


def representative_nodes(world: World, most: int = MOST) -> dict[int, int]:
    """All ranks of a few nodes, for links that the ranks of a node share; each with the number of
    ranks that it stands for.

    Nodes are divided into groups by their visible pairs; of each the one with the most is chosen.
    """
    per_node = world.ranks_per_node
    work = world.areas.sum(1).reshape(-1, per_node).sum(1)
    by_work = np.lexsort((np.arange(len(work)), work))
    groups = np.array_split(by_work, max(1, min(most // per_node, len(work))))
    return {
        int(group[-1]) * per_node + place: len(group)
        for group in groups
        for place in range(per_node)
    }


def _hulls(mask: AttnMask, queries: Layout, keys: Layout) -> list[IntArray]:
    """Bounds of the visible pairs of every pair of ranks in local tokens, ``(P, P)`` each: first
    and last query, first and last key; none for striped layouts, whose bounds follow from areas."""
    if keys.step > 1:
        return []
    size = keys.world_size
    cut, _, part_q = cut_axis(mask.slices, queries.segments[:, 1:], axis=0)
    cut, source, part_k = cut_axis(cut, keys.segments[:, 1:], axis=1)
    part_q = part_q[source]
    pair = queries.segments[part_q, 0] * size + keys.segments[part_k, 0]
    shift_q = _local_shift(queries)[part_q]
    shift_k = _local_shift(keys)[part_k]
    hulls = []
    for column, shift, reduce, start in (
        (0, shift_q, np.minimum, np.iinfo(np.int64).max), (1, shift_q, np.maximum, 0),
        (2, shift_k, np.minimum, np.iinfo(np.int64).max), (3, shift_k, np.maximum, 0),
    ):  # fmt: skip
        bounds = np.full(size * size, start, np.int64)
        reduce.at(bounds, pair, cut[:, column] + shift)
        hulls.append(bounds.reshape(size, size))
    return hulls


def _local_shift(layout: Layout) -> IntArray:
    """What to add to a position in each segment to get the local token."""
    lengths = layout.segments[:, 2]
    local = np.cumsum(lengths) - lengths - layout.segments[:, 0] * layout.local_len
    return np.asarray(local - layout.segments[:, 1], np.int64)
