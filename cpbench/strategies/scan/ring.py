"""A scan from slot to slot: each waits for a state, applies its transition, and hands it on.

A state is sent in blocks of columns, of which one is applied while the next is on its way: so n
slots take the time of n + blocks - 1 blocks.  A transition is never sent.

Source: LASP (arXiv 2404.02882); blocks as in ZeCO (arXiv 2507.01004).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm, Handle
    from cpbench.parallel.mixing import BoundMixer, Summary
    from cpbench.strategies.scan.slots import Order


def exchange(
    order: Order,
    own: dict[int, Summary],
    like: Summary,
    mixer: BoundMixer,
    comm: Comm,
    blocks: int,
) -> Generator[None, None, dict[int, torch.Tensor]]:
    """As :func:`cpbench.strategies.scan.doubling.exchange`, which see.

    Every rank goes through its slots in their order, and a send is posted together with the next
    receive: so no order of messages can make ranks wait for each other.
    """
    import torch

    taken: dict[int, list[torch.Tensor]] = {}  # blocks of what each own slot takes
    posted: list[Handle] = []
    for slot in order.own(comm.rank):
        giver, taker = order.giver(slot), order.taker(slot)
        target = None if taker is None else order.ranks[taker]
        summary = own.get(slot)
        states = [] if summary is None else _blocks(summary.state, blocks)
        passing = order.passing[slot]
        handed_on = [] if passing else states
        unsent = 0  # the first block of those that has not been sent
        if giver is not None and slot not in taken:
            buffers = [torch.empty_like(x) for x in _blocks(like.state, blocks)]
            for i, buffer in enumerate(buffers):
                sends = _to(handed_on[unsent:], target, comm)
                unsent = len(handed_on)
                handle = comm.exchange(sends, [(buffer, order.ranks[giver])], "states")
                if i == 0:
                    yield
                handle.wait()
                if passing and summary is not None:
                    handed_on.append(mixer.apply(summary.transition, buffer) + states[i])
            taken[slot] = buffers
        elif passing and summary is not None:
            pairs = zip(taken[slot], states, strict=True)
            handed_on = [mixer.apply(summary.transition, x) + state for x, state in pairs]
        if sends := _to(handed_on[unsent:], target, comm):
            posted.append(comm.exchange(sends, [], "states"))
        if taker is not None and target == comm.rank:
            taken[taker] = handed_on
    for handle in posted:
        handle.wait()
    return {slot: torch.cat(parts, -1) for slot, parts in taken.items()}


def _blocks(state: torch.Tensor, blocks: int) -> list[torch.Tensor]:
    """Contiguous blocks of the columns of a state."""
    return [x.contiguous() for x in state.tensor_split(blocks, dim=-1)]


def _to(
    tensors: list[torch.Tensor], target: int | None, comm: Comm
) -> list[tuple[torch.Tensor, int]]:
    """Messages to another rank; none to this one."""
    return [] if target is None or target == comm.rank else [(x, target) for x in tensors]
