"""The masks between the queries of some ranks and the keys of others, in local coordinates."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import FEW, K0, IntArray, shifted, transposed
from cpbench.parallel.layout import Layout


def local_mask(
    mask: AttnMask, queries: Layout, q_ranks: Sequence[int], keys: Layout, k_ranks: Sequence[int]
) -> AttnMask:
    """The mask between the concatenated queries of ``q_ranks`` and keys of ``k_ranks``.

    Args:
        queries, keys: layouts of one name, of ``mask.seq_q`` and ``mask.seq_k`` tokens.
    """
    return _cut_out(mask, queries, q_ranks, keys, k_ranks).simplify()


def _cut_out(
    mask: AttnMask, queries: Layout, q_ranks: Sequence[int], keys: Layout, k_ranks: Sequence[int]
) -> AttnMask:
    """:func:`local_mask`, each of whose slices is between two ranks."""
    q_ranges = np.concatenate([queries.ranges(rank) for rank in q_ranks])
    k_ranges = np.concatenate([keys.ranges(rank) for rank in k_ranks])
    if queries.step == 1:
        return mask.restrict(q_ranges, k_ranges)
    padded_mask = AttnMask(queries.padded_len, keys.padded_len, mask.slices)
    submasks = [padded_mask.stride(queries.step, int(q), k_ranges[:, 0]) for q in q_ranges[:, 0]]
    if len(submasks) == 1:
        return submasks[0]
    local_len = int(q_ranges[0, 1])
    counts = [len(submask.slices) for submask in submasks]
    shift = np.repeat(np.arange(len(submasks)) * local_len, counts)
    slices = np.concatenate([submask.slices for submask in submasks])
    slices = shifted(slices, shift, np.zeros_like(shift))
    return AttnMask.from_slices(local_len * len(submasks), submasks[0].seq_k, slices)


class PairMasks:
    """The masks between the queries of one rank and the keys of another.

    Those of a rank with every other are cut out at once, as soon as a second one is asked for: the
    steps of a ring, of keys or of queries.  Equal ones are one object.

    Args:
        queries, keys: layouts of one name, of ``mask.seq_q`` and ``mask.seq_k`` tokens.
    """

    def __init__(self, mask: AttnMask, queries: Layout, keys: Layout) -> None:
        self._mask, self._queries, self._keys = mask, queries, keys
        self._asked = (-1, -1)
        self._known: dict[tuple[int, int], AttnMask] = {}

    def between(self, q_rank: int, k_rank: int) -> AttnMask:
        """:func:`local_mask` of two ranks."""
        pair = (q_rank, k_rank)
        if pair not in self._known:
            if pair == self._asked:  # again, and no other since
                return local_mask(self._mask, self._queries, [q_rank], self._keys, [k_rank])
            (last_q, last_k), self._asked = self._asked, pair
            mask, queries, keys = self._mask, self._queries, self._keys
            if q_rank == last_q:
                row = _with_all(mask, queries, q_rank, keys)
                self._known = {
                    (q_rank, k): _of_slices(queries.local_len, keys.local_len, slices)
                    for k, slices in enumerate(row)
                }
            elif k_rank == last_k:
                column = _with_all(mask.transpose(), keys, k_rank, queries)
                self._known = {
                    (q, k_rank): _of_slices(queries.local_len, keys.local_len, transposed(slices))
                    for q, slices in enumerate(column)
                }
            else:
                return local_mask(mask, queries, [q_rank], keys, [k_rank])
        return self._known[pair]


def _with_all(mask: AttnMask, queries: Layout, rank: int, keys: Layout) -> list[IntArray]:
    """The slices between the queries of one rank and the keys of each, in local coordinates."""
    slices = _cut_out(mask, queries, [rank], keys, range(keys.world_size)).slices
    owner = slices[:, K0] // keys.local_len
    order = np.argsort(owner, kind="stable")
    owner, slices = owner[order], slices[order]
    slices = shifted(slices, np.zeros_like(owner), -owner * keys.local_len)
    borders = np.searchsorted(owner, np.arange(keys.world_size + 1))
    return [slices[first:last] for first, last in itertools.pairwise(borders)]


def _of_slices(seq_q: int, seq_k: int, slices: IntArray) -> AttnMask:
    """A simplified mask; one of few slices is cached: the steps of a ring have few different
    masks."""
    if len(slices) > FEW:
        return AttnMask.from_slices(seq_q, seq_k, slices).simplify()
    return _of_few(seq_q, seq_k, slices.tobytes())


@functools.lru_cache(maxsize=1024)
def _of_few(seq_q: int, seq_k: int, rows: bytes) -> AttnMask:
    slices = np.frombuffer(rows, np.int64).reshape(-1, 6)
    return AttnMask.from_slices(seq_q, seq_k, slices).simplify()
