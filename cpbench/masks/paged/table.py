"""Page tables of masks of decoding, for kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import IntArray


@dataclass(frozen=True, eq=False)
class PageTable:
    """The pages that each query sees, sequence by sequence.

    Attributes:
        page_size: slots of a page.
        indptr: ``[B + 1]``: where the pages of each query begin.
        pages, first, count: ``[n]``: a page, its first visible slot, and how many are visible; of
            each query whole pages come first.
    """

    page_size: int
    indptr: IntArray
    pages: IntArray
    first: IntArray
    count: IntArray

    @classmethod
    def of(cls, mask: AttnMask, page_size: int) -> PageTable:
        """The table of a mask between queries and the slots of a cache."""
        q0, q1, k0, k1, lo, hi = mask.slices.T
        source = np.repeat(np.arange(len(q0)), q1 - q0)
        row = q0[source] + np.arange(len(source)) - np.repeat(np.cumsum(q1 - q0) - q1 + q0, q1 - q0)
        begin = np.maximum(k0[source], row + lo[source])
        end = np.minimum(k1[source], row + hi[source] + 1)
        number = (end - 1) // page_size - begin // page_size + 1
        run = np.repeat(np.arange(len(row)), number)
        page = begin[run] // page_size + np.arange(len(run))
        page -= np.repeat(np.cumsum(number) - number, number)
        low = np.maximum(begin[run], page * page_size)
        count = np.minimum(end[run], (page + 1) * page_size) - low
        order = np.lexsort((page, count < page_size, row[run]))
        indptr = np.searchsorted(row[run][order], np.arange(mask.seq_q + 1))
        first = low - page * page_size
        return cls(page_size, indptr, page[order], first[order], count[order])

    def of_query(self, b: int) -> slice:
        """Where the pages of a query are."""
        return slice(int(self.indptr[b]), int(self.indptr[b + 1]))

    def slots(self, b: int) -> IntArray:
        """The slots that a query sees, page by page."""
        own = self.of_query(b)
        count = self.count[own]
        start = self.pages[own] * self.page_size + self.first[own]
        return np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())

    def whole(self, b: int) -> int:
        """How many pages a query sees whole."""
        return int((self.count[self.of_query(b)] == self.page_size).sum())

    @property
    def largest(self) -> int:
        """Pages of the query with the most."""
        return int(np.diff(self.indptr).max(initial=0))

    def block_table(self) -> tuple[IntArray, IntArray, str | None]:
        """The form that libraries take: ``[B, pages]`` pages, padded with 0, and ``[B]`` keys, of
        which all pages but the last of a sequence are full; and why there is none, or None."""
        rows, lens = len(self.indptr) - 1, np.zeros(len(self.indptr) - 1, np.int64)
        table = np.zeros((rows, max(self.largest, 1)), np.int64)
        for b in range(rows):
            own = self.of_query(b)
            count = self.count[own]
            if (self.first[own] > 0).any() or (count[:-1] < self.page_size).any():
                return table, lens, "takes whole pages before the last, and this mask cuts some"
            table[b, : len(count)], lens[b] = self.pages[own], count.sum()
        return table, lens, None
