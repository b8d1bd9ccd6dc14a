"""Blocks that travel round a ring of ranks, and gradients that follow them.  Not a strategy.

At step t of a plain ring, rank r holds the block of rank r - t.  With windows of w ranks it is a
double ring: in outer round o the block of window W - o goes round inside a window, w steps, while
the next window's block is on its way across the whole round.  A plain ring is one window.

A block goes only as far as some rank needs it.  Its gradient starts at the first rank (in each
round) that has something to add, follows it one step behind, and goes home in one hop from the
last; what its owner adds never travels.

Source: Ring Attention (arXiv 2310.01889); double ring: LoongTrain (arXiv 2406.18485).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpbench.masks.attn_mask import BoolArray, IntArray
from cpbench.parallel.comm import Done

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm, Handle

NOBODY = -1


class Step(NamedTuple):
    """What one rank does at one step; peers are ranks, ``NOBODY`` where nothing moves.

    Attributes:
        outer: the round.
        source: whose block is here.
        computes: whether there is work between it and this rank.
        to, coming_from: where the block goes next, and where the next one comes from.
        outer_to, outer_from: the same across windows, under way for a whole round.
        grad_to: where it goes after this step: onward, or home.
        grad_from: where the gradient of the next step's block comes from.
        home_from: where a gradient of the own block comes home from, after this step.
        plan: of the operator, if it computes.
    """

    outer: int
    source: int
    computes: bool
    to: int
    coming_from: int
    outer_to: int
    outer_from: int
    grad_to: int
    grad_from: int
    home_from: int
    plan: Any = None


def steps(
    needed: BoolArray, rank: int, window: int, plan: Callable[[int], Any]
) -> tuple[Step, ...]:
    """The steps of one rank; those in which it has nothing to do are left out.

    Args:
        needed: ``(P, P)`` true where the rank of the row has work with the block of the column.
        window: ranks of a window, a divisor of P.
        plan: the operator's plan for the work with a block, by its owner.
    """
    table = _schedule(needed.tobytes(), len(needed), window)[:, rank]
    found = []
    for row in table.tolist():
        step = Step(*row)
        if step.computes:
            step = step._replace(plan=plan(step.source))
        if step.computes or max(row[3:7]) > NOBODY or max(row[7:]) > NOBODY:
            found.append(step)
    return tuple(found)


@functools.lru_cache(maxsize=4)
def _schedule(needed: bytes, size: int, window: int) -> IntArray:
    """:func:`_make_schedule`, made once for all ranks."""
    return _make_schedule(np.frombuffer(needed, dtype=np.bool_).reshape(size, size), window)


def _make_schedule(needed: BoolArray, window: int) -> IntArray:
    """``(steps, ranks, 10)``: the fields of every step of every rank.

    Legend of axes: (block s, round o, turn i) or (round o, turn i, rank r).
    """
    size, rounds = len(needed), len(needed) // window
    s, o, i = np.ogrid[:size, :rounds, :window]
    holder = (s // window + o) % rounds * window + (s % window + i) % window  # (s, o, i)
    need = needed[holder, s]
    need[:, 0, 0] = False  # the owner's own
    any_here = need.any(2)
    first = np.argmax(need, axis=2)[:, :, None]
    last = np.where(any_here, window - 1 - np.argmax(need[:, :, ::-1], axis=2), NOBODY)[:, :, None]
    last_round = np.where(any_here.any(1), rounds - 1 - np.argmax(any_here[:, ::-1], axis=1), 0)
    onward = np.roll(holder, -1, axis=2)

    goes = i < last
    crosses = o < last_round[:, None, None]  # (s, o, 1)
    grad = any_here[:, :, None] & (first <= i) & (i <= last)
    home = grad & (i == last)

    r, o, i = np.arange(size)[None, None, :], *np.ogrid[:rounds, :window]
    o, i = o[:, :, None], i[:, :, None]
    source = (r // window - o) % rounds * window + (r % window - i) % window  # (o, i, r)
    coming = np.roll(source, -1, axis=1)  # the block of the next turn; never used after the last
    beyond = np.broadcast_to(np.roll(source[:, :1], -1, axis=0), source.shape)
    more = i < window - 1

    def of(table: Any, block: IntArray) -> Any:
        return np.broadcast_to(table, (size, rounds, window))[block, o, i]

    def peer(there: Any, who: Any) -> Any:
        return np.where(there, who, NOBODY)

    fields = [
        np.broadcast_to(o, source.shape),
        source,
        needed[np.broadcast_to(r, source.shape), source],
        peer(of(goes, source), of(onward, source)),
        peer(of(goes, coming) & more, of(holder, coming)),
        peer(of(crosses, source) & (i == 0), (r + window) % size),
        peer(of(crosses, beyond) & (i == 0), (r - window) % size),
        peer(of(grad, source), np.where(of(home, source), source, of(onward, source))),
        peer(of(grad & goes, coming) & more, of(holder, coming)),
        peer(
            of(home, np.broadcast_to(r, source.shape)), of(holder, np.broadcast_to(r, source.shape))
        ),
    ]
    table = np.stack([field.astype(np.int32) for field in fields], axis=-1)
    return table.reshape(rounds * window, size, len(fields))


def travel(
    plan: Sequence[Step], block: tuple[torch.Tensor, ...], comm: Comm, what: str = "keys"
) -> Iterator[tuple[Step, Any]]:
    """Each step of a plan and the block that is here, while the next ones are on their way.

    Two buffers serve any number of ranks in a ring, four in a double ring.  ``what`` is in them.
    """
    own, here, beyond = block, block, None
    free: list[tuple[torch.Tensor, ...]] = []
    crossing: Any = None
    kept: tuple[torch.Tensor, ...] | None = None  # the block that is crossing from here
    outer = 0

    def buffer() -> tuple[torch.Tensor, ...]:
        return free.pop() if free else tuple(x.new_empty(x.shape) for x in own)

    def release(old: tuple[torch.Tensor, ...]) -> None:
        if old is not own and old is not kept:
            free.append(old)

    for step in plan:
        if step.outer != outer:
            outer = step.outer
            if crossing is not None:
                crossing.wait()
                last, kept = kept, None
                if last is not None and last is not here:
                    release(last)
                crossing = None
            if beyond is not None:
                release(here)
                here, beyond = beyond, None
        if step.outer_to != NOBODY or step.outer_from != NOBODY:
            sends = [(x, step.outer_to) for x in here] if step.outer_to != NOBODY else []
            kept = here if sends else None
            beyond = buffer() if step.outer_from != NOBODY else None
            recvs = [(x, step.outer_from) for x in beyond or ()]
            crossing = comm.exchange(sends, recvs, f"{what} of another window")
        coming = buffer() if step.coming_from != NOBODY else None
        sends = [(x, step.to) for x in here] if step.to != NOBODY else []
        recvs = [(x, step.coming_from) for x in coming or ()]
        moving = comm.exchange(sends, recvs, what) if sends or recvs else Done()
        yield step, here
        moving.wait()
        if coming is not None:
            release(here)
            here = coming
    if crossing is not None:
        crossing.wait()


class Following:
    """Gradients of travelling blocks, one step behind them, each a stack of tensors.

    Args:
        shape: of the stack.
        dtype: it travels in; sums on a rank are float32 always.
        op: whose results are added up.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, op: BoundOperator, comm: Comm
    ) -> None:
        self._shape, self._dtype, self._op, self._comm = shape, dtype, op, comm
        self._own: torch.Tensor | None = None
        self._arriving: torch.Tensor | None = None
        self._home: torch.Tensor | None = None
        self._moving: Handle = Done()

    def add(self, step: Step, found: Sequence[torch.Tensor] | None) -> None:
        """What a rank adds at a step; None for nothing."""
        self._settle()
        here, self._arriving = self._arriving, None
        if found is not None and step.source == self._comm.rank:
            self._own = self._op.add_up(self._own, found)
        elif found is not None:
            here = self._op.add_up(None if here is None else here.float(), found)
        sends = []
        if step.grad_to != NOBODY:
            assert here is not None
            sends = [(here.to(self._dtype), step.grad_to)]
        recvs = []
        if step.grad_from != NOBODY:
            self._arriving = self._buffer()
            recvs.append((self._arriving, step.grad_from))
        if step.home_from != NOBODY:
            self._home = self._buffer()
            recvs.append((self._home, step.home_from))
        moves = bool(sends or recvs)
        self._moving = self._comm.exchange(sends, recvs, "gradients") if moves else Done()

    def finish(self) -> torch.Tensor:
        """The gradient of the own block, float32."""
        import torch

        self._settle()
        if self._own is None:
            return torch.zeros(tuple(self._shape), dtype=torch.float32, device=self._op.device)
        return self._own

    def _settle(self) -> None:
        """What was posted a step ago has arrived."""
        self._moving.wait()
        if self._home is not None:
            self._own = self._home.float() if self._own is None else self._own.add_(self._home)
            self._home = None

    def _buffer(self) -> torch.Tensor:
        import torch

        return torch.empty(tuple(self._shape), dtype=self._dtype, device=self._op.device)
