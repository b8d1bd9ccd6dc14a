"""A scan by gathering summaries: every rank folds those before its slots by itself.

If all ranks have equally many slots and no document is cut off, it is an all-gather; else messages
go to the ranks that read them.  Transitions are sent in the forward pass alone, also to the ranks
that read them in the backward pass.

Source: LASP-2 (arXiv 2502.07563).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm, Handle
    from cpbench.parallel.mixing import BoundMixer, Summary
    from cpbench.strategies.scan.slots import Order

    BySlot = dict[int, torch.Tensor]


def exchange(
    order: Order,
    own: dict[int, Summary],
    like: Summary,
    mixer: BoundMixer,
    comm: Comm,
    transitions: BySlot,
    to_send: tuple[Order, ...] = (),
) -> Generator[None, None, BySlot]:
    """As :func:`cpbench.strategies.scan.doubling.exchange`, which see.

    Args:
        transitions: those that are known, of ``own`` too; those that are received are added.
        to_send: the orders for which transitions are sent: of this pass and of later ones, or none.
    """
    states = {slot: summary.state for slot, summary in own.items()}
    if like.transition is None:
        to_send = ()
    handles: list[Handle] = []
    if comm.size > 1 and is_even(order, comm.size):
        handles = [_gather(order, states, like.state, comm)]
        if to_send:
            assert like.transition is not None
            handles.append(_gather(order, transitions, like.transition, comm))
    elif comm.size > 1:
        handles = [_send(order, states, transitions, like, comm, to_send)]
    yield
    for handle in handles:
        handle.wait()
    if like.transition is None:
        return _fold(order, states, dict.fromkeys(states), mixer, comm.rank)
    return _fold(order, states, transitions, mixer, comm.rank)


def is_even(order: Order, size: int) -> bool:
    """Whether all ranks have equally many slots, of which all but the first pass something on."""
    counts = {order.ranks.count(rank) for rank in range(size)}
    return len(counts) == 1 and order.passing.count(False) == 1


def _gather(order: Order, by_slot: BySlot, like: torch.Tensor, comm: Comm) -> Handle:
    """All-gather a tensor of each slot into ``by_slot``; 0 of own slots that it lacks."""
    import torch

    slots = [order.own(rank) for rank in range(comm.size)]
    own = [by_slot.get(slot) for slot in slots[comm.rank]]
    packed = torch.stack([torch.zeros_like(like) if x is None else x for x in own])
    gathered = packed.new_empty((comm.size, *packed.shape))
    for of_rank, numbers in zip(gathered, slots, strict=True):
        for x, slot in zip(of_rank, numbers, strict=True):
            by_slot[slot] = x
    return comm.all_gather(gathered, packed)


def _send(
    order: Order,
    states: BySlot,
    transitions: BySlot,
    like: Summary,
    comm: Comm,
    to_send: tuple[Order, ...],
) -> Handle:
    """Send states and transitions to the ranks that read them, and receive those of others into
    ``states`` and ``transitions``."""
    import torch

    sends, recvs = [], []
    for slot in order.own(comm.rank):
        readers = {order.ranks[reader] for reader in order.readers(slot)}
        sends += [(states[slot], peer) for peer in sorted(readers - {comm.rank})]
        readers = {
            x.ranks[reader] for x in to_send if x.passing[slot] for reader in x.readers(slot)
        }
        sends += [(transitions[slot], peer) for peer in sorted(readers - {comm.rank})]
    own = order.own(comm.rank)
    sources = {source for slot in own for source in order.sources(slot)}
    read = {
        source for x in to_send for slot in own for source in x.sources(slot) if x.passing[source]
    }
    for source in sorted(sources | read)[:: order.step]:
        peer = order.ranks[source]
        if peer != comm.rank:
            if source in sources:
                states[source] = torch.empty_like(like.state)
                recvs.append((states[source], peer))
            if source in read:
                assert like.transition is not None
                transitions[source] = torch.empty_like(like.transition)
                recvs.append((transitions[source], peer))
    return comm.exchange(sends, recvs, "summaries")


def _fold(
    order: Order,
    states: BySlot,
    transitions: Mapping[int, torch.Tensor | None],
    mixer: BoundMixer,
    rank: int,
) -> BySlot:
    """What each slot of a rank takes."""
    taken: BySlot = {}
    wanted = {slot for slot in order.own(rank) if order.taking[slot]}
    state: torch.Tensor | None = None
    for slot in range(len(order.ranks))[:: order.step]:
        if not wanted:
            break
        if slot in wanted:
            assert state is not None
            taken[slot] = state
            wanted.remove(slot)
        own = states.get(slot)
        if state is not None and own is not None and order.passing[slot]:
            own = mixer.apply(transitions[slot], state) + own
        state = own
    return taken
