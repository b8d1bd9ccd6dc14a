"""A scan by recursive doubling: ceil(log2 n) rounds for n slots.

Before the round of distance d each slot has the summary of the d slots that end with it; it sends
that to the slot d further on.  Where nothing before them matters, what is sent is a state alone.

Source: Hillis and Steele 1986, Data Parallel Algorithms.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm
    from cpbench.parallel.mixing import BoundMixer, Summary
    from cpbench.strategies.scan.slots import Order


def exchange(
    order: Order, own: dict[int, Summary], like: Summary, mixer: BoundMixer, comm: Comm
) -> Generator[None, None, dict[int, torch.Tensor]]:
    """Pass states between slots; yields while messages are on their way.

    Args:
        own: summaries of the slots of this rank that others take from.
        like: a summary of these shapes.

    Returns:
        What each slot of this rank takes.
    """
    depths = order.depths
    taken: dict[int, Summary] = {}  # of the slots before each own one, as many as are known
    distance = 1
    while distance <= max(depths):
        sends, recvs = [], []
        received: dict[int, Summary] = {}
        for slot in order.own(comm.rank):
            reader = slot + distance * order.step
            if 0 <= reader < len(depths) and depths[reader] >= distance:
                handed_on = own[slot]
                if order.passing[slot] and slot in taken:
                    handed_on = mixer.combine(handed_on, taken[slot])
                if not _is_open(order, slot, distance):
                    handed_on = mixer.summary(None, handed_on.state)
                if order.ranks[reader] == comm.rank:
                    received[reader] = handed_on
                else:
                    sends += [(x, order.ranks[reader]) for x in _parts(handed_on)]
        for slot in order.own(comm.rank):
            source = slot - distance * order.step
            if depths[slot] >= distance and slot not in received:
                received[slot] = _empty(like, _is_open(order, source, distance), mixer)
                recvs += [(x, order.ranks[source]) for x in _parts(received[slot])]
        if sends or recvs:
            handle = comm.exchange(sends, recvs, "states")
            yield
            handle.wait()
        for slot, earlier in received.items():
            later = taken.get(slot)
            taken[slot] = earlier if later is None else mixer.combine(later, earlier)
        distance *= 2
    return {slot: summary.state for slot, summary in taken.items()}


def _is_open(order: Order, slot: int, distance: int) -> bool:
    """Whether something matters to what a slot hands on that is before the ``distance`` slots which
    end with it."""
    return order.passing[slot] and order.depths[slot] >= distance


def _parts(summary: Summary) -> list[torch.Tensor]:
    """The tensors of a summary."""
    transition = [] if summary.transition is None else [summary.transition.contiguous()]
    return [*transition, summary.state.contiguous()]


def _empty(like: Summary, is_open: bool, mixer: BoundMixer) -> Summary:
    """What is received, not set yet; without a transition if nothing before it matters."""
    import torch

    transition = None
    if is_open and like.transition is not None:
        transition = torch.empty_like(like.transition)
    return mixer.summary(transition, torch.empty_like(like.state))
