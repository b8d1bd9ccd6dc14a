"""Blocks of which each has room on a rank: whole ones, and few first tokens on other ranks.

1. Rank by rank, the block with the largest area is completed by blocks of the density that the rank
   needs.  Where even the sparsest ones would make the area too large, the fewest possible first
   tokens of the large block are left to another rank: in a causal block, only these are sent.
2. Ranks exchange blocks, one for another or for none, so that token counts become nearly equal and
   no area exceeds the limit; where that is not enough, a block is cut into two.
3. First tokens of a few blocks make token counts equal.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from cpbench.masks.slices import IntArray
from cpbench.parallel.dispatch_solver.tokens import (
    SEARCH_WIDTH,
    Assignment,
    TokenBlocks,
    TokenRun,
    largest_feasible,
    rebalance,
)

AREA_LIMITS = (1.015, 1.007)  # relative to the mean area, before token counts are equal
MAX_IMBALANCE = 1.02
AREA_WEIGHT = 8  # of area beyond the limit, in tokens of mean density
HELPS = 0.02  # part of the cost of a rank that an exchange saves, at least
NEAR = 100  # tokens: deviations beyond count quadratically
CLOSE = 1 / 512  # deviation of a token count, relative to it, that is not worth an exchange
PARTNERS = 8  # ranks with which a rank tries to exchange
EXCHANGES = 8  # per rank, at most
MOVED_FROM = 0.003  # area beyond the limit, relative to the mean area, for which tokens are moved
MOVED_MORE = 1.2  # area that is moved for each that is too much: other tokens take its place


class _Piece(NamedTuple):
    """A block, a part of one, or several adjacent tiny ones; pieces sort by density."""

    density: float
    start: int
    tokens: int
    area: int


def assign_whole(blocks: TokenBlocks) -> Assignment | None:
    """Assign all tokens; None if a block has more tokens than a rank, if there are fewer than two
    blocks per rank, or if no balance is found."""
    lengths = np.diff(blocks.starts)
    if lengths.max() > blocks.local_len or len(lengths) < 2 * blocks.ranks or not blocks.mean_area:
        return None
    found = list[Assignment]()
    for area_limit in AREA_LIMITS:
        limit = area_limit * blocks.mean_area
        held = _HeldPieces(blocks, _fill_ranks(blocks, limit), limit)
        held.exchange()
        while held.move_first_tokens():
            held.exchange()
        assigned = _equal_counts(blocks, held)
        balanced = blocks.imbalance(assigned) <= MAX_IMBALANCE
        if not balanced:
            rebalance(blocks, assigned, MAX_IMBALANCE - 1)
        if blocks.imbalance(assigned) <= MAX_IMBALANCE:
            found.append(assigned)
        if balanced:
            break
    if not found:
        return None
    assigned = min(found, key=blocks.keys_sent)
    return [assigned[rank] for rank in _sharing_first(blocks, assigned)]


class _Pool:
    """The pieces that no rank has yet, by density."""

    def __init__(self, pieces: Iterable[_Piece]) -> None:
        self.pieces = sorted(pieces)
        self._by_area = [(-piece.area, piece) for piece in self.pieces]
        heapq.heapify(self._by_area)

    def put(self, piece: _Piece) -> None:
        bisect.insort(self.pieces, piece)
        heapq.heappush(self._by_area, (-piece.area, piece))

    def take_largest(self) -> _Piece:
        """Take the piece with the largest area."""
        while True:
            _, piece = heapq.heappop(self._by_area)
            index = bisect.bisect_left(self.pieces, piece)
            if self.pieces[index : index + 1] == [piece]:  # it is still there
                return self.pieces.pop(index)

    def take_nearest(self, density: float, most_tokens: int) -> _Piece | None:
        """Take the piece with the nearest density of those that fit, or None."""
        position = bisect.bisect(self.pieces, (density,))
        near = self.pieces[max(position - SEARCH_WIDTH // 2, 0) : position + SEARCH_WIDTH // 2]
        fitting = [piece for piece in near if piece.tokens <= most_tokens]
        if not fitting:
            return None
        nearest = min(fitting, key=lambda piece: abs(piece.density - density))
        return self.pieces.pop(bisect.bisect_left(self.pieces, nearest))

    def sparsest(self, tokens: int) -> tuple[list[int], list[int]]:
        """Cumulative tokens and areas of the sparsest pieces, up to so many tokens."""
        counts, areas = [0], [0]
        for piece in self.pieces:
            if counts[-1] >= tokens:
                break
            counts.append(counts[-1] + piece.tokens)
            areas.append(areas[-1] + piece.area)
        return counts, areas


def _fill_ranks(blocks: TokenBlocks, limit: float) -> list[list[_Piece]]:
    """Step 1: the pieces of every rank, of which the last gets what is left."""

    def piece_of(start: int, tokens: int) -> _Piece:
        area = blocks.area_of(TokenRun(start, tokens))
        return _Piece(area / tokens, start, tokens, area)

    long = [piece_of(start, end - start) for start, end in blocks.long_blocks()]
    pool = _Pool([*long, *(piece_of(block.start, block.tokens) for block in blocks.short_blocks())])
    left_tokens, left_area = len(blocks.cumulative) - 1, int(blocks.cumulative[-1])
    ranks = list[list[_Piece]]()
    for rank in range(blocks.ranks - 1):
        chosen = list[_Piece]()
        ranks.append(chosen)
        if not pool.pieces:
            continue
        large = pool.take_largest()
        room, target = blocks.local_len - large.tokens, left_area / (blocks.ranks - rank)
        mean_density = (left_area - large.area) / max(left_tokens - large.tokens, 1)
        if large.area + room * mean_density > target:  # it needs sparse pieces, or is too large
            target = limit
            kept = _tokens_to_keep(blocks, large, limit, *pool.sparsest(blocks.local_len))
            if 0 < kept < large.tokens:
                first = large.tokens - kept
                pool.put(piece_of(large.start, first))
                large = piece_of(large.start + first, kept)
        next_piece: _Piece | None = large
        tokens, area = blocks.local_len, target
        while next_piece is not None:
            chosen.append(next_piece)
            tokens, area = tokens - next_piece.tokens, area - next_piece.area
            left_tokens, left_area = left_tokens - next_piece.tokens, left_area - next_piece.area
            next_piece = pool.take_nearest(area / tokens, tokens) if tokens else None
    return [*ranks, pool.pieces]


def _tokens_to_keep(
    blocks: TokenBlocks, large: _Piece, limit: float, counts: list[int], areas: list[int]
) -> int:
    """How many of the last tokens of a piece a rank can keep, completed by the sparsest pieces."""
    end = large.start + large.tokens

    def fits(kept: int) -> bool:
        others = np.interp(blocks.local_len - kept, counts, areas)
        return bool(blocks.area_of(TokenRun(end - kept, kept)) + others <= limit)

    return largest_feasible(large.tokens, fits)


class _HeldPieces:
    """Step 2: the pieces of all ranks.

    Attributes:
        holder, start, tokens, area: of each piece, ``(n,)``.
    """

    def __init__(self, blocks: TokenBlocks, filled: list[list[_Piece]], limit: float) -> None:
        pieces = np.array([piece[1:] for of_rank in filled for piece in of_rank], dtype=np.int64)
        self.blocks, self.limit = blocks, limit
        self.holder = np.repeat(np.arange(blocks.ranks), [len(of_rank) for of_rank in filled])
        self.start, self.tokens, self.area = pieces.T
        self._moves_left, self._exchanges_left = blocks.ranks, EXCHANGES * blocks.ranks

    def exchange(self) -> None:
        """Exchange pieces until all ranks are close enough, or nothing helps."""
        ranks = self.blocks.ranks
        count = np.bincount(self.holder, weights=self.tokens, minlength=ranks)
        load = np.bincount(self.holder, weights=self.area, minlength=ranks)
        finished = np.zeros(ranks, dtype=np.bool_)
        close = self._cost(self.blocks.local_len * (1 + CLOSE) + 1, 0)
        while self._exchanges_left:
            self._exchanges_left -= 1
            costs = self._cost(count, load)
            rank = int(np.where(finished, 0, costs).argmax())
            if finished[rank] or costs[rank] <= close:
                return
            partner = self._exchange_once(rank, count, load)
            finished[rank] = partner is None
            if partner is not None:
                finished[partner] = False

    def _cost(self, count: Any, load: Any) -> Any:
        """What deviations of a rank cost, given its tokens and its area."""
        blocks = self.blocks
        over = np.maximum(load - self.limit, 0) * blocks.local_len / blocks.mean_area
        deviation = np.abs(count - blocks.local_len) + AREA_WEIGHT * over
        return deviation * (1 + deviation / NEAR)

    def _exchange_once(self, rank: int, count: Any, load: Any) -> int | None:
        """Make the best exchange of a rank, if one helps, and update the sums; return the other."""
        partners = self._partners(rank, count, load)
        own = np.append(np.flatnonzero(self.holder == rank), -1)  # -1 is no piece
        is_partner = np.zeros(self.blocks.ranks, dtype=np.bool_)
        is_partner[partners] = True
        theirs = np.flatnonzero(is_partner[self.holder])
        other = np.append(self.holder[theirs], partners)
        theirs = np.append(theirs, np.full(len(partners), -1))
        more_tokens, more_area = (
            np.where(own < 0, 0, x[own])[:, None] - np.where(theirs < 0, 0, x[theirs])
            for x in (self.tokens, self.area)
        )
        change = self._cost(count[rank] - more_tokens, load[rank] - more_area)
        change += self._cost(count[other] + more_tokens, load[other] + more_area)
        change -= self._cost(count[other], load[other])
        best = np.unravel_index(change.argmin(), change.shape)
        if change[best] > self._cost(count[rank], load[rank]) * (1 - HELPS):
            return None
        given, taken, partner = own[best[0]], theirs[best[1]], int(other[best[1]])
        if given >= 0:
            self.holder[given] = partner
        if taken >= 0:
            self.holder[taken] = rank
        for sums, more in ((count, more_tokens[best]), (load, more_area[best])):
            sums[rank] -= more
            sums[partner] += more
        return partner

    def _partners(self, rank: int, count: Any, load: Any) -> IntArray:
        """The ranks with most room for what is too much, or most of what is missing."""
        local_len = self.blocks.local_len
        room = (local_len - count) * (1 if count[rank] > local_len else -1)
        if load[rank] > self.limit:
            room = room + AREA_WEIGHT * (self.limit - load) * local_len / self.blocks.mean_area
        room[rank] = -np.inf
        return np.argsort(-room, kind="stable")[: min(PARTNERS, self.blocks.ranks - 1)]

    def move_first_tokens(self) -> bool:
        """Move first tokens of the largest piece of the rank with the largest area to another rank,
        as many as are too much; False if it has not too much.

        The other rank is the one with the tokens before these, or that with the least area.
        """
        mean, cumulative = self.blocks.mean_area, self.blocks.cumulative
        load = np.bincount(self.holder, weights=self.area, minlength=self.blocks.ranks)
        rank = int(load.argmax())
        excess = load[rank] - self.limit
        if excess < MOVED_FROM * mean or not self._moves_left:
            return False
        self._moves_left -= 1
        piece = int(np.where(self.holder == rank, self.area, -1).argmax())
        start, length = int(self.start[piece]), int(self.tokens[piece])
        n = int(np.searchsorted(cumulative, cumulative[start] + MOVED_MORE * excess)) - start
        n = min(n, length)
        before = np.flatnonzero(self.start + self.tokens == start)
        whole = not len(before) or start in self.blocks.starts
        other = int(load.argmin()) if whole else int(self.holder[before[0]])
        area = self.blocks.area_of(TokenRun(start, n))
        self.holder = np.append(self.holder, other)
        self.start = np.append(self.start, start)
        self.tokens = np.append(self.tokens, n)
        self.area = np.append(self.area, area)
        self.start[piece] += n
        self.tokens[piece] -= n
        self.area[piece] -= area
        return True


def _equal_counts(blocks: TokenBlocks, held: _HeldPieces) -> Assignment:
    """Step 3: the tokens of every rank, equally many: ranks with too many give first tokens of
    their shortest block that has enough to those with too few."""
    assigned: Assignment = [[] for _ in range(blocks.ranks)]
    pieces = zip(held.holder.tolist(), held.start.tolist(), held.tokens.tolist(), strict=True)
    for rank, start, length in pieces:
        if length:
            assigned[rank].append(TokenRun(start, length))
    begins = set(blocks.starts.tolist())
    missing = [blocks.local_len - sum(run.length for run in runs) for runs in assigned]
    poor = sorted((rank for rank, n in enumerate(missing) if n > 0), key=missing.__getitem__)
    for rank, runs in enumerate(assigned):
        count = sum(run.start in begins for run in runs)
        most = max(blocks.chunk, -(missing[rank] // max(count, 1)))  # of one block: few are light
        while missing[rank] < 0:
            n = min(-missing[rank], missing[poor[-1]], most)
            whole = [run for run in runs if run.start in begins] or runs
            run = min(whole, key=lambda run: abs(run.length - n) if run.length >= n else np.inf)
            n = min(n, run.length)
            runs.remove(run)
            if n < run.length:
                runs.append(TokenRun(run.start + n, run.length - n))
            assigned[poor[-1]].append(TokenRun(run.start, n))
            missing[rank] += n
            missing[poor[-1]] -= n
            if not missing[poor[-1]]:
                poor.pop()
    return assigned


def _sharing_first(blocks: TokenBlocks, assigned: Assignment) -> list[int]:
    """An order of the ranks in which those that share blocks follow each other, so that they lie in
    one node: after each rank the one to which most of its keys are sent, or from which."""
    runs = sorted((run, rank) for rank, of_rank in enumerate(assigned) for run in of_rank)
    begins = set(blocks.starts.tolist())
    shared = np.zeros((blocks.ranks, blocks.ranks), dtype=np.int64)
    for (before, owner), (run, rank) in itertools.pairwise(runs):
        if run.start not in begins:
            shared[owner, rank] += before.length
            shared[rank, owner] += before.length
    order, left = [0], np.arange(blocks.ranks) > 0
    while left.any():
        following = int(np.where(left, shared[order[-1]], -1).argmax())
        order.append(following)
        left[following] = False
    return order
