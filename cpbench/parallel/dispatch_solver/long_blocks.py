"""Blocks of which many do not fit on a rank: each is spread over as few ranks as possible.

Tokens of a long block that see more keys than the average token are heavy, the others light.  Rank
by rank, tokens are taken from the end of the heaviest long block, balanced by light tokens: first
those at the beginning of the same block (whose keys the rank receives anyway), then whole short
blocks.  As heavy tokens lie above the average and light tokens below, a balanced assignment exists
for every rank, up to one token; and as the heaviest tokens are paired with the lightest, no block
is spread over more ranks than necessary.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque

import numpy as np

from cpbench.masks.slices import IntArray
from cpbench.parallel.dispatch_solver.tokens import (
    SEARCH_WIDTH,
    Assignment,
    ShortBlock,
    TokenBlocks,
    TokenRun,
    largest_feasible,
    rebalance,
)


def assign_long(blocks: TokenBlocks) -> Assignment:
    """Assign all tokens; the areas of ranks differ by few tokens."""
    return _Solver(blocks).assignment()


class _TokenPool:
    """Unassigned tokens of one block, taken from either end.

    Args:
        cumulative: visible pairs before each token of the sequence.
        runs: (start, end) of the tokens, in order.
    """

    def __init__(self, cumulative: IntArray, runs: list[tuple[int, int]]) -> None:
        self._cumulative, self._runs = cumulative, deque(runs)
        self.count = sum(end - start for start, end in runs)

    def area(self, count: int, high: bool = False) -> int:
        """The area of ``count`` tokens from one end, or of all if there are fewer."""
        total = 0
        for start, end in reversed(self._runs) if high else self._runs:
            n = min(count, end - start)
            first = end - n if high else start
            total += int(self._cumulative[first + n] - self._cumulative[first])
            count -= n
            if not count:
                break
        return total

    def take(self, count: int, high: bool = False) -> list[TokenRun]:
        """Remove ``count`` tokens from one end."""
        runs = []
        self.count -= count
        while count:
            start, end = self._runs.pop() if high else self._runs.popleft()
            n = min(count, end - start)
            count -= n
            runs.append(TokenRun(end - n if high else start, n))
            if n < end - start and high:
                self._runs.append((start, end - n))
            elif n < end - start:
                self._runs.appendleft((start + n, end))
        return runs


class _RankShare:
    """The tokens assigned to one rank, and the tokens and area that it still needs."""

    def __init__(self, tokens: int, area: float) -> None:
        self.tokens, self.area, self.runs = tokens, area, list[TokenRun]()

    def add(self, pool: _TokenPool, count: int, high: bool = False) -> None:
        self.area -= pool.area(count, high)
        self.tokens -= count
        self.runs += pool.take(count, high)

    def add_block(self, block: ShortBlock) -> None:
        self.area -= block.area
        self.tokens -= block.tokens
        self.runs.append(TokenRun(block.start, block.tokens))

    def can_complete(self, heavy: _TokenPool, count: int, area: int) -> bool:
        """Whether heavy tokens can supply the remaining area after ``count`` light tokens."""
        remaining = self.tokens - count
        return remaining >= 0 and heavy.area(remaining, high=True) >= self.area - area

    def add_light(self, heavy: _TokenPool, pool: _TokenPool) -> bool:
        """Add light tokens while heavy ones can complete the rank; return whether all fit."""
        count = min(pool.count, self.tokens)
        count = largest_feasible(count, lambda n: self.can_complete(heavy, n, pool.area(n)))
        self.add(pool, count)
        return not pool.count


class _Solver:
    """The state of one assignment: the tokens that are still unassigned."""

    def __init__(self, blocks: TokenBlocks) -> None:
        self.blocks, self.cumulative = blocks, blocks.cumulative
        self.ranks, self.local_len = blocks.ranks, blocks.local_len
        # Long blocks with heavy and light tokens; pools of light tokens only.
        self.heavy, self.light = deque[tuple[_TokenPool, _TokenPool]](), deque[_TokenPool]()
        for start, end in blocks.long_blocks():
            heavy, light = self._split_heavy_light(start, end)
            if heavy.count:
                self.heavy.append((heavy, light))
            else:
                self.light.append(light)
        step = blocks.chunk
        densest = sorted(self.heavy, key=lambda pair: pair[0].area(step, high=True), reverse=True)
        self.heavy = deque(densest)
        self.short_blocks = deque(blocks.short_blocks())
        self.by_density = list[ShortBlock]()  # short blocks, once there are no heavy tokens

    def _split_heavy_light(self, start: int, end: int) -> tuple[_TokenPool, _TokenPool]:
        """The heavy and the light tokens of a block, classified in chunks."""
        edges = np.append(np.arange(start, end, self.blocks.chunk), end)
        mean = float(self.cumulative[-1]) / (len(self.cumulative) - 1)
        heavy = np.diff(self.cumulative[edges]) > mean * np.diff(edges)
        changes = np.flatnonzero(np.diff(heavy)) + 1
        bounds = edges[np.concatenate([[0], changes, [len(heavy)]])].tolist()
        runs = list(itertools.pairwise(bounds))
        first = 0 if heavy[0] else 1
        heavy_runs, light_runs = runs[first::2], runs[1 - first :: 2]
        return _TokenPool(self.cumulative, heavy_runs), _TokenPool(self.cumulative, light_runs)

    def assignment(self) -> Assignment:
        """Assign all tokens."""
        remaining_area, assigned = int(self.cumulative[-1]), list[list[TokenRun]]()
        for rank in range(self.ranks):
            share = _RankShare(self.local_len, remaining_area / (self.ranks - rank))
            while share.tokens and self.heavy:
                self._add_heavy(share)
            while share.tokens:
                self._add_light_or_short(share)
            assigned.append(share.runs)
            remaining_area -= self.blocks.area_of(*share.runs)
        rebalance(self.blocks, assigned)
        return assigned

    def _add_heavy(self, share: _RankShare) -> None:
        """Add the end of the heaviest block, after the light tokens that balance it; or all its
        remaining heavy tokens, if their area is too small."""
        heavy, own_light = self.heavy[0]
        if heavy.count < share.tokens:
            light_count = share.tokens - heavy.count
            light_area = self._estimate_light_area([own_light, *self.light], light_count)
            if heavy.area(heavy.count) + light_area < share.area:
                share.add(heavy, heavy.count, high=True)
        if heavy.count:
            if all(share.add_light(heavy, pool) for pool in (own_light, *self.light)):
                self._add_short_blocks(share, heavy)
            share.add(heavy, min(share.tokens, heavy.count), high=True)
        if not heavy.count:
            self.heavy.popleft()
            self.light.appendleft(own_light)
        self._drop_empty_pools()

    def _add_short_blocks(self, share: _RankShare, heavy: _TokenPool) -> None:
        """Add whole short blocks in sequence order while heavy tokens can complete the rank, then a
        part of one; where none are left, light tokens of later long blocks."""
        short_blocks = self.short_blocks
        if not short_blocks:
            all(share.add_light(heavy, pool) for pool in self._light_of_later_blocks())
            return
        skipped = list[ShortBlock]()
        while short_blocks and len(skipped) < SEARCH_WIDTH:
            block = short_blocks.popleft()
            if block.area <= share.area and share.can_complete(heavy, block.tokens, block.area):
                share.add_block(block)
            else:
                skipped.append(block)
        if skipped:
            skipped.sort()
            split_block = self._to_pool(skipped.pop(0))
            share.add_light(heavy, split_block)
            self.light.append(split_block)
        short_blocks.extendleft(sorted(skipped, key=lambda block: -block.start))

    def _add_light_or_short(self, share: _RankShare) -> None:
        """Add the rest of a split block, or else the short block whose density is nearest to what
        the rank needs."""
        self._drop_empty_pools()
        if self.light:
            share.add(self.light[0], min(share.tokens, self.light[0].count))
            return
        if self.short_blocks:
            self.by_density = sorted(self.short_blocks, key=lambda block: block.density)
            self.short_blocks.clear()
        blocks, density = self.by_density, share.area / share.tokens
        position = bisect.bisect(blocks, density, key=lambda block: block.density)
        near = range(max(position - SEARCH_WIDTH, 0), min(position + SEARCH_WIDTH, len(blocks)))
        fitting = [i for i in near if blocks[i].tokens <= share.tokens]
        block = blocks.pop(min(fitting or near, key=lambda i: abs(blocks[i].density - density)))
        if fitting:
            share.add_block(block)
        else:
            self.light.append(self._to_pool(block))

    def _to_pool(self, block: ShortBlock) -> _TokenPool:
        return _TokenPool(self.cumulative, [(block.start, block.start + block.tokens)])

    def _drop_empty_pools(self) -> None:
        while self.light and not self.light[0].count:
            self.light.popleft()

    def _light_of_later_blocks(self) -> list[_TokenPool]:
        """The light tokens of later long blocks, sparsest first."""
        later = itertools.islice(self.heavy, 1, None)
        return sorted((light for _, light in later), key=lambda light: light.area(1))

    def _estimate_light_area(self, pools: list[_TokenPool], count: int) -> float:
        """Estimate the area of the next ``count`` light tokens."""
        total = 0.0
        for pool in pools:
            n = min(pool.count, count)
            total, count = total + pool.area(n), count - n
            if not count:
                return total
        if self.short_blocks:
            return total + count * self.short_blocks[0].density
        return total + sum(light.area(count) for light in self._light_of_later_blocks()[:1])
