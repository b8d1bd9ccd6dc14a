"""The tokens that are assigned: blocks of the mask, their areas, and how ranks exchange tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import BoolArray, IntArray, ragged_indices

CHUNKS_PER_RANK = 64  # granularity of the split into heavy and light tokens
IMBALANCE_TOLERANCE = 0.01  # relative to the mean area; below it no more tokens are swapped
SEARCH_WIDTH = 32  # short blocks that are tried to find one that fits


class TokenRun(NamedTuple):
    """A run of consecutive tokens."""

    start: int
    length: int


Assignment = list[list[TokenRun]]  # the runs of every rank


class ShortBlock(NamedTuple):
    """A block that fits on a rank, or several adjacent tiny ones."""

    tokens: int
    area: int
    start: int

    @property
    def density(self) -> float:
        return self.area / self.tokens


class TokenBlocks:
    """The tokens of a mask in its blocks, for so many ranks.

    Positions beyond the sequence are padding, which joins the last block.

    Attributes:
        ranks: P; local_len: tokens per rank.
        cumulative: visible pairs before each token, ``(P * local_len + 1,)``.
        starts: first tokens of the blocks, and the end.
        long: whether a block does not fit on a rank, by its tokens or by its area.
        chunk: tokens that are not told apart where speed matters.
    """

    def __init__(self, mask: AttnMask, ranks: int) -> None:
        self.ranks, self.local_len = ranks, -(-mask.seq_q // ranks)
        row_areas = np.zeros(ranks * self.local_len, np.int64)
        row_areas[: mask.seq_q] = mask.row_counts()
        self.cumulative: IntArray = np.concatenate([[0], np.cumsum(row_areas)])
        self.starts: IntArray = np.append(mask.diagonal_blocks(), len(row_areas))
        self.long: BoolArray = np.diff(self.starts) > self.local_len
        self.long |= np.diff(self.cumulative[self.starts]) * ranks > self.cumulative[-1]
        self.chunk = max(self.local_len // CHUNKS_PER_RANK, 1)

    @property
    def mean_area(self) -> float:
        """Visible pairs per rank."""
        return float(self.cumulative[-1]) / self.ranks

    def area_of(self, *runs: TokenRun) -> int:
        """Visible pairs of runs of tokens."""
        return sum(int(self.cumulative[start + n] - self.cumulative[start]) for start, n in runs)

    def imbalance(self, assigned: Assignment) -> float:
        """The largest area of a rank, relative to the mean."""
        return max(self.area_of(*runs) for runs in assigned) / self.mean_area

    def keys_sent(self, assigned: Assignment) -> int:
        """The number of keys that ranks require and do not hold, if all blocks are causal."""
        ranks = np.repeat(np.arange(self.ranks), [len(runs) for runs in assigned])
        runs = np.array([run for of_rank in assigned for run in of_rank])
        begin, end = runs[:, 0], runs.sum(1)
        first = np.searchsorted(self.starts, begin, side="right") - 1
        source, nth = ragged_indices(np.searchsorted(self.starts, end) - first)
        block = first[source] + nth
        begin = np.maximum(begin[source], self.starts[block])
        end = np.minimum(end[source], self.starts[block + 1])
        order = np.lexsort((end, block, ranks[source]))  # of one rank and block, the last end last
        part = ranks[source][order] * len(self.starts) + block[order]
        last = order[np.append(part[1:] != part[:-1], True)]
        seen = int((end[last] - self.starts[block[last]]).sum())
        return seen - int((end - begin).sum())

    def long_blocks(self) -> Iterable[tuple[int, int]]:
        """(start, end) of the long blocks."""
        start, end = self.starts[:-1][self.long], self.starts[1:][self.long]
        return zip(start.tolist(), end.tolist(), strict=True)

    def short_blocks(self) -> list[ShortBlock]:
        """The short blocks, in order; adjacent tiny ones that begin in one chunk are merged."""
        starts, long = self.starts, self.long
        tiny = np.diff(starts) < self.chunk
        follows = tiny[1:] & tiny[:-1] & (np.diff(starts[:-1] // self.chunk) == 0)
        first = np.flatnonzero(np.append(True, ~follows))
        begin, end = starts[first], np.append(starts[first[1:]], starts[-1])
        begin, end = begin[~long[first]], end[~long[first]]
        area = self.cumulative[end] - self.cumulative[begin]
        fields = zip((end - begin).tolist(), area.tolist(), begin.tolist(), strict=True)
        return [ShortBlock(*block_fields) for block_fields in fields]


def rebalance(
    blocks: TokenBlocks, assigned: Assignment, tolerance: float = IMBALANCE_TOLERANCE
) -> None:
    """Swap dense tokens of the rank with the most area for sparse ones of the rank with the
    least, while that helps: the last ranks get the remaining tokens, which may not balance."""
    areas = np.array([blocks.area_of(*runs) for runs in assigned], dtype=np.float64)
    mean = float(areas.mean())
    for _ in range(2 * blocks.ranks):
        most, least = int(areas.argmax()), int(areas.argmin())
        if areas[most] <= mean * (1 + tolerance):
            return
        dense = max(
            assigned[most], key=lambda run: blocks.area_of(TokenRun(run.start + run.length - 1, 1))
        )
        sparse = min(assigned[least], key=lambda run: blocks.area_of(TokenRun(run.start, 1)))
        count = _swap_count(blocks, dense, sparse, min(areas[most] - mean, mean - areas[least]))
        if not count:
            return
        dense_end = TokenRun(dense.start + dense.length - count, count)
        sparse_begin = TokenRun(sparse.start, count)
        dense_rest = TokenRun(dense.start, dense.length - count)
        sparse_rest = TokenRun(sparse.start + count, sparse.length - count)
        for rank, old, new in (
            (most, dense, (dense_rest, sparse_begin)),
            (least, sparse, (sparse_rest, dense_end)),
        ):
            assigned[rank].remove(old)
            assigned[rank] += [run for run in new if run.length]
            areas[rank] = blocks.area_of(*assigned[rank])


def _swap_count(blocks: TokenBlocks, dense: TokenRun, sparse: TokenRun, max_gain: float) -> int:
    """The number of tokens to swap between the end of ``dense`` and the beginning of
    ``sparse``: as many as gain area, up to a total of ``max_gain``."""
    end = dense.start + dense.length

    def gains(n: int) -> bool:
        sparse_token = TokenRun(sparse.start + n - 1, 1)
        return blocks.area_of(TokenRun(end - n, 1)) > blocks.area_of(sparse_token)

    def fits(n: int) -> bool:
        dense_area = blocks.area_of(TokenRun(end - n, n))
        return dense_area - blocks.area_of(TokenRun(sparse.start, n)) <= max_gain

    return largest_feasible(largest_feasible(min(dense.length, sparse.length), gains), fits)


def merge_adjacent(runs: list[TokenRun]) -> list[TokenRun]:
    """The runs in order, adjacent ones merged."""
    merged = list[TokenRun]()
    for run in sorted(runs):
        if merged and merged[-1].start + merged[-1].length == run.start:
            merged[-1] = TokenRun(merged[-1].start, merged[-1].length + run.length)
        else:
            merged.append(run)
    return merged


def largest_feasible(count: int, fits: Callable[[int], bool]) -> int:
    """The largest n up to ``count`` that fits, or 0; n fits only if all smaller ones do."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
