"""The slots of a scan, which are the runs of consecutive tokens of all ranks, and its order.

Zigzag on P ranks is a scan of 2P slots.  A slot takes a state from the one before unless a document
begins with its first token; what it hands on depends on that state unless a document begins
anywhere in it.  The backward pass is the same scan from the last slot to the first: what is taken
there is the gradient of the state at the end, what is handed on that of the state at the start.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cpbench.parallel.layout import Layout


class Slot(NamedTuple):
    """A run of consecutive tokens of one rank.

    Attributes:
        rank: that has it.
        start, stop: its tokens in the sequence.
        local: its first token among those of the rank.
        begins: whether a document begins with its first token.
        resets: ascending tokens of the run before which a document begins.
    """

    rank: int
    start: int
    stop: int
    local: int
    begins: bool
    resets: tuple[int, ...]

    @property
    def tokens(self) -> slice:
        """Among the local tokens."""
        return slice(self.local, self.local + self.stop - self.start)


@dataclass(frozen=True)
class Order:
    """The slots in the order of one pass, by their numbers.

    Attributes:
        ranks: of each slot.
        taking: whether a slot takes something from the slot before it in this order.
        passing: whether what it hands on depends on that.
        step: 1 from the first slot to the last, -1 from the last to the first.
    """

    ranks: tuple[int, ...]
    taking: tuple[bool, ...]
    passing: tuple[bool, ...]
    step: int

    def giver(self, slot: int) -> int | None:
        """The slot that this one takes from."""
        return slot - self.step if self.taking[slot] else None

    def taker(self, slot: int) -> int | None:
        """The slot that takes from this one."""
        after = slot + self.step
        return after if 0 <= after < len(self.ranks) and self.taking[after] else None

    def sources(self, slot: int) -> Iterator[int]:
        """All slots on which what a slot takes depends, the nearest first."""
        giver = self.giver(slot)
        while giver is not None:
            yield giver
            giver = self.giver(giver) if self.passing[giver] else None

    def readers(self, slot: int) -> Iterator[int]:
        """All slots for which this one is a source, the nearest first."""
        taker = self.taker(slot)
        while taker is not None:
            yield taker
            taker = self.taker(taker) if self.passing[taker] else None

    def own(self, rank: int) -> list[int]:
        """The slots of a rank, in this order."""
        return [slot for slot, owner in enumerate(self.ranks) if owner == rank][:: self.step]

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """How many sources each slot has."""
        depths = [0] * len(self.ranks)
        for slot in range(len(depths))[:: self.step]:
            giver = self.giver(slot)
            if giver is not None:
                depths[slot] = 1 + (depths[giver] if self.passing[giver] else 0)
        return tuple(depths)


def find_slots(layout: Layout, documents: tuple[int, ...], split: bool) -> tuple[Slot, ...]:
    """The slots of a layout of runs, in the order of their tokens; without padding.

    Args:
        documents: first tokens of all documents.
        split: whether a slot also ends where a document begins.
    """
    slots = []
    for rank in range(layout.world_size):
        local = 0
        for start, length in layout.ranges(rank).tolist():
            stop = min(start + length, layout.seq_len)
            first, last = (bisect.bisect_left(documents, token) for token in (start, stop))
            begun = documents[first:last]
            edges = sorted({start, stop, *begun}) if split else [start, stop]
            for a, b in itertools.pairwise(edges) if start < stop else ():
                resets = () if split else tuple(token - a for token in begun if token)
                begins = a == 0 or a in begun
                slots.append(Slot(rank, a, b, local + a - start, begins, resets))
            local += length
    return tuple(sorted(slots, key=lambda slot: slot.start))


def find_orders(slots: tuple[Slot, ...]) -> tuple[Order, Order]:
    """The orders of the forward and the backward pass."""
    ranks = tuple(slot.rank for slot in slots)
    taking = tuple(not slot.begins for slot in slots)
    taken = (*taking[1:], False)

    def passing(takes: tuple[bool, ...]) -> tuple[bool, ...]:
        return tuple(t and not slot.resets for t, slot in zip(takes, slots, strict=True))

    return Order(ranks, taking, passing(taking), 1), Order(ranks, taken, passing(taken), -1)
