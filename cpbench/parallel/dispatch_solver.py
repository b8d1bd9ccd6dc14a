"""The solver behind the layout ``dispatch``: tokens dealt so that every rank has the same number of
them and nearly the same visible area, and few keys must travel.

Blocks of the mask that hang together (documents) fall into atoms, which fit on a rank, by tokens
and by area, and stay whole, and long ones.  Tokens of a long block that see more keys than the
average token are heavy, the others light.  Rank by rank, the end of the heaviest long block is
dealt, as much as balances with light tokens beside it: first those of the same block, from its
beginning (what a rank has fetched for the end serves them for nothing), then whole atoms.  As heavy
tokens lie above the average and light ones below, a share that balances exists for every rank, down
to one token; and as the heaviest go with the lightest, no block is spread over more ranks than it
need be.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cpbench.masks.attn_mask import AttnMask, BoolArray, IntArray

CHUNKS = 64  # of a rank's tokens: how finely heavy and light ones are told apart
EVEN = 0.01  # of the mean area above it: no more tokens are swapped
LOOK = 32  # atoms that are tried for one that fits


def deal(mask: AttnMask, ranks: int) -> IntArray:
    """``(n, 3)`` segments (rank, start, length), each rank ``ceil(S / P)`` tokens, in order.

    Positions from S on are padding.
    """
    return _Dealer(mask, ranks).segments()


class Row(NamedTuple):
    """Neighbouring tokens."""

    start: int
    length: int


class _Atom(NamedTuple):
    """A short block, or several tiny ones that are neighbours."""

    tokens: int
    area: int
    start: int

    @property
    def density(self) -> float:
        return self.area / self.tokens


class _Stock:
    """Some tokens of one block, dealt from either end.

    Args:
        cumulative: visible pairs before each token of the sequence.
        runs: (start, end) of the tokens, in order.
    """

    def __init__(self, cumulative: IntArray, runs: list[tuple[int, int]]) -> None:
        self._before, self._runs = cumulative, deque(runs)
        self.count = sum(end - start for start, end in runs)

    def area(self, count: int, high: bool = False) -> int:
        """Of so many from one end; of all if there are fewer."""
        total = 0
        for start, end in reversed(self._runs) if high else self._runs:
            n = min(count, end - start)
            first = end - n if high else start
            total += int(self._before[first + n] - self._before[first])
            count -= n
            if not count:
                break
        return total

    def take(self, count: int, high: bool = False) -> list[Row]:
        """So many from one end."""
        taken = []
        self.count -= count
        while count:
            start, end = self._runs.pop() if high else self._runs.popleft()
            n = min(count, end - start)
            count -= n
            taken.append(Row(end - n if high else start, n))
            if n < end - start and high:
                self._runs.append((start, end - n))
            elif n < end - start:
                self._runs.appendleft((start + n, end))
        return taken


class _Share:
    """What one rank gets, and how many tokens and how much area it still wants."""

    def __init__(self, tokens: int, area: float) -> None:
        self.tokens, self.area, self.rows = tokens, area, list[Row]()

    def add(self, stock: _Stock, count: int, high: bool = False) -> None:
        self.area -= stock.area(count, high)
        self.tokens -= count
        self.rows += stock.take(count, high)

    def add_whole(self, atom: _Atom) -> None:
        self.area -= atom.area
        self.tokens -= atom.tokens
        self.rows.append(Row(atom.start, atom.tokens))

    def room(self, heavy: _Stock, count: int, area: int) -> bool:
        """Whether, after so many light tokens, heavy ones can still make up the area."""
        left = self.tokens - count
        return left >= 0 and heavy.area(left, high=True) >= self.area - area

    def lighten(self, heavy: _Stock, stock: _Stock) -> bool:
        """Add light tokens as long as there is room; whether all were."""
        count = min(stock.count, self.tokens)
        self.add(stock, _most(count, lambda n: self.room(heavy, n, stock.area(n))))
        return not stock.count


class _Dealer:
    def __init__(self, mask: AttnMask, ranks: int) -> None:
        self.ranks, self.each = ranks, -(-mask.seq_q // ranks)
        seen = np.zeros(ranks * self.each, np.int64)
        seen[: mask.seq_q] = mask.row_counts()
        self.before = np.concatenate([[0], np.cumsum(seen)])
        starts = np.append(mask.diagonal_blocks(), len(seen))  # padding joins the last block
        long = np.diff(starts) > self.each
        long |= np.diff(self.before[starts]) * ranks > self.before[-1]
        step = max(self.each // CHUNKS, 1)
        # Long blocks, and what is left of others: heavy and light tokens, or light ones alone.
        self.heavy, self.light = deque[tuple[_Stock, _Stock]](), deque[_Stock]()
        for start, end in zip(starts[:-1][long].tolist(), starts[1:][long].tolist(), strict=True):
            heavy, light = self._halves(start, end, step)
            if heavy.count:
                self.heavy.append((heavy, light))
            else:
                self.light.append(light)
        densest = sorted(self.heavy, key=lambda pair: pair[0].area(step, high=True), reverse=True)
        self.heavy = deque(densest)
        self.atoms = deque(self._atoms(starts, long, step))
        self.by_density = list[_Atom]()  # the atoms, once there are no heavy tokens

    def _halves(self, start: int, end: int, step: int) -> tuple[_Stock, _Stock]:
        """The heavy and the light tokens of a block, told apart in chunks of ``step``."""
        cuts = np.append(np.arange(start, end, step), end)
        mean = float(self.before[-1]) / (len(self.before) - 1)
        heavy = np.diff(self.before[cuts]) > mean * np.diff(cuts)
        turns = np.flatnonzero(np.diff(heavy)) + 1
        bounds = cuts[np.concatenate([[0], turns, [len(heavy)]])].tolist()
        runs = list(itertools.pairwise(bounds))
        first = 0 if heavy[0] else 1
        return _Stock(self.before, runs[first::2]), _Stock(self.before, runs[1 - first :: 2])

    def _atoms(self, starts: IntArray, long: BoolArray, step: int) -> list[_Atom]:
        """The short blocks, in order; tiny neighbours that begin in one chunk stay together."""
        tiny = np.diff(starts) < step
        follows = tiny[1:] & tiny[:-1] & (np.diff(starts[:-1] // step) == 0)
        first = np.flatnonzero(np.append(True, ~follows))
        begin, end = starts[first], np.append(starts[first[1:]], starts[-1])
        begin, end = begin[~long[first]], end[~long[first]]
        area = self.before[end] - self.before[begin]
        rows = zip((end - begin).tolist(), area.tolist(), begin.tolist(), strict=True)
        return [_Atom(*row) for row in rows]

    def segments(self) -> IntArray:
        left, given = int(self.before[-1]), list[list[Row]]()
        for rank in range(self.ranks):
            share = _Share(self.each, left / (self.ranks - rank))
            while share.tokens and self.heavy:
                self._add_heavy(share)
            while share.tokens:
                self._add_any(share)
            given.append(share.rows)
            left -= self._area(*share.rows)
        self._even_out(given)
        rows = [(rank, *row) for rank, some in enumerate(given) for row in _joined(some)]
        return np.array(rows, dtype=np.int64).reshape(-1, 3)

    def _add_heavy(self, share: _Share) -> None:
        """The end of the heaviest block, after the light tokens that balance it; or all that is
        left of the block's heavy tokens, if that is too little."""
        heavy, own = self.heavy[0]
        if heavy.count < share.tokens:
            beside = self._lightest([own, *self.light], share.tokens - heavy.count)
            if heavy.area(heavy.count) + beside < share.area:
                share.add(heavy, heavy.count, high=True)
        if heavy.count:
            if all(share.lighten(heavy, stock) for stock in (own, *self.light)):
                self._add_atoms(share, heavy)
            share.add(heavy, min(share.tokens, heavy.count), high=True)
        if not heavy.count:
            self.heavy.popleft()
            self.light.appendleft(own)
        self._tidy()

    def _add_atoms(self, share: _Share, heavy: _Stock) -> None:
        """Whole atoms, in the order of the sequence, as long as there is room, and then part of
        one; where none are left, light tokens of the blocks whose turn has not come."""
        atoms = self.atoms
        if not atoms:
            all(share.lighten(heavy, stock) for stock in self._waiting())
            return
        skipped = list[_Atom]()
        while atoms and len(skipped) < LOOK:
            atom = atoms.popleft()
            if atom.area <= share.area and share.room(heavy, atom.tokens, atom.area):
                share.add_whole(atom)
            else:
                skipped.append(atom)
        if skipped:
            skipped.sort()
            cut = self._opened(skipped.pop(0))
            share.lighten(heavy, cut)
            self.light.append(cut)
        atoms.extendleft(sorted(skipped, key=lambda atom: -atom.start))

    def _add_any(self, share: _Share) -> None:
        """Where no heavy tokens are left: what has been cut already, or the atom nearest to the
        density that is wanted."""
        self._tidy()
        if self.light:
            share.add(self.light[0], min(share.tokens, self.light[0].count))
            return
        if self.atoms:
            self.by_density = sorted(self.atoms, key=lambda atom: atom.density)
            self.atoms.clear()
        atoms, want = self.by_density, share.area / share.tokens
        at = bisect.bisect(atoms, want, key=lambda atom: atom.density)
        near = range(max(at - LOOK, 0), min(at + LOOK, len(atoms)))
        fits = [i for i in near if atoms[i].tokens <= share.tokens]
        atom = atoms.pop(min(fits or near, key=lambda i: abs(atoms[i].density - want)))
        if fits:
            share.add_whole(atom)
        else:
            self.light.append(self._opened(atom))

    def _opened(self, atom: _Atom) -> _Stock:
        return _Stock(self.before, [(atom.start, atom.start + atom.tokens)])

    def _tidy(self) -> None:
        while self.light and not self.light[0].count:
            self.light.popleft()

    def _waiting(self) -> list[_Stock]:
        """The light tokens of long blocks whose turn has not come, sparsest first."""
        later = itertools.islice(self.heavy, 1, None)
        return sorted((light for _, light in later), key=lambda light: light.area(1))

    def _lightest(self, stocks: list[_Stock], count: int) -> float:
        """About the area of the next so many light tokens."""
        total = 0.0
        for stock in stocks:
            n = min(stock.count, count)
            total, count = total + stock.area(n), count - n
            if not count:
                return total
        if self.atoms:
            return total + count * self.atoms[0].density
        return total + sum(light.area(count) for light in self._waiting()[:1])

    def _area(self, *rows: Row) -> int:
        return sum(int(self.before[start + n] - self.before[start]) for start, n in rows)

    def _even_out(self, given: list[list[Row]]) -> None:
        """Swap dense tokens of the rank with the most area for sparse ones of the rank with the
        least, as long as that helps: the last ranks get what is left, which may not balance."""
        areas = np.array([self._area(*rows) for rows in given], dtype=np.float64)
        mean = float(areas.mean())
        for _ in range(2 * self.ranks):
            most, least = int(areas.argmax()), int(areas.argmin())
            if areas[most] <= mean * (1 + EVEN):
                return
            dense = max(given[most], key=lambda row: self._area(Row(row.start + row.length - 1, 1)))
            sparse = min(given[least], key=lambda row: self._area(Row(row.start, 1)))
            count = self._swap(dense, sparse, min(areas[most] - mean, mean - areas[least]))
            if not count:
                return
            cut = dense.start + dense.length - count
            up, down = Row(cut, count), Row(sparse.start, count)
            kept = Row(dense.start, dense.length - count)
            stays = Row(sparse.start + count, sparse.length - count)
            for rank, old, new in ((most, dense, (kept, down)), (least, sparse, (stays, up))):
                given[rank].remove(old)
                given[rank] += [row for row in new if row.length]
                areas[rank] = self._area(*given[rank])

    def _swap(self, dense: Row, sparse: Row, want: float) -> int:
        """How many tokens at the end of one row and the beginning of another to swap for a gain of
        up to an area; only as long as each one gains."""
        end = dense.start + dense.length

        def gains(n: int) -> bool:
            return self._area(Row(end - n, 1)) > self._area(Row(sparse.start + n - 1, 1))

        def fits(n: int) -> bool:
            return self._area(Row(end - n, n)) - self._area(Row(sparse.start, n)) <= want

        return _most(_most(min(dense.length, sparse.length), gains), fits)


def _joined(rows: list[Row]) -> list[Row]:
    """In order, neighbours as one."""
    found = list[Row]()
    for row in sorted(rows):
        if found and found[-1].start + found[-1].length == row.start:
            found[-1] = Row(found[-1].start, found[-1].length + row.length)
        else:
            found.append(row)
    return found


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """The largest n up to ``count`` that fits, where n fits only if smaller ones do; else 0."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
