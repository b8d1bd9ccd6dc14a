"""A batch that is decoded: sequences of unequal lengths, whose keys lie in pages of a cache.

The cache is one run of slots, cut into pages of ``page_size``; a page belongs to one sequence or to
none, and pages lie in any order.  So decoding is attention of B queries, one per sequence, to the
slots of the cache, under a mask of a slice for each page: operators and strategies that know
nothing of pages compute it too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from cpbench import masks
from cpbench.core.problem import Case, cache_slots
from cpbench.core.spec import Spec
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import IntArray

ORDER_SEED = 0  # of the order of pages


@dataclass(frozen=True)
class PagedBatch:
    """The sequences of a batch, and where their keys lie.

    Attributes:
        key_lens: keys of each sequence, of which the query is the last token.
        page_size: slots of a page.
    """

    key_lens: tuple[int, ...]
    page_size: int

    @classmethod
    def of_case(cls, case: Case) -> PagedBatch:
        """The batch of a case of phase ``decode``."""
        return cls(case.lengths, case.page_size)

    @property
    def slots(self) -> int:
        """Slots of the cache, those of spare pages included."""
        return cache_slots(self.key_lens, self.page_size)

    @functools.cached_property
    def first_pages(self) -> IntArray:
        """``[B + 1]``: the number of pages of the sequences before."""
        counts = -(-np.array(self.key_lens, np.int64) // self.page_size)
        return np.append(0, np.cumsum(counts))

    @functools.cached_property
    def table(self) -> IntArray:
        """The page of the cache of every page of every sequence, one after another."""
        order = np.random.default_rng(ORDER_SEED).permutation(self.slots // self.page_size)
        return order[: self.first_pages[-1]].astype(np.int64)

    def slots_of(self, sequence: int) -> IntArray:
        """``[L]``: the slot of each key of a sequence."""
        pages = self.table[self.first_pages[sequence] : self.first_pages[sequence + 1]]
        slots = pages[:, None] * self.page_size + np.arange(self.page_size)
        return slots.reshape(-1)[: self.key_lens[sequence]]

    @functools.cached_property
    def positions(self) -> IntArray:
        """``[slots]``: the position in its sequence of the key in each slot, 0 where none is."""
        positions = np.zeros(self.slots, np.int64)
        for sequence, tokens in enumerate(self.key_lens):
            positions[self.slots_of(sequence)] = np.arange(tokens)
        return positions

    @functools.cached_property
    def owners(self) -> IntArray:
        """``[slots]``: the sequence of the key in each slot, -1 where none is."""
        owners = np.full(self.slots, -1, np.int64)
        for sequence in range(len(self.key_lens)):
            owners[self.slots_of(sequence)] = sequence
        return owners

    def visible(self, pattern: Spec, sequence: int) -> AttnMask:
        """What the query of a sequence sees of its keys, ``1 x L``: the last row of a mask.

        Raises:
            ValueError: for a mask that differs from head to head.
        """
        tokens = self.key_lens[sequence]
        return masks.build(pattern, tokens).crop(tokens - 1, tokens, 0, tokens)

    def mask(self, pattern: Spec) -> AttnMask:
        """The mask of B queries and all slots, a slice for each run of visible keys in a page.

        Raises:
            ValueError: for a mask that differs from head to head.
        """
        return _mask(self, pattern)


@functools.lru_cache(maxsize=8)
def _mask(batch: PagedBatch, pattern: Spec) -> AttnMask:
    size, parts = batch.page_size, []
    for b in range(len(batch.key_lens)):
        slices = batch.visible(pattern, b).slices
        begin = np.maximum(slices[:, 2], slices[:, 4])
        end = np.minimum(slices[:, 3], slices[:, 5] + 1)
        count = (end - 1) // size - begin // size + 1
        run = np.repeat(np.arange(len(slices)), count)
        page = begin[run] // size + np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
        low, high = np.maximum(begin[run], page * size), np.minimum(end[run], (page + 1) * size)
        shift = (batch.table[batch.first_pages[b] + page] - page) * size
        low, high = low + shift, high + shift
        row = np.full_like(low, b)
        parts.append(np.column_stack([row, row + 1, low, high, low - b, high - 1 - b]))
    return AttnMask.from_slices(len(batch.key_lens), batch.slots, np.concatenate(parts))
